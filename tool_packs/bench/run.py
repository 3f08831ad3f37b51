"""Choose on other seeds, measure on this one: every method on every organism and its control.

For seed s a method's setting and its threshold come from the development prompts of the other
seeds that ship. The test prompts are read once, with the setting that was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from tool_packs import organisms
from tool_packs.bench import statistics
from tool_packs.bench.cases import ORGANISMS, Case, case_of
from tool_packs.bench.method import Method
from tool_packs.bench.methods import METHODS
from tool_packs.bench.subject import Cost, Subject, Weights, weights_of
from tool_packs.errors import PackError

__all__ = ["Row", "choose", "quiet", "run"]

Pair = tuple[Tensor, Tensor]  # scores of the planted adapter [N], of its control [N]
Development = Mapping[int, Mapping[Any, Pair]]  # by seed and setting


@dataclass
class Row:
    """One method on one organism, over the seeds that were measured."""

    method: str
    organism: str
    chosen: dict[int, Any] = field(default_factory=dict)  # setting by seed
    scores: dict[int, Pair] = field(default_factory=dict)
    thresholds: dict[int, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)  # of one adapter on the test prompts, mean over seeds
    failed: str = ""  # the sentence with which it did not work

    def figures(self) -> dict[str, Any]:
        """Everything that the table shows, as plain values."""
        told: dict[str, Any] = {
            "method": self.method,
            "organism": self.organism,
            "failed": self.failed,
            "chosen": {str(seed): setting for seed, setting in self.chosen.items()},
        }
        if self.failed:
            return told
        planted, control = statistics.pooled(self.scores)
        low, high = statistics.interval(self.scores)
        above = [
            (s, *(statistics.accused(x, self.thresholds[s]) for x in self.scores[s]))
            for s in self.scores
        ]
        return told | {
            "auroc": statistics.auroc(planted, control),
            "auroc_low": low,
            "auroc_high": high,
            "auroc_by_seed": {str(s): statistics.auroc(*pair) for s, pair in self.scores.items()},
            "caught": sum(c for _, c, _ in above) / len(above),
            "false_accusations": sum(f for _, _, f in above) / len(above),
            "effect_size": statistics.effect_size(planted, control),
            "mean_planted": float(planted.mean()),
            "mean_control": float(control.mean()),
            "scores": len(planted),
            "passes": self.cost.passes,
            "seconds": self.cost.seconds,
        }


def choose(development: Development, seed: int, settings: Sequence[Any]) -> tuple[Any, float]:
    """The setting with the best mean AUROC on the other seeds, and its threshold there.

    What `development` holds of `seed` itself is not looked at. The first of equals wins.
    """
    others = [s for s in development if s != seed]
    if not others:
        raise ValueError(f"seed {seed}: no other seed to choose a setting on")
    quality = [
        sum(statistics.auroc(*development[s][setting]) for s in others) for setting in settings
    ]
    best = settings[quality.index(max(quality))]
    _, control = statistics.pooled({s: development[s][best] for s in others})
    return best, statistics.threshold(control)


def run(
    names: Sequence[str] = ORGANISMS,
    methods: Sequence[Method] = tuple(METHODS.values()),
    seeds: Sequence[int] = organisms.SEEDS,
    jobs: int = 1,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """One row for each method and organism. `report` hears a line for each organism that is done.

    With jobs > 1 the organisms are shared out among as many processes, one thread each; methods
    must then be those of METHODS. Raises ValueError on an organism or a seed that does not ship. A
    technique that refuses to work on an organism is a row with its sentence.
    """
    for name in names:
        for seed in seeds:
            case_of(name, seed)
    found: dict[str, list[Row]] = {}
    if min(jobs, len(names)) <= 1:
        for name in names:
            found[name] = _organism(name, methods, seeds)
            report(_done(name, found))
    else:
        with ProcessPoolExecutor(min(jobs, len(names)), get_context("spawn"), quiet, (1,)) as pool:
            chosen = [method.name for method in methods]
            waiting = {pool.submit(_by_name, name, chosen, list(seeds)): name for name in names}
            for future in as_completed(waiting):
                found[waiting[future]] = future.result()
                report(_done(waiting[future], found))
    return [row for name in names for row in found[name]]


def quiet(threads: int) -> None:
    """For a process that does nothing else: no bars of loading weights, and so many threads."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


def _done(name: str, found: Mapping[str, list[Row]]) -> str:
    failed = sum(bool(row.failed) for row in found[name])
    return f"{name}: {len(found[name])} methods" + (f", {failed} of them failed" if failed else "")


def _by_name(name: str, methods: Sequence[str], seeds: Sequence[int]) -> list[Row]:
    return _organism(name, [METHODS[method] for method in methods], seeds)


def _organism(name: str, methods: Sequence[Method], seeds: Sequence[int]) -> list[Row]:
    cases = {seed: case_of(name, seed) for seed in sorted(organisms.SEEDS)}
    weights = {seed: weights_of(case) for seed, case in cases.items()}
    rows = []
    for method in methods:
        row = Row(method.name, name)
        try:
            _measure(row, method, cases, weights, seeds)
        except PackError as error:
            row.failed = " ".join(str(error).split())
        rows.append(row)
    return rows


def _measure(
    row: Row,
    method: Method,
    cases: Mapping[int, Case],
    weights: Mapping[int, Weights],
    seeds: Sequence[int],
) -> None:
    needed = [s for s in cases if any(s != seed for seed in seeds)]
    development = {
        s: {
            setting: _pair(method, weights[s], cases[s], "dev", setting)[0]
            for setting in method.settings
        }
        for s in needed
    }
    total = Cost()
    for seed in seeds:
        setting, above = choose(development, seed, method.settings)
        row.chosen[seed], row.thresholds[seed] = setting, above
        row.scores[seed], cost = _pair(method, weights[seed], cases[seed], "test", setting)
        total += cost
    row.cost = Cost(round(total.passes / len(seeds)), total.seconds / len(seeds))


def _pair(
    method: Method, weights: Weights, case: Case, part: str, setting: Any
) -> tuple[Pair, Cost]:
    """Scores of the planted adapter and of its control, and what the planted one cost."""
    with weights.counting() as cost:
        planted = method.score(Subject(weights, case, case.organism, part), setting)
    control = method.score(Subject(weights, case, case.control, part), setting)
    return (planted.detach().float(), control.detach().float()), cost
