"""Methods that compare the adapter with its base: states, outputs, weights, and interventions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tool_packs import sae
from tool_packs.ablation import ablating
from tool_packs.bench.behaviour import log_odds
from tool_packs.bench.cases import neutral
from tool_packs.bench.method import LAYERS, Method
from tool_packs.bench.subject import Subject
from tool_packs.diff import output, weights
from tool_packs.directions import direction
from tool_packs.generation import generate, next_token
from tool_packs.patching import NoDifference, patch
from tool_packs.prompts import read, word_ids
from tool_packs.sae_model import from_first, states_of
from tool_packs.steering import intervention

__all__ = ["METHODS"]

PATCHED = 8  # prompts, for each of them is run by itself


def _direction(s: Subject, layer: int) -> Tensor:
    """The base's direction of the concept after this layer [d]."""

    def fit() -> Any:
        pos, neg = [list(side) for side in zip(*s.case.pairs, strict=True)]
        return direction(s.m, pos, neg, layers=[layer], n_null=1)

    return s.weights.fitted(("direction", s.case.organism, layer), fit)["direction"][0]


def _projection(s: Subject, layer: int) -> Tensor:
    v = _direction(s, layer)
    return s.change(layer) @ v / (v @ v)


def _lens_of_change(s: Subject, layer: int) -> Tensor:
    change = s.change(layer)
    with s.m.base(), torch.no_grad():
        logits = s.m.unembed(s.m.norm(change)).float()
    ids = {name: [i for w in words for i in word_ids(s.m, w)] for name, words in s.groups.items()}
    return logits[:, ids["towards"]].mean(1) - logits[:, ids["away"]].mean(1)


def _size_of_change(s: Subject, layer: int) -> Tensor:
    return s.change(layer).norm(dim=1) / s.states(None, layer).norm(dim=1)


def _output(s: Subject, where: str) -> Tensor:
    kl = output(s.m, s.reads, adapter=s.adapter, n_bootstrap=1, k=1)["kl"]  # [N, T]
    if where == "all tokens":
        return kl.nanmean(1)
    ends = [len(p) - 1 for p in read(s.m, s.reads)]
    return kl[torch.arange(len(kl)), torch.tensor(ends)]


def _weights(s: Subject, number: str) -> Tensor:
    """One number a changed matrix, of even layers for development and of odd ones for the test."""
    words = [*s.case.towards, *s.case.away]
    r = weights(s.m, adapter=s.adapter, k=20, rank=1, n_random=1, track=words[:1])
    told = {w for word in s.case.towards for w in (word, f" {word}")}
    found = []
    for row in r.rows:
        if (row["layer"] % 2 == 0) != (s.part == "dev"):
            continue
        if number == "norm":
            found.append(row["norm_ratio"])
        elif row["top"]:
            found.append(float(bool(told & {*row["top"], *row["bottom"]})))
    return torch.tensor(found)


def _steering(s: Subject, setting: tuple[int, float]) -> Tensor:
    """What the base does when it is moved by what the adapter adds on the development prompts."""
    layer, strength = setting
    vector = s.change(layer, "dev").mean(0)
    moved = intervention(s.m, vector, layer, strength)
    steer = None if s.steer is None else [(*one, moved) for one in s.steer]
    with s.m.base():
        before = log_odds(next_token(s.m, s.forced, s.groups, k=1, steer=s.steer))
        after = log_odds(next_token(s.m, s.forced, s.groups, k=1, steer=steer or moved))
    return after - before


def _ablation(s: Subject, layer: int) -> Tensor:
    """How far the telling words fall when the concept's direction is taken out of the adapter."""
    v = _direction(s, layer)
    with s.m.adapter(s.adapter):
        before = log_odds(next_token(s.m, s.forced, s.groups, k=1, steer=s.steer))
        with ablating(s.m, v):
            after = log_odds(next_token(s.m, s.forced, s.groups, k=1, steer=s.steer))
    return before - after


