"""Read the residual stream, or any vector, in words: the logit lens."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect
from tool_packs.engine import Steer, shown
from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import Position, Text, read, resolve, token_strings, word_ids
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.structure import require_numbers

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["lens_vector", "logit_lens"]

CHUNK = 64 * 1024 * 1024  # logits held at once

Carry = Callable[[Tensor, int], Tensor]  # states [..., d] and their layer to states [..., d]


def logit_lens(
    m: Model,
    text: Text,
    layers: Layers = "all",
    positions: Position = "all",
    *,
    k: int = 5,
    track: Sequence[str] | Mapping[str, Sequence[str]] = (),
    n_random: int = 16,
    seed: int = 0,
    steer: Steer = None,
) -> Result:
    """What would the model say if it stopped at this layer?

    Each residual state goes through the model's own final norm, unembedding, scale and softcap.
    At the last layer this is the model's own prediction, exactly.

    Args:
        text: a str (plain text), a chat, or a list of either.
        layers: as in `capture`.
        positions: as in `capture`.
        k: likeliest tokens kept for each cell.
        track: words (or groups of words by name) whose rank and log probability are wanted in
            every cell; a word stands for its best single-token form.
        n_random: random states of the same norm, for each layer, that the tracked words are
            ranked on as the control.
        seed: of the random states.
        steer: as in `generate`.

    Returns:
        Result: top_ids, top_logprobs [prompt, layer, position, k]; top_prob [prompt, layer,
        position] of the likeliest token; entropy [prompt, layer, position] in nats; with track=
        rank (1 is the top) and logprob [prompt, layer, position, word], and rank_random [layer,
        word, null]; nan (ids -1, rank 0) where a prompt has fewer positions. Rows: prompt, layer,
        position, token, top, entropy, and the rank of each word.

    Raises:
        ModelError: the model's logits are not unembed(norm(x)), so no lens can be read.
        TextError: a layer or position that does not exist here.

    Use when:
        You ask at which layer a prediction forms, or whether a word is present before it is said.

    Not when:
        Early layers of a model whose basis drifts: a tuned or Jacobian lens reads those better.

    Cost:
        one forward pass, and layers * positions * vocabulary * width for the unembedding.

    Controls:
        the tracked words ranked on random states of the same norm, on by default.

    Paper:
        nostalgebraist 2020 (n/a on arXiv); 2303.08112 discusses its limits

    Example:
        from tool_packs.logit_lens import logit_lens
        r = logit_lens(m, "the cat sat on the", track=["mat", "dog"])
        r.rows[-1]
        r.plot()
    """
    return lens_grid(
        m, text, layers, positions, k=k, track=track, n_random=n_random, seed=seed, steer=steer
    )


def lens_grid(
    m: Model,
    text: Text,
    layers: Layers = "all",
    positions: Position = "all",
    *,
    k: int = 5,
    track: Sequence[str] | Mapping[str, Sequence[str]] = (),
    n_random: int = 16,
    seed: int = 0,
    steer: Steer = None,
    technique: str = "logit_lens",
    carry: Carry | None = None,
    lens: Result | None = None,
) -> Result:
    """What `logit_lens` does, with states [X, d] of a layer carried to the last by `carry` first.

    `carry` is that of a trained `lens`.

    A lens that carries has the plain logit lens beside it: `kl` and `kl_logit`, the divergence of
    each from the model's own prediction at that position.
    """
    started = time.perf_counter()
    refuse_inexact(m)
    prompts = read(m, text)
    index = m.layer_indices(layers)
    where = [resolve(prompt, positions) for prompt in prompts]
    groups = _groups(m, track)
    wanted = index if carry is None else [*index, m.n_layers - 1]
    states = collect(m, prompts, wanted, where, steer=steer)["resid_post"]  # [N, L, P, d]
    h = states[:, : len(index)]
    if carry is not None:
        h = torch.stack([carry(h[:, j], layer) for j, layer in enumerate(index)], 1)
    present = ~h[:, :, :, 0].isnan()  # [N, L, P]
    found = _read(m, h[present], k, groups)
    if carry is not None:
        own = states[:, -1:].expand_as(h)[present]
        found["kl"] = divergence(m, own, h[present])
        found["kl_logit"] = divergence(m, own, states[:, :-1][present])
    n, n_layers, columns = present.shape
    k = found["top_ids"].shape[-1]
    tensors = {
        "top_ids": torch.full((n, n_layers, columns, k), -1),
        "top_logprobs": torch.full((n, n_layers, columns, k), float("nan")),
        "entropy": torch.full((n, n_layers, columns), float("nan")),
    }
    dims: dict[str, tuple[str, ...]] = {
        "top_ids": ("prompt", "layer", "position", "k"),
        "top_logprobs": ("prompt", "layer", "position", "k"),
        "entropy": ("prompt", "layer", "position"),
    }
    if groups:
        tensors["rank"] = torch.zeros(n, n_layers, columns, len(groups), dtype=torch.long)
        tensors["logprob"] = torch.full((n, n_layers, columns, len(groups)), float("nan"))
        dims |= dict.fromkeys(("rank", "logprob"), ("prompt", "layer", "position", "word"))
    for name in ("kl", "kl_logit") if carry is not None else ():
        tensors[name] = torch.full((n, n_layers, columns), float("nan"))
        dims[name] = ("prompt", "layer", "position")
    for name, tensor in tensors.items():
        tensor[present] = found[name]
    tensors["top_prob"] = tensors["top_logprobs"][..., 0].exp()
    dims["top_prob"] = ("prompt", "layer", "position")
    lines = []
    if carry is not None:
        lines.append(
            "nats from the model's own prediction, beside the plain logit lens: "
            + ", ".join(
                f"layer {index[j]} {tensors['kl'][:, j].nanmean():.3g} "
                f"({tensors['kl_logit'][:, j].nanmean():.3g})"
                for j in sorted({0, n_layers // 2, n_layers - 1})
            )
        )
    if lens is not None and lens.provenance.fingerprint != m.fingerprint():
        fitted = lens.provenance
        lines.append(
            f"the lens was trained on other weights: {fitted.model}, "
            + (f"adapter {fitted.adapter}" if fitted.adapter else "no adapter")
        )
    if groups:
        generator = torch.Generator().manual_seed(seed)
        lengths = states[:, :n_layers].norm(dim=-1)  # [N, L, P]
        norms = torch.stack([lengths[:, j][present[:, j]].mean() for j in range(n_layers)])
        guesses = torch.randn(n_layers, n_random, m.width, generator=generator)
        guesses = guesses / guesses.norm(dim=-1, keepdim=True) * norms[:, None, None]
        if carry is not None:
            guesses = torch.stack([carry(guesses[j], layer) for j, layer in enumerate(index)])
        ranks = _read(m, guesses.flatten(0, 1), 1, groups)["rank"]
        tensors["rank_random"] = ranks.unflatten(0, (n_layers, n_random)).transpose(1, 2)
        dims["rank_random"] = ("layer", "word", "null")
        for w, word in enumerate(groups):
            mine = tensors["rank"][..., w].float().masked_fill(~present, float("inf"))
            at = int(mine.argmin())
            i, j, p = at // (n_layers * columns), at // columns % n_layers, at % columns
            control = tensors["rank_random"][:, w].flatten()
            best, cells = int(mine.min()), int(present.sum())
            share = (1 + (control <= best).sum().item()) / (1 + len(control))
            lines.append(
                f"{word!r}: best rank {best} of {m.vocab_size} at layer {index[j]}, prompt {i}, "
                f"position {where[i][p]}, among {cells} cells; control, as many random states: "
                f"a rank that good with probability {1 - (1 - share) ** cells:.2f} "
                f"(their median {control.float().median():.0f})"
            )
    rows, top_strings, tokens = [], [], []
    vocabulary = _strings(m, tensors["top_ids"])
    for i, prompt in enumerate(prompts):
        tokens.append(token_strings(m, [prompt.ids[p] for p in where[i]]))
        strings = [
            [vocabulary.get(int(t), "") for t in tensors["top_ids"][i, j, :, 0]]
            for j in range(n_layers)
        ]
        top_strings.append(strings)
        for j, layer in enumerate(index):
            for p, position in enumerate(where[i]):
                ids, values = tensors["top_ids"][i, j, p], tensors["top_logprobs"][i, j, p]
                row: dict[str, Any] = {
                    "prompt": i,
                    "layer": layer,
                    "position": position,
                    "token": tokens[i][p],
                    "top": [
                        (vocabulary[int(t)], round(float(v.exp()), 4))
                        for t, v in zip(ids, values, strict=True)
                    ],
                    "entropy": round(tensors["entropy"][i, j, p].item(), 3),
                }
                for w, word in enumerate(groups):
                    row[word] = int(tensors["rank"][i, j, p, w])
                rows.append(row)
    shown = sorted({0, n_layers // 2, n_layers - 1})
    for j in shown:
        best = ", ".join(
            repr(vocabulary[int(t)]) for t in tensors["top_ids"][0, j, len(where[0]) - 1]
        )
        lines.append(f"prompt 0, position {where[0][-1]}, layer {index[j]}: {best}")
    return Result(
        title=f"{technique.replace('_', ' ')} of {n} prompts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"layer": index, "tokens": tokens, "top": top_strings, "word": list(groups)},
        rows=rows,
        lines=lines,
        figure={
            "kind": "grid",
            "values": "top_prob",
            "cells": "top",
            "ticks": "tokens",
            "label": "probability of the top token",
        },
        provenance=provenance(
            m,
            technique,
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layers=index,
            positions=str(positions),
            track=_shown_groups(m, groups),
            **({} if lens is None else {"lens": origin(lens)}),
        ),
    )


def lens_vector(
    m: Model,
    vec: Tensor,
    *,
    k: int = 10,
    track: Sequence[str] | Mapping[str, Sequence[str]] = (),
    control: Tensor | None = None,
    n_random: int = 200,
    seed: int = 0,
) -> Result:
    """Which words does this vector point to, and from which does it point away?

    For a direction, an activation difference, a row of a weight matrix. The vector goes through the
    final norm and the unembedding; the words at both ends are kept.

    Args:
        vec: [d], or [row, d] for several (one a layer, one a position).
        k: words kept at each end.
        track: words (or groups by name) whose rank is wanted.
        control: a vector of the same shape without the property, as an unrelated adapter's.
        n_random: random directions of the same norm that the tracked words are ranked on.
        seed: of the random directions.

    Returns:
        Result: top_ids, top_logits, bottom_ids, bottom_logits [row, k]; with track= rank
        [row, word] (1 is the top), rank_random [row, word, null] and p [row, word] (the share of
        random directions that rank the word as high), with control= rank_control [row, word].
        Rows: row, top, bottom, and the rank and p of each word.

    Raises:
        ModelError: the model's logits are not unembed(norm(x)).
        TextError: a vector of another width.

    Use when:
        You have an activation difference or a concept direction and want to know its content.

    Not when:
        The vector lives in early layers: what it means there is not yet in words.

    Cost:
        no forward pass; (rows * (1 + n_random)) * vocabulary * width.

    Controls:
        random directions of the same norm, on by default; `control` where you have one.

    Paper:
        arXiv 2510.13900

    Example:
        from tool_packs.logit_lens import lens_vector
        r = lens_vector(m, m.embed(torch.tensor([7]))[0], track=["cat"])
        r.rows[0]["top"], r.rows[0]["cat"], r.rows[0]["p(cat)"]
    """
    started = time.perf_counter()
    refuse_inexact(m)
    rows_in = _as_rows(m, vec)  # [R, d]
    groups = _groups(m, track)
    found = _read(m, rows_in, k, groups, both_ends=True)
    tensors = {
        name: found[name] for name in ("top_ids", "top_logits", "bottom_ids", "bottom_logits")
    }
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, ("row", "k"))
    count = rows_in.shape[0]
    if groups:
        generator = torch.Generator().manual_seed(seed)
        guesses = torch.randn(count, n_random, m.width, generator=generator)
        guesses = guesses / guesses.norm(dim=-1, keepdim=True)
        guesses = guesses * rows_in.norm(dim=-1)[:, None, None]
        ranks = _read(m, guesses.flatten(0, 1), 1, groups)["rank"]
        ranks = ranks.unflatten(0, (count, n_random)).transpose(1, 2)  # [R, W, null]
        as_high = (ranks <= found["rank"][:, :, None]).sum(-1)
        tensors |= {
            "rank": found["rank"],
            "rank_random": ranks,
            "p": (1 + as_high) / (1 + n_random),
        }
        dims |= {"rank": ("row", "word"), "rank_random": ("row", "word", "null")}
        dims["p"] = ("row", "word")
        if control is not None:
            theirs = _as_rows(m, control)
            if theirs.shape != rows_in.shape:
                raise TextError(
                    f"control has shape {tuple(theirs.shape)}, the vector {tuple(rows_in.shape)}"
                )
            tensors["rank_control"] = _read(m, theirs, 1, groups)["rank"]
            dims["rank_control"] = ("row", "word")
    rows, lines = [], []
    words = _strings(m, tensors["top_ids"]) | _strings(m, tensors["bottom_ids"])
    for i in range(count):
        row: dict[str, Any] = {
            "row": i,
            "top": [words[int(t)] for t in tensors["top_ids"][i]],
            "bottom": [words[int(t)] for t in tensors["bottom_ids"][i]],
        }
        for w, word in enumerate(groups):
            row[word] = int(tensors["rank"][i, w])
            row[f"p({word})"] = round(tensors["p"][i, w].item(), 4)
        rows.append(row)
        if i < 6:
            lines.append(f"row {i}: towards {row['top'][:6]}, away from {row['bottom'][:4]}")
            for w, word in enumerate(groups):
                line = (
                    f"  {word!r}: rank {row[word]} of {m.vocab_size}; control, random directions: "
                    f"rank {mean_sd(tensors['rank_random'][i, w])}, p {row[f'p({word})']:.3f}"
                )
                if control is not None:
                    line += f"; control vector: rank {int(tensors['rank_control'][i, w])}"
                lines.append(line)
    return Result(
        title=f"words that {count} vector{'s' * (count > 1)} point{'s' * (count == 1)} to",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"word": list(groups)},
        rows=rows,
        lines=lines,
        provenance=provenance(
            m, "lens_vector", started, seed=seed, track=_shown_groups(m, groups), n_random=n_random
        ),
    )


def refuse_inexact(m: Model) -> None:
    if not m.lens_exact:
        raise ModelError(
            f"{m.name}: unembed(norm(last layer)) is off the model's logits by "
            f"{m.structure.lens_error:.3g}, so a lens would mislead. Is the norm the right one? "
            'load_model(name, norm="path.to.the.norm")'
        )


def _groups(m: Model, track: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    if isinstance(track, str):
        track = [track]
    if isinstance(track, Mapping):
        return {name: sorted({i for w in ws for i in word_ids(m, w)}) for name, ws in track.items()}
    return {word: word_ids(m, word) for word in track}


def _shown_groups(m: Model, groups: Mapping[str, Sequence[int]]) -> dict[str, list[str]]:
    return {word: token_strings(m, ids) for word, ids in groups.items()}


def _as_rows(m: Model, vec: Tensor) -> Tensor:
    vec = torch.as_tensor(vec).detach().float().cpu()
    if vec.ndim == 1:
        vec = vec[None]
    if vec.ndim != 2 or vec.shape[1] != m.width:
        raise TextError(f"vec has shape {tuple(vec.shape)}: give [{m.width}] or [row, {m.width}]")
    return vec


@torch.no_grad()
def _read(
    m: Model,
    h: Tensor,
    k: int,
    groups: Mapping[str, Sequence[int]],
    *,
    both_ends: bool = False,
) -> dict[str, Tensor]:
    """Top tokens, entropy, ranks and log probabilities of states h [X, d], some rows at a time."""
    parts: dict[str, list[Tensor]] = {}

    def keep(name: str, value: Tensor) -> None:
        parts.setdefault(name, []).append(value.cpu())

    for rows in shown(h.split(max(1, CHUNK // (4 * m.vocab_size))), "unembedding"):
        logits = m.unembed(m.norm(rows))  # [x, V]
        require_numbers(m.core, logits)
        logprobs = logits.log_softmax(-1)
        top = logprobs.topk(min(k, logits.shape[-1]), dim=-1)
        keep("top_ids", top.indices)
        keep("top_logprobs", top.values)
        keep("entropy", -(logprobs.exp() * logprobs).sum(-1))
        if both_ends:
            low = logits.topk(min(k, logits.shape[-1]), dim=-1, largest=False)
            keep("top_logits", logits.gather(-1, top.indices))
            keep("bottom_ids", low.indices)
            keep("bottom_logits", low.values)
        if groups:
            best = torch.stack([logprobs[:, list(i)].max(-1).values for i in groups.values()], 1)
            ranks = [(logprobs > best[:, w, None]).sum(-1) + 1 for w in range(len(groups))]
            keep("rank", torch.stack(ranks, 1))
            keep("logprob", best)
    return {name: torch.cat(values) for name, values in parts.items()}


def origin(lens: Result) -> dict[str, Any]:
    """Which weights and how many texts a lens was fitted on, for the provenance of a reading."""
    p = lens.provenance
    return {"fingerprint": p.fingerprint, "adapter": p.adapter, "prompts": p.prompts}


@torch.no_grad()
def divergence(m: Model, own: Tensor, read_as: Tensor) -> Tensor:
    """KL [X] in nats of what states `read_as` [X, d] say from what `own` [X, d] say."""
    parts = []
    rows = max(1, CHUNK // (8 * m.vocab_size))
    for a, b in zip(own.split(rows), read_as.split(rows), strict=True):
        p, q = (m.unembed(m.norm(h)).log_softmax(-1) for h in (a, b))  # [x, V]
        parts.append((p.exp() * (p - q)).sum(-1).cpu())
    return torch.cat(parts)


def _strings(m: Model, ids: Tensor) -> dict[int, str]:
    """Each id that occurs, decoded once."""
    distinct = [int(i) for i in ids.unique() if int(i) >= 0]
    return dict(zip(distinct, token_strings(m, distinct), strict=True))
