"""Directions in the residual stream: of a concept, and of what an adapter changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect
from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import Position, Text, read, resolve
from tool_packs.result import Result, mean_sd, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["difference", "direction"]


def direction(
    m: Model,
    pos: Text,
    neg: Text,
    *,
    layers: Layers = "all",
    position: Position = "last",
    seed: int = 0,
    n_null: int = 50,
) -> Result:
    """Which direction separates two sets of texts, and does it hold on texts it was not made from?

    The direction is the difference of means (contrastive activation addition). Its AUROC is held
    out: made from one half of the texts, scored on the other, both ways. Two nulls go through the
    same arithmetic: shuffled labels, and random directions.

    Args:
        pos: texts or chats that have the property; several positions of one text are averaged.
        neg: texts or chats that lack it; where there are as many as in pos, text i of one is the
            partner of text i of the other: partners stay in one half and swap labels in the null.
        layers: as in `capture`.
        position: as in `capture`.
        seed: of the halves and of both nulls.
        n_null: shuffles, and random directions.

    Returns:
        Result: direction [layer, d] (units of the residual stream, not normalised: adding it with
        strength 1 moves the mean of neg to the mean of pos), auroc [layer] (held out),
        split_cosine [layer] (directions of the two halves), auroc_shuffled [layer, null],
        auroc_random [layer, null], resid_norm [layer]; rows layer, auroc, shuffled_95, p,
        split_cosine, norm_ratio. `r.rows` sorted by layer; p counts the shuffles whose best layer
        is at least as good as this one, so that choosing the best layer is paid for.

    Raises:
        TextError: fewer than 4 texts on a side, as halves need two each.

    Use when:
        You want a concept vector to steer with, to compare, or to read on other texts.

    Not when:
        The texts of the two sides differ in more than the concept: the direction will hold that.

    Cost:
        one forward pass over all texts; the nulls are matrix products.

    Controls:
        shuffled labels and random directions, both on by default; held-out halves.

    Paper:
        arXiv 2312.06681 (CAA), 2310.01405 (RepE)

    Example:
        from tool_packs.directions import direction
        happy = [f"the {x} is happy" for x in ("cat", "dog", "nurse", "doctor")]
        sad = [f"the {x} is sad" for x in ("cat", "dog", "nurse", "doctor")]
        r = direction(m, happy, sad)
        r["direction"].shape, r["auroc"]
    """
    started = time.perf_counter()
    one, two = read(m, pos), read(m, neg)
    if min(len(one), len(two)) < 4:
        raise TextError(
            f"{len(one)} and {len(two)} texts: give at least 4 a side, "
            "so that each half that checks the other has two"
        )
    index = m.layer_indices(layers)
    prompts = one + two
    where = [resolve(p, position) for p in prompts]
    x = collect(m, prompts, index, where)["resid_post"].nanmean(2).transpose(0, 1)  # [L, N, d]
    y = torch.tensor([True] * len(one) + [False] * len(two))
    generator = torch.Generator().manual_seed(seed)
    vector = _mean_difference(x, y)  # [L, d]
    paired = len(one) == len(two)
    auroc, cosine = _held_out(x, y, _halves(y, paired, generator))
    shuffled, random = [], []
    for _ in range(n_null):
        labels = _shuffle(y, paired, generator)
        shuffled.append(_held_out(x, labels, _halves(labels, paired, generator))[0])
        guess = torch.randn(len(index), m.width, generator=generator)
        a = _auroc(torch.einsum("lnd,ld->ln", x, guess), y)
        random.append(torch.maximum(a, 1 - a))  # a random direction may point either way
    null = torch.stack(shuffled, 1)  # [L, null]
    random_null = torch.stack(random, 1)
    best_null = null.max(0).values  # the best layer of each shuffle
    p = (1 + (best_null[None] >= auroc[:, None]).sum(1)) / (1 + n_null)  # [L]
    norm = x.norm(dim=-1).mean(1)  # [L]
    rows = [
        {
            "layer": layer,
            "auroc": round(auroc[j].item(), 4),
            "shuffled_95": round(null[j].quantile(0.95).item(), 4),
            "random_95": round(random_null[j].quantile(0.95).item(), 4),
            "p": round(p[j].item(), 4),
            "split_cosine": round(cosine[j].item(), 4),
            "norm_ratio": round((vector[j].norm() / norm[j]).item(), 4),
        }
        for j, layer in enumerate(index)
    ]
    best = max(range(len(index)), key=lambda j: auroc[j].item())
    row = rows[best]
    lines = [
        f"best layer {row['layer']}: held-out AUROC {row['auroc']:.3f}; control, shuffled labels: "
        f"{mean_sd(null[best])}, 95 % below {row['shuffled_95']:.3f}; "
        f"control, random directions: {mean_sd(random_null[best])}",
        f"p {row['p']:.3f} over {n_null} shuffles, each allowed its own best layer",
        f"split-half cosine {row['split_cosine']:.3f} (random halves of noise: 0 ± "
        f"{m.width**-0.5:.2f}); norm {row['norm_ratio']:.2f} of the residual stream",
    ]
    return Result(
        title=f"direction of {len(one)} against {len(two)} texts",
        tensors=to_cpu(
            {
                "direction": vector,
                "auroc": auroc,
                "split_cosine": cosine,
                "auroc_shuffled": null,
                "auroc_random": random_null,
                "resid_norm": norm,
            }
        ),
        dims={
            "direction": ("layer", "d"),
            "auroc": ("layer",),
            "split_cosine": ("layer",),
            "auroc_shuffled": ("layer", "null"),
            "auroc_random": ("layer", "null"),
            "resid_norm": ("layer",),
        },
        labels={"layer": index},
        rows=rows,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "layer",
            "lines": ["auroc", "split_cosine", "auroc_shuffled"],
            "bands": {"auroc_shuffled": "null"},
        },
        provenance=provenance(
            m,
            "direction",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layers=index,
            position=str(position),
            paired=paired,
            n_null=n_null,
        ),
    )


def difference(
    m: Model,
    text: Text,
    layers: Layers = "all",
    positions: Position = (0, 5),
    *,
    adapter: str | None = None,
    control: str | None = None,
    concepts: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    n_random: int = 200,
) -> Result:
    """What does an adapter add to the residual stream on texts unrelated to it?

    The mean over texts of activations with the adapter on minus off (activation difference lens).
    One set of weights computes both.

    Args:
        text: plain texts or chats; unrelated to what the adapter may have learned works best.
        layers: as in `capture`.
        positions: as in `capture`; texts shorter than the span are an error.
        adapter: which adapter; None: the active one.
        control: a further adapter, trained alike but without the property, for comparison.
        concepts: directions by name, [d] or [layer, d], to compare the difference with.
        seed: of the halves and of the random directions.
        n_random: random directions, for the range of a cosine.

    Returns:
        Result: difference [layer, position, d], norm_ratio [layer, position] (its norm over the
        mean norm of the residual stream), split_cosine [layer, position] (between the means of two
        halves of the texts); with control= difference_control and norm_ratio_control of the same
        shapes; with concepts= cosine [layer, position, concept] and cosine_random [null];
        rows layer, norm_ratio, split_cosine, and a column for each concept.

    Raises:
        ModelError: no adapter is loaded, or none of that name.
        TextError: a layer or position that does not exist here, or fewer than 2 texts.

    Use when:
        You have a base and an adapter and want to know what the training was about.

    Not when:
        You have one model alone: there is nothing to subtract.

    Cost:
        two forward passes over the texts up to the deepest layer (three with control=).

    Controls:
        split halves, random directions for each cosine, and the control adapter where given.

    Paper:
        arXiv 2510.13900

    Example:
        from tool_packs.directions import difference
        if m.adapters:
            r = difference(m, ["the cat sat on the mat", "Paris is a big city"], positions=(0, 3))
            r["difference"].shape, r.rows[-1]
    """
    started = time.perf_counter()
    name = adapter or m.active_adapter
    if name is None:
        raise ModelError("no adapter is active: load_model(base, adapter=...), or name one")
    prompts = read(m, text)
    if len(prompts) < 2:
        raise TextError("give at least 2 texts: the halves are what tells signal from one text")
    index = m.layer_indices(layers)
    where = [resolve(p, positions) for p in prompts]
    if len({len(w) for w in where}) > 1:
        short = min(range(len(prompts)), key=lambda i: len(where[i]))
        raise TextError(
            f"the texts differ in their number of positions (text {short}: {len(where[short])}): "
            "choose positions that all of them have"
        )
    with m.base():
        off = collect(m, prompts, index, where)["resid_post"]  # [N, L, P, d]
    scale = off.norm(dim=-1).mean(0)  # [L, P]

    def minus_base(which: str) -> Tensor:
        with m.adapter(which):
            return collect(m, prompts, index, where)["resid_post"] - off

    change = minus_base(name)
    mean = change.mean(0)  # [L, P, d]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator)
    middle = len(prompts) // 2
    halves = change[order[:middle]].mean(0), change[order[middle:]].mean(0)
    tensors = {
        "difference": mean,
        "norm_ratio": mean.norm(dim=-1) / scale,
        "split_cosine": torch.cosine_similarity(*halves, dim=-1),
        "resid_norm": scale,
    }
    dims: dict[str, tuple[str, ...]] = {
        "difference": ("layer", "position", "d"),
        "norm_ratio": ("layer", "position"),
        "split_cosine": ("layer", "position"),
        "resid_norm": ("layer", "position"),
    }
    if control is not None:
        other = minus_base(control).mean(0)
        tensors |= {
            "difference_control": other,
            "norm_ratio_control": other.norm(dim=-1) / scale,
            "cosine_control": torch.cosine_similarity(mean, other, dim=-1),
        }
        dims |= {
            "difference_control": ("layer", "position", "d"),
            "norm_ratio_control": ("layer", "position"),
            "cosine_control": ("layer", "position"),
        }
    rows = [
        {
            "layer": layer,
            "norm_ratio": round(tensors["norm_ratio"][j].mean().item(), 4),
            "split_cosine": round(tensors["split_cosine"][j].mean().item(), 4),
        }
        for j, layer in enumerate(index)
    ]
    last = len(index) - 1
    lines = [
        f"layer {index[last]}: the difference is {rows[last]['norm_ratio']:.3f} of the stream's "
        "norm; "
        f"control, the other half of the texts: cosine {rows[last]['split_cosine']:.3f}"
    ]
    if control is not None:
        lines.append(
            f"control adapter {control}: "
            f"{tensors['norm_ratio_control'][last].mean():.3f} of the norm, "
            f"cosine {tensors['cosine_control'][last].mean():.3f} with the difference"
        )
    labels: dict[str, list[Any]] = {"layer": index}
    limit = 0.0
    if concepts:
        stack = torch.stack([_per_layer(m, v, index) for v in concepts.values()], 1)  # [L, C, d]
        cosine = torch.cosine_similarity(mean[:, :, None], stack[:, None], dim=-1)  # [L, P, C]
        guesses = torch.randn(n_random, m.width, generator=generator)
        null = torch.cosine_similarity(mean[last].mean(0)[None], guesses, dim=-1)
        tensors |= {"cosine": cosine, "cosine_random": null}
        dims |= {"cosine": ("layer", "position", "concept"), "cosine_random": ("null",)}
        labels["concept"] = list(concepts)
        limit = null.abs().quantile(0.95).item()
        for c, concept in enumerate(concepts):
            for j, row in enumerate(rows):
                row[concept] = round(cosine[j, :, c].mean().item(), 4)
            line = f"cosine with {concept}: {rows[last][concept]:+.3f}"
            if control is not None:
                theirs = torch.cosine_similarity(
                    tensors["difference_control"], stack[:, c, None], dim=-1
                )
                line += f"; control adapter {theirs[last].mean():+.3f}"
            lines.append(f"{line}; control, random directions: |cosine| below {limit:.3f} in 95 %")
    return Result(
        title=f"what the adapter {name} adds, over {len(prompts)} texts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels=labels,
        rows=rows,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "layer",
            "panels": [
                ["norm_ratio", *(["norm_ratio_control"] if control is not None else [])],
                ["split_cosine", *(["cosine"] if concepts else [])],
            ],
            "units": ["norm / norm of the stream", "cosine"],
            "each": {"cosine": "concept"},
            "limits": {"cosine": limit} if concepts else {},
        },
        provenance=provenance(
            m,
            "difference",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layers=index,
            positions=str(positions),
            adapter=name,
            control=control,
        ),
    )


def _per_layer(m: Model, vector: Tensor, layers: Sequence[int]) -> Tensor:
    """A concept direction as [L, d], whether it was given once, for these layers, or for all."""
    vector = vector.float().cpu()
    if vector.shape == (m.width,):
        return vector.expand(len(layers), -1)
    if vector.shape == (len(layers), m.width):
        return vector
    if vector.shape == (m.n_layers, m.width):
        return vector[list(layers)]
    raise TextError(
        f"a concept direction has shape {tuple(vector.shape)}: give [{m.width}] or "
        f"[{len(layers)}, {m.width}]"
    )


def _mean_difference(x: Tensor, y: Tensor) -> Tensor:
    """[L, d] from x [L, N, d] and labels y [N]."""
    return x[:, y].mean(1) - x[:, ~y].mean(1)


def _halves(y: Tensor, paired: bool, generator: torch.Generator) -> Tensor:
    """Half of each class, at random: a mask [N]. Pairs (i, i + N/2) stay in one half."""
    half = torch.zeros(len(y), dtype=torch.bool)
    if paired:
        pairs = len(y) // 2
        picked = torch.randperm(pairs, generator=generator)[: pairs // 2]
        half[picked] = half[picked + pairs] = True
        return half
    for label in (True, False):
        members = (y == label).nonzero()[:, 0]
        picked = members[torch.randperm(len(members), generator=generator)]
        half[picked[: len(members) // 2]] = True
    return half


def _shuffle(y: Tensor, paired: bool, generator: torch.Generator) -> Tensor:
    """Labels at random: swapped within pairs, or else dealt anew."""
    if not paired:
        return y[torch.randperm(len(y), generator=generator)]
    swap = torch.rand(len(y) // 2, generator=generator) < 0.5
    return y ^ torch.cat([swap, swap])


def _held_out(x: Tensor, y: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """AUROC [L] of each half's direction on the other half, averaged; cosine [L] of the two."""
    one = _mean_difference(x[:, half], y[half])
    two = _mean_difference(x[:, ~half], y[~half])
    a = _auroc(torch.einsum("lnd,ld->ln", x[:, ~half], one), y[~half])
    b = _auroc(torch.einsum("lnd,ld->ln", x[:, half], two), y[half])
    return (a + b) / 2, torch.cosine_similarity(one, two, dim=-1)


def _auroc(scores: Tensor, y: Tensor) -> Tensor:
    """AUROC [L] of scores [L, N]: how often a positive outranks a negative; a tie counts half."""
    gap = scores[:, y, None] - scores[:, None, ~y]  # [L, pos, neg]
    return ((gap > 0).float() + 0.5 * (gap == 0).float()).mean((1, 2))
