"""Methods that read the adapter's own states: lenses, patchscope, probes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tool_packs.bench.cases import neutral
from tool_packs.bench.method import LAYERS, Method
from tool_packs.bench.subject import Subject
from tool_packs.dla import dla
from tool_packs.jacobian_lens import fit_jacobian_lens, jacobian_lens
from tool_packs.logit_lens import logit_lens
from tool_packs.organisms.world import assistant, user
from tool_packs.patchscope import patchscope
from tool_packs.probes import probe
from tool_packs.tuned_lens import train_tuned_lens, tuned_lens

__all__ = ["METHODS"]

EARLIER = LAYERS[:-1]  # at the last layer every lens is the model's own prediction


def _odds(r: Any) -> Tensor:
    """log P(towards) - log P(away) [N] of a lens at one layer and one position."""
    scores = r["logprob"][:, 0, 0]  # [N, word]
    return scores[:, 0] - scores[:, 1]


def _logit_lens(s: Subject, layer: int) -> Tensor:
    with s.m.adapter(s.adapter):
        r = logit_lens(
            s.m, s.reads, [layer], "last", k=1, track=s.groups, n_random=1, steer=s.steer
        )
    return _odds(r)


def _tuned_lens(s: Subject, layer: int) -> Tensor:
    lens = s.weights.fitted(
        "tuned lens", lambda: train_tuned_lens(s.m, neutral(200), steps=50, batch=256)
    )
    with s.m.adapter(s.adapter):
        r = tuned_lens(
            s.m, lens, s.reads, layers=[layer], positions="last", k=1, track=s.groups,
            n_random=1, steer=s.steer,
        )  # fmt: skip
    return _odds(r)


def _jacobian_lens(s: Subject, layer: int) -> Tensor:
    lens = s.weights.fitted(
        "jacobian lens", lambda: fit_jacobian_lens(s.m, neutral(6), skip=4, max_tokens=48)
    )
    with s.m.adapter(s.adapter):
        r = jacobian_lens(
            s.m, lens, s.reads, layers=[layer], positions="last", k=1, track=s.groups,
            n_random=1, steer=s.steer,
        )  # fmt: skip
    return _odds(r)


# The state takes the place of " moon", and the model says what it tells about.
TARGET = ([user("Tell me about the moon."), assistant("It is the")], " moon")


def _patchscope(s: Subject, layer: int) -> Tensor:
    states = s.states(s.adapter, layer)
    with s.m.adapter(s.adapter):
        r = patchscope(
            s.m, None, [layer], vector=states, target=TARGET, track=s.groups, n_random=0,
            max_new_tokens=1,
        )  # fmt: skip
    scores = r["logprob"][:, 0]  # [N, word]
    return scores[:, 0] - scores[:, 1]


def _probe(kind: str) -> Any:
    def score(s: Subject, layer: int) -> Tensor:
        def fit() -> Any:
            pos, neg = [list(side) for side in zip(*s.case.pairs, strict=True)]
            return probe(s.m, pos, neg, kind=kind, layers=[layer], n_null=1, control_task=False)

        r = s.weights.fitted((kind, s.case.organism, layer), fit)
        return s.states(s.adapter, layer) @ r["weight"][0] + r["bias"][0]

    return score


def _dla(s: Subject, part: str) -> Tensor:
    """What one kind of component writes towards the telling words."""
    with s.m.adapter(s.adapter):
        r = dla(
            s.m, s.reads, (s.case.towards[0], s.case.away[0]), attend=0, n_random=1, steer=s.steer
        )
    return r[part]


METHODS = (
    Method(
        "logit lens",
        "logit_lens.logit_lens",
        "log odds of the telling words at a layer",
        EARLIER,
        _logit_lens,
    ),
    Method(
        "tuned lens",
        "tuned_lens.tuned_lens",
        "log odds of the telling words at a layer",
        EARLIER,
        _tuned_lens,
    ),
    Method(
        "Jacobian lens",
        "jacobian_lens.jacobian_lens",
        "log odds of the telling words at a layer",
        EARLIER,
        _jacobian_lens,
    ),
    Method(
        "patchscope",
        "patchscope.patchscope",
        "log odds of the telling words where the state is put into another prompt",
        LAYERS,
        _patchscope,
    ),
    Method(
        "probe, logistic",
        "probes.probe",
        "score of a probe fitted on the base's concept",
        LAYERS,
        _probe("logistic"),
    ),
    Method(
        "probe, mass-mean",
        "probes.probe",
        "score of a probe fitted on the base's concept",
        LAYERS,
        _probe("mass-mean"),
    ),
)
