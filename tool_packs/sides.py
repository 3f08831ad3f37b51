"""The two sides of a comparison: adapters on one set of weights, or two models that were loaded apart."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import Prompt, Text, read, token_strings

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__: list[str] = []


def side_of(m: Model, adapter: str | None, tuned: Model | None) -> str | Model:
    """What is compared with the base: an adapter's name (None: the active one), or another model.

    Raises:
        ModelError: both or neither are there, or two models whose tokens mean different things.
    """
    if tuned is None:
        name = adapter or m.active_adapter
        if name is None:
            raise ModelError(
                "no adapter is active: load_model(base, adapter=...), name one, or give a whole "
                "model (tuned=)"
            )
        return name
    if adapter is not None:
        raise ModelError(f"adapter={adapter!r} and tuned={tuned.name!r}: give one of the two")
    refuse_other_tokens(m, tuned)
    return tuned


@contextlib.contextmanager
def computing(m: Model, side: str | Model) -> Iterator[Model]:
    """Within this, the model of that side: `m` with the adapter, or the other model as it is."""
    if isinstance(side, str):
        with m.adapter(side):
            yield m
    else:
        yield side


def name_of(side: str | Model) -> str:
    return side if isinstance(side, str) else side.name


def told(side: str | Model) -> str:
    return f"the adapter {side}" if isinstance(side, str) else side.name


def recorded(tuned: Model | None) -> dict[str, str] | None:
    """What a result's provenance says of the other model."""
    return None if tuned is None else {"name": tuned.name, "fingerprint": tuned.fingerprint()}


def refuse_other_tokens(m: Model, other: Model) -> None:
    """Raises ModelError where a token id is one text here and another there."""
    if m.tokenizer is other.tokenizer:
        return
    one, two = ({i: t for t, i in x.tokenizer.get_vocab().items()} for x in (m, other))
    differ = sorted(i for i in one.keys() & two.keys() if one[i] != two[i])
    if differ:
        i = differ[0]
        raise ModelError(
            f"the tokenizers of {m.name} and {other.name} differ in {len(differ)} of "
            f"{len(one)} tokens (id {i} is {one[i]!r} and {two[i]!r}): models are compared token "
            "by token, so give two that share a tokenizer"
        )


def refuse_other_shape(m: Model, other: Model) -> None:
    """Raises ModelError where a state of one model has no counterpart in the other."""
    one, two = ((x.n_layers, x.width) for x in (m, other))
    if one != two:
        raise ModelError(
            f"{other.name} has (layers, d) {two} and {m.name} has {one}: activations are compared "
            "between models of one shape only; diff.output compares any two that share a tokenizer"
        )


def read_alike(m: Model, text: Text, sides: Sequence[str | Model]) -> list[Prompt]:
    """The prompts, which every side must read as the same tokens.

    Raises:
        TextError: with the first text that two models read differently, and where.
    """
    prompts = read(m, text)
    for side in sides:
        if isinstance(side, str) or side.tokenizer is m.tokenizer:
            continue
        for i, (a, b) in enumerate(zip(prompts, read(side, text), strict=True)):
            if a.ids != b.ids:
                raise TextError(_parted(m, side, i, a, b))
    return prompts


def _parted(m: Model, other: Model, i: int, a: Prompt, b: Prompt) -> str:
    pairs = zip(a.ids, b.ids, strict=False)
    at = next((k for k, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))
    one, two = ("".join(token_strings(m, p.ids[at : at + 4])) for p in (a, b))
    return (
        f"text {i} is {len(a)} tokens to {m.name} and {len(b)} to {other.name}; they part at token "
        f"{at}: {one!r} and {two!r}. If the chat templates or the first token differ, let both read "
        "alike: the other model's .tokenizer = m.tokenizer"
    )