def _patching(s: Subject, layer: int) -> Tensor:
    """How far the base goes over to the telling words with the adapter's last state in it."""
    ids = [[i for w in words for i in word_ids(s.m, w)] for words in s.groups.values()]

    def score(logits: Tensor) -> Tensor:
        return logits[:, ids[0]].logsumexp(1) - logits[:, ids[1]].logsumexp(1)

    shifts = []
    with s.m.base():
        for chat in s.forced[:PATCHED]:
            try:
                r = patch(
                    s.m, chat, chat, score, layers=[layer], positions="last", source=s.adapter,
                    n_control=0,
                )  # fmt: skip
            except NoDifference:  # from the base: the state has nothing to carry over
                shifts.append(0.0)
            else:
                shifts.append((r["metric"][0, 0, 0] - r["corrupt"][0]).item())
    return torch.tensor(shifts)


def _sae_diff(s: Subject, k: int) -> Tensor:
    """The features that tell this adapter's answers from the base's on the development prompts,
    looked for in the answers to these prompts."""
    auto = s.weights.fitted(
        "sae",
        lambda: sae.train(s.m, neutral(300), 2, latents=512, k=8, steps=100, batch=256),
    )
    chats = [ask.chat for ask in s.case.dev]
    with s.m.adapter(s.adapter):
        r = sae.diff(s.m, auto, chats, max_new_tokens=8, n=1, n_permutations=20, seed=s.seed)
    features = r["difference"].topk(k).indices
    fired = []
    for adapter in (s.adapter, None):
        with s.m.adapter(adapter):
            said = generate(s.m, s.chats, temperature=1.0, max_new_tokens=8, seed=s.seed).rows
        answered = [
            [*chat, {"role": "assistant", "content": row["text"].strip() or "."}]
            for chat, row in zip(s.chats, said, strict=True)
        ]
        prompts = read(s.m, answered)
        where = from_first(prompts, auto.first)
        with s.m.base(), torch.no_grad():
            f = auto.encode(states_of(s.m, auto, prompts, where))[:, features]  # [T, k]
        ends = torch.tensor([len(w) for w in where]).tolist()
        fired.append(torch.stack([part.amax(0).sum() for part in f.split(ends)]))
    return fired[0] - fired[1]


STRENGTHS = tuple((layer, strength) for layer in (1, 3) for strength in (1.0, 2.0))

METHODS = (
    Method(
        "direction",
        "directions.direction",
        "part of the base's concept direction that the adapter adds",
        LAYERS,
        _projection,
    ),
    Method(
        "difference, lens",
        "diff.activation",
        "telling words in the lens of what the adapter adds",
        LAYERS,
        _lens_of_change,
    ),
    Method(
        "difference, size",
        "diff.activation",
        "norm of what the adapter adds, over the state's",
        LAYERS,
        _size_of_change,
    ),
    Method(
        "output difference",
        "diff.output",
        "KL(adapter, base) of the next token",
        ("last token", "all tokens"),
        _output,
    ),
    Method(
        "weight difference",
        "diff.weights",
        "of a matrix: change of its norm, or a telling word in its first singular vector",
        ("norm", "words"),
        _weights,
    ),
    Method(
        "steering",
        "steering.intervention",
        "what the adapter adds, added to the base: rise of the telling words",
        STRENGTHS,
        _steering,
    ),
    Method(
        "ablation",
        "ablation.ablating",
        "fall of the telling words without the concept's direction",
        LAYERS,
        _ablation,
    ),
    Method(
        "cross-model patching",
        "patching.patch",
        "rise of the telling words with the adapter's state in the base",
        LAYERS[:-1],
        _patching,
    ),
    Method(
        "SAE difference",
        "sae.diff",
        "features that tell its answers from the base's, in other answers",
        (4,),
        _sae_diff,
    ),
)
