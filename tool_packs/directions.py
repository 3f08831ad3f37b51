"""Directions in the residual stream: of a concept, and of what an adapter changes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect, collect_tokens
from tool_packs.errors import TextError
from tool_packs.prompts import Position, Text, read, resolve
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.separation import auroc, class_means, fit, halves, shuffle
from tool_packs.sides import (
    computing,
    name_of,
    read_alike,
    recorded,
    refuse_other_shape,
    refuse_other_tokens,
    side_of,
    told,
)

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["difference", "direction"]

METHODS = ("mean", "pca", "pca-centred", "logistic", "lda")


def direction(
    m: Model,
    pos: Text,
    neg: Text,
    *,
    method: str = "mean",
    layers: Layers = "all",
    position: Position = "last",
    seed: int = 0,
    n_null: int = 50,
) -> Result:
    """Which direction separates two sets of texts, and does it hold on texts it was not made from?

    Its AUROC is held out: made from one half of the texts, scored on the other, both ways. Two
    nulls stand beside it: shuffled labels, which go through the same method, and random directions.

    A persona vector is method="mean" with position="response": chats that end with an answer of the
    assistant, answers that show the trait in pos, answers to the same questions that do not in neg.

    Args:
        pos: texts or chats that have the property; several positions of one text are averaged.
        neg: texts or chats that lack it; where there are as many as in pos, text i of one is the
            partner of text i of the other: partners stay in one half and swap labels in the null.
        method: "mean" (difference of means: contrastive activation addition), "pca" (first
            principal component of the differences of partners, counted from zero, as in
            representation engineering), "pca-centred" (their mean is taken away first, as repeng's
            pca_diff does: finds how the differences vary, not what they share), "logistic"
            (logistic regression, L2), "lda" (difference of means over the within-class
            covariance, shrunk by a tenth).
        layers: as in `capture`.
        position: as in `capture`.
        seed: of the halves and of both nulls.
        n_null: shuffles, and random directions.

    Returns:
        Result: direction [layer, d] (units of the residual stream, not normalised: adding it with
        strength 1 moves the mean of neg to the mean of pos, or with a method other than "mean" as
        far along the direction as the means are apart), auroc [layer] (held out),
        split_cosine [layer] (directions of the two halves), auroc_shuffled [layer, null],
        auroc_random [layer, null], resid_norm [layer]; rows layer, auroc, shuffled_95, p,
        split_cosine, norm_ratio. `r.rows` sorted by layer; p counts the shuffles whose best layer
        is at least as good as this one, so that choosing the best layer is paid for.

    Raises:
        TextError: fewer than 4 texts on a side, as halves need two each; a method that does not
        exist; pca without partners; activations that are NaN or infinite.

    Use when:
        You want a concept vector to steer with, to compare, or to read on other texts.

    Not when:
        The texts of the two sides differ in more than the concept: the direction will hold that.
        "pca-centred" where all pairs differ alike: what they share has been taken away.

    Cost:
        one forward pass over all texts; the nulls are matrix products, and one small solve each
        with "logistic", "lda" and "pca-centred".

    Controls:
        shuffled labels and random directions, both on by default; held-out halves.

    Paper:
        arXiv 2312.06681 (CAA), 2310.01405 (RepE), 2507.21509 (persona vectors), 2306.03341 (ITI)

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
    if method not in METHODS:
        raise TextError(f"no method is called {method!r}: {', '.join(METHODS)}")
    paired = len(one) == len(two)
    if method.startswith("pca") and not paired:
        raise TextError(
            f"{len(one)} and {len(two)} texts: {method} needs partners, text i of pos and text i "
            "of neg; give as many on both sides, or method='mean'"
        )
    index = m.layer_indices(layers)
    prompts = one + two
    x = collect_tokens(m, prompts, index, position).nanmean(2)  # [L, N, d]
    y = torch.tensor([True] * len(one) + [False] * len(two))
    generator = torch.Generator().manual_seed(seed)
    vector = _directions(method, x, y[None])[0]  # [L, d]
    half = halves(y, paired, generator)
    groups = torch.arange(len(y)) % len(one) if paired else torch.arange(len(y))
    labels = [y, *(shuffle(y, groups, half, generator) for _ in range(n_null))]
    held_out, cosines = _held_out(method, x, torch.stack(labels), half)  # [1 + null, L]
    auc, cosine, null = held_out[0], cosines[0], held_out[1:].T  # null [L, null]
    random = []
    for _ in range(n_null):
        guess = torch.randn(len(index), m.width, generator=generator)
        a = auroc(torch.einsum("lnd,ld->ln", x, guess), y)
        random.append(torch.maximum(a, 1 - a))  # a random direction may point either way
    random_null = torch.stack(random, 1)
    best_null = null.max(0).values  # the best layer of each shuffle
    p = (1 + (best_null[None] >= auc[:, None]).sum(1)) / (1 + n_null)  # [L]
    norm = x.norm(dim=-1).mean(1)  # [L]
    rows = [
        {
            "layer": layer,
            "auroc": round(auc[j].item(), 4),
            "shuffled_95": round(null[j].quantile(0.95).item(), 4),
            "random_95": round(random_null[j].quantile(0.95).item(), 4),
            "p": round(p[j].item(), 4),
            "split_cosine": round(cosine[j].item(), 4),
            "norm_ratio": round((vector[j].norm() / norm[j]).item(), 4),
        }
        for j, layer in enumerate(index)
    ]
    best = max(range(len(index)), key=lambda j: auc[j].item())
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
        title=f"direction ({method}) of {len(one)} against {len(two)} texts",
        tensors=to_cpu(
            {
                "direction": vector,
                "auroc": auc,
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
            method=method,
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
    control: str | Model | None = None,
    tuned: Model | None = None,
    concepts: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    n_random: int = 200,
) -> Result:
    """What does an adapter, or a fine-tuned model, add to the residual stream on unrelated texts?

    The mean over texts of activations with the adapter on minus off (activation difference lens).
    One set of weights computes both; with tuned= two models that were loaded apart do.

    Args:
        text: plain texts or chats; unrelated to what the adapter may have learned works best.
        layers: as in `capture`.
        positions: as in `capture`; texts shorter than the span are an error.
        adapter: which adapter; None: the active one.
        control: a further adapter (or model), trained alike but without the property.
        tuned: in place of an adapter: a whole model of the same shape and tokenizer, `m` being its
            base.
        concepts: directions by name, [d] or [layer, d], to compare the difference with.
        seed: of the halves and of the random directions.
        n_random: random directions, for the range of a cosine.

    Returns:
        Result: difference [layer, position, d], norm_ratio [layer, position] (its norm over the
        mean norm of the residual stream), resid_norm [layer, position] (that mean norm, without the
        adapter), split_cosine [layer, position] (between the means of two halves of the texts);
        with control= difference_control and norm_ratio_control of the same
        shapes; with concepts= cosine [layer, position, concept] and cosine_random [null];
        rows layer, norm_ratio, split_cosine, and a column for each concept.

    Raises:
        ModelError: no adapter is loaded, or none of that name; two models of other shapes or
            tokenizers.
        TextError: a layer or position that does not exist here, fewer than 2 texts, or a text that
            two models read as different tokens.

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
    side = side_of(m, adapter, tuned)
    sides = [side] + ([control] if control is not None else [])
    for other in sides:
        if not isinstance(other, str):
            refuse_other_shape(m, other)
            refuse_other_tokens(m, other)
    name = name_of(side)
    prompts = read_alike(m, text, sides)
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

    def minus_base(which: str | Model) -> Tensor:
        with computing(m, which) as other:
            return collect(other, prompts, index, where)["resid_post"] - off

    change = minus_base(side)
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
            f"control adapter {name_of(control)}: "
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
        title=f"what {told(side)} adds, over {len(prompts)} texts",
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
            control=None if control is None else name_of(control),
            tuned=recorded(tuned),
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


def _directions(method: str, x: Tensor, y: Tensor) -> Tensor:
    """[S, L, d] from x [L, n, d] and labels y [S, n], as long as the means are apart along it."""
    weight = fit(method, x, y).weight
    if method == "mean":
        return weight
    unit = torch.nn.functional.normalize(weight, dim=-1)
    gap, _ = class_means(x, y)
    return unit * (unit * gap).sum(-1, keepdim=True)


def _held_out(method: str, x: Tensor, y: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """For labels y [S, N]: AUROC [S, L] of each half's direction on the other half, averaged, and
    the cosine [S, L] of the two directions."""
    one = _directions(method, x[:, half], y[:, half])
    two = _directions(method, x[:, ~half], y[:, ~half])
    a = auroc(torch.einsum("lnd,sld->sln", x[:, ~half], one), y[:, None, ~half])
    b = auroc(torch.einsum("lnd,sld->sln", x[:, half], two), y[:, None, half])
    return (a + b) / 2, torch.cosine_similarity(one, two, dim=-1)
