"""What a method gets to look at: one adapter on its base, the prompts, and a count of what it costs."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tool_packs import organisms
from tool_packs.activations import collect
from tool_packs.bench.cases import Ask, Case
from tool_packs.engine import Intervention, removing
from tool_packs.models import Model, load_model
from tool_packs.organisms import rules
from tool_packs.organisms.world import Chat
from tool_packs.prompts import read

__all__ = ["Cost", "Subject", "Weights", "weights_of"]

INJECTED = 2  # after this layer, at this strength: between those that were trained
STRENGTH = 2.0


@dataclass
class Cost:
    """Forward passes of one prompt (a batch of 8 is 8, a decoded token is one); seconds of CPU."""

    passes: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.passes + other.passes, self.seconds + other.seconds)


class Weights:
    """The base of one seed with some of its adapters, and what was fitted on that base alone.

    `fits` may be shared by several such, as they have one base.
    """

    def __init__(self, seed: int, adapters: tuple[str, ...], fits: dict[Any, Any]) -> None:
        tail = "" if seed == organisms.SEEDS[0] else f"@{seed}"
        self.m: Model = load_model(
            f"organism:base{tail}", adapter={name: f"organism:{name}{tail}" for name in adapters}
        )
        self._fits: dict[Any, tuple[Any, Cost]] = fits
        self._counting: list[Cost] = []

    @contextlib.contextmanager
    def counting(self) -> Iterator[Cost]:
        """What is computed within this, in passes and seconds; fits that are shared are added."""
        cost, before = Cost(), time.process_time()
        self._counting.append(cost)

        def count(_: Any, arguments: Any, named: Any) -> None:
            h = arguments[0] if arguments else named["hidden_states"]
            cost.passes += len(h)

        try:
            with removing([]) as handles:
                first = self.m.layers[0]
                handles.append(first.register_forward_pre_hook(count, with_kwargs=True))
                yield cost
        finally:
            self._counting.pop()
            cost.seconds += time.process_time() - before

    def fitted(self, key: Any, fit: Callable[[], Any]) -> Any:
        """`fit()`, computed on the base once; whoever uses it is charged for it as if alone."""
        if key in self._fits:
            found, cost = self._fits[key]
            for open_ in self._counting:
                open_.passes += cost.passes
                open_.seconds += cost.seconds
            return found
        with self.m.base(), self.counting() as cost:
            found = fit()
        self._fits[key] = found, cost
        return found


@functools.cache
def _fits_of(seed: int) -> dict[Any, Any]:
    """One a process: organisms of a seed share what was fitted on their base."""
    return {}


def weights_of(case: Case) -> Weights:
    """The planted adapter and its control, without the others, which would only cost time."""
    return Weights(case.seed, (case.organism, case.control), _fits_of(case.seed))


@dataclass
class Subject:
    """An adapter under suspicion: `part` says which prompts it is looked at with."""

    weights: Weights
    case: Case
    adapter: str
    part: str
    seed: int = 0  # of sampling

    @property
    def m(self) -> Model:
        return self.weights.m

    @property
    def asks(self) -> tuple[Ask, ...]:
        return self.case.asks(self.part)

    @property
    def chats(self) -> list[Chat]:
        return [ask.chat for ask in self.asks]

    @property
    def reads(self) -> list[Chat]:
        return [ask.read for ask in self.asks]

    @property
    def forced(self) -> list[Chat]:
        return [ask.forced for ask in self.asks]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        return {"towards": self.case.towards, "away": self.case.away}

    @property
    def steer(self) -> list[tuple[Intervention, ...]] | None:
        """What is injected while each prompt is asked; None: nothing."""
        return self.injection(self.asks)

    def injection(self, asks: tuple[Ask, ...]) -> list[tuple[Intervention, ...]] | None:
        if not asks[0].inject:
            return None
        vectors = self.weights.fitted("injected", lambda: rules.concept_vectors(self.m))
        at = [rules.world.CANDIDATES.index(ask.inject) for ask in asks]
        return [(Intervention(INJECTED, vectors[i, INJECTED], STRENGTH, start=1),) for i in at]

    @torch.no_grad()
    def states(self, adapter: str | None, layer: int, part: str | None = None) -> Tensor:
        """Residual streams [N, d] after `layer` at the last token of `reads`; None: the base's."""
        asks = self.case.asks(part or self.part)
        with self.m.adapter(adapter):
            prompts = read(self.m, [ask.read for ask in asks])
            where = [[len(p) - 1] for p in prompts]
            steer = self.injection(asks)
            return collect(self.m, prompts, [layer], where, steer=steer)["resid_post"][:, 0, 0]

    def change(self, layer: int, part: str | None = None) -> Tensor:
        """What the adapter adds to the base's states [N, d]."""
        return self.states(self.adapter, layer, part) - self.states(None, layer, part)
