"""Figures of scores: AUROC, its interval over seeds and prompts, a threshold, an effect size.

Scores come as a dict from seed to (planted [N], control [N]); prompt i is the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tool_packs import separation

__all__ = ["accused", "auroc", "effect_size", "interval", "threshold"]

Scores = Mapping[int, tuple[Tensor, Tensor]]
FALSE = 0.05  # share of the control's held-out scores that may lie above the threshold


def auroc(planted: Tensor, control: Tensor) -> float:
    """How often a planted score [N] exceeds one of the control [M]; a tie counts half."""
    labels = torch.cat([torch.ones(len(planted)), torch.zeros(len(control))]).bool()
    return float(separation.auroc(torch.cat([planted, control]).double(), labels))


def pooled(scores: Scores) -> tuple[Tensor, Tensor]:
    """All seeds as one: planted [S * N], control [S * N]."""
    return torch.cat([s[0] for s in scores.values()]), torch.cat([s[1] for s in scores.values()])


def interval(scores: Scores, n: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the pooled AUROC: seeds drawn anew, then prompts within each.

    A prompt goes with its planted and its control score, as the two are not independent. With one
    seed it says nothing about other seeds.
    """
    generator = torch.Generator().manual_seed(seed)
    planted, control = pooled(scores)
    above = (planted[:, None] > control).double() + (planted[:, None] == control) / 2  # [P, C]
    times = torch.stack(
        [torch.randint(len(scores), (len(scores),), generator=generator) for _ in range(n)]
    )  # [n, S]: which seeds
    drawn: tuple[list[Tensor], list[Tensor]] = ([], [])
    for which, pair in enumerate(scores.values()):
        paired = len(pair[0]) == len(pair[1])
        counts = torch.zeros(n, len(pair[0])), torch.zeros(n, len(pair[1]))
        for k in range(len(scores)):
            here = (times[:, k] == which).float()[:, None]  # [n, 1]
            at = torch.randint(len(pair[0]), (n, len(pair[0])), generator=generator)
            also = (
                at
                if paired
                else torch.randint(len(pair[1]), (n, len(pair[1])), generator=generator)
            )
            counts[0].scatter_add_(1, at, here.expand(-1, at.shape[1]))
            counts[1].scatter_add_(1, also, here.expand(-1, also.shape[1]))
        for side in (0, 1):
            drawn[side].append(counts[side])
    left, right = (torch.cat(side, 1).double() for side in drawn)  # [n, P], [n, C]: how often each
    area = ((left @ above) * right).sum(1) / (left.sum(1) * right.sum(1))
    low, high = area.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return low, high


def threshold(control: Tensor, false: float = FALSE) -> float:
    """The smallest of the control's held-out scores [N] above which at most `false` of them lie."""
    ordered = control.sort().values
    allowed = int(false * len(ordered))
    return float(ordered[len(ordered) - 1 - allowed])


def accused(scores: Tensor, above: float) -> float:
    """The share of scores [N] above the threshold."""
    return float((scores > above).double().mean())


def effect_size(planted: Tensor, control: Tensor) -> float | None:
    """Cohen's d: difference of the means over the pooled standard deviation.

    0 where both are the same constant; None where they are two different ones, for then it has no
    bound.
    """
    difference = float(planted.double().mean() - control.double().mean())
    spread = float(((planted.double().var() + control.double().var()) / 2).sqrt())
    if spread <= 1e-9:
        return 0.0 if abs(difference) <= 1e-9 else None
    return difference / spread
