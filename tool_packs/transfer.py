"""Probes elsewhere: what was fitted on one model is scored on another, or on an adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.errors import ModelError, TextError
from tool_packs.separation import Fit, auroc, auroc_within

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__: list[str] = []

N_RANDOM = 200


def transferred(
    probes: Sequence[Fit],
    scores: Tensor,
    y: Tensor,
    fold: Tensor,
    elsewhere: Tensor,
    here: Tensor | None,
    free: Tensor | None,
) -> dict[str, Tensor]:
    """AUROC and shift [L] elsewhere of the probes that did not learn from a text's group; and of
    unlabelled texts, over the probes of all folds."""
    moved = torch.zeros_like(scores)  # [L, N]
    shift, above = [], []
    for f, fitted in enumerate(probes):
        test = fold == f
        moved[:, test] = fitted.scores(elsewhere)[0][:, test]
        gap = scores[:, test & y].mean(1) - scores[:, test & ~y].mean(1)  # [L], on unseen texts
        if here is not None and free is not None:
            before, after = fitted.scores(here)[0], fitted.scores(free)[0]  # [L, U]
            shift.append((after.mean(1) - before.mean(1)) / gap)
            joined = torch.cat([after, before], 1)
            origin = torch.arange(joined.shape[1]) < after.shape[1]
            above.append(auroc(joined, origin))
    gap = scores[:, y].mean(1) - scores[:, ~y].mean(1)
    out = {
        "transfer_auroc": auroc_within(moved, y, fold),
        "transfer_shift": (moved.mean(1) - scores.mean(1)) / gap,
    }
    if shift:
        out["unlabelled_shift"] = torch.stack(shift).mean(0)
        out["unlabelled_auroc"] = torch.stack(above).mean(0)
    return out


def random_directions(here: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
    """How well random directions [null] tell texts there [U, d] from the same texts here."""
    guesses = torch.randn(here.shape[1], N_RANDOM, generator=generator)
    joined = torch.cat([free, here]) @ guesses  # [2 U, null]
    a = auroc(joined.T, torch.arange(len(joined)) < len(free))
    return torch.maximum(a, 1 - a)


def targets(m: Model, transfer: Any) -> list[tuple[str, Any]]:
    if transfer is None:
        return []
    listed = list(transfer) if isinstance(transfer, (list, tuple)) else [transfer]
    out = []
    for target in listed:
        if not isinstance(target, str):
            out.append((target.name, target))
        elif target in m.adapters or target == "base":
            out.append((target, target))
        else:
            known = ", ".join(["base", *m.adapters])
            raise ModelError(
                f"no adapter {target!r} to transfer to: {known}; m.add_adapter(folder)"
            )
    return out


@contextlib.contextmanager
def within(m: Model, target: Any, index: Sequence[int]) -> Iterator[Model]:
    if not isinstance(target, str):
        check_fits(target, m.width, index)
        yield target
    else:
        with m.adapter(target if target in m.adapters else None):
            yield m


def check_fits(m: Model, width: int, index: Sequence[int]) -> None:
    if m.width != width or m.n_layers <= max(index):
        raise TextError(
            f"the probe reads {width} dimensions at layers up to {max(index)}; {m.name} has "
            f"{m.width} and layers 0..{m.n_layers - 1}"
        )


def transfer_line(
    name: str, moved: dict[str, Tensor], best: int, here: float, index: Sequence[int]
) -> str:
    line = (
        f"in {name}, layer {index[best]}: AUROC {moved['transfer_auroc'][best]:.3f} (here "
        f"{here:.3f}), mean score moved {moved['transfer_shift'][best]:+.2f} of the classes' distance"
    )
    if "unlabelled_shift" in moved:
        line += (
            f"; unlabelled texts moved {moved['unlabelled_shift'][best]:+.2f}, above here "
            f"AUROC {moved['unlabelled_auroc'][best]:.3f}"
        )
    if "unlabelled_random" in moved:
        limit = moved["unlabelled_random"].quantile(0.95)
        line += f" (control, random directions: 95 % below {limit:.3f})"
    return line
