"""Read what a state already lets the model predict, by a map trained for each layer: the tuned lens."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect
from tool_packs.engine import Steer, sparing
from tool_packs.errors import ModelError, TextError
from tool_packs.jacobian_lens import fitted_layers, frozen, is_all, progress
from tool_packs.logit_lens import CHUNK, divergence, lens_grid, refuse_inexact
from tool_packs.prompts import Position, Prompt, Text, read
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["train_tuned_lens", "tuned_lens"]


def train_tuned_lens(
    m: Model,
    text: Text,
    layers: Layers = "all",
    *,
    steps: int = 250,
    batch: int = 512,
    lr: float | None = None,
    weight_decay: float = 1e-3,
    held_out: float = 0.2,
    skip: int = 1,
    max_tokens: int = 256,
    seed: int = 0,
) -> Result:
    """How much of the final prediction can be read from each layer by an affine map?

    For each layer a matrix and a bias, h + A h + b, are trained so that the model's own final norm
    and unembedding say what the whole model says: the loss is the KL divergence from the final
    prediction (softcap and scale included) to the lens'. Both begin at zero, where the tuned lens
    is the logit lens. Adam, the rate falling to zero; the model's weights do not change. An adapter
    that is on is part of the model; `with m.base():` trains on the base.

    Args:
        text: texts to train on; some hundred, like those that will be read.
        layers: which layers; "all" are all but the last, which needs none.
        steps: optimiser steps; 0 leaves the logit lens.
        batch: tokens of a step.
        lr: learning rate at the beginning; None: 0.4 / d, for a step of Adam moves every entry of a
            row of d.
        weight_decay: pulls A and b to zero, the logit lens.
        held_out: share of the texts that is kept out of training, and measured on.
        skip: leading tokens of each text left out (BOS has a state like no other).
        max_tokens: longer texts are cut here.
        seed: of the split and of the batches.

    Returns:
        Result: weight [layer, d, d] (A), bias [layer, d]; in nats on the held-out texts kl [layer],
        kl_logit [layer] of the plain logit lens and kl_constant [1] of always saying the mean
        prediction of the training texts; kl_train [layer] of the trained maps on training tokens;
        loss [step, layer].
        Rows: layer and these. Save with `.save(folder)`, read with `Result.load(folder)`.

    Raises:
        TextError: fewer than two texts longer than skip; the last layer; a state that is NaN.
        ModelError: the model's logits are not unembed(norm(x)).

    Use when:
        You ask how early a prediction is there, and the logit lens' basis drifts in early layers.

    Not when:
        You ask what the model *would* say at a layer: a trained map can find what the model never
        uses.

    Cost:
        one forward pass, then steps * batch * (1 + 3 * layers) * vocabulary * d.

    Controls:
        held-out loss of the logit lens and of a constant prediction, on by default.

    Paper:
        arXiv 2303.08112

    Example:
        from tool_packs.tuned_lens import train_tuned_lens, tuned_lens
        lens = train_tuned_lens(m, ["the cat sat on the mat", "the dog is here"], steps=5)
        r = tuned_lens(m, lens, "the cat sat on the", track=["mat"])
        lens.rows[0], r["kl"], r["kl_logit"]
    """
    started = time.perf_counter()
    refuse_inexact(m)
    index = fitted_layers(m, layers)
    lr = 0.4 / m.width if lr is None else lr
    _refuse_settings(steps, batch, held_out, skip, max_tokens)
    prompts = [Prompt(p.ids[:max_tokens], p.text) for p in read(m, text)]
    usable = [p for p in prompts if len(p) > skip]
    if len(usable) < 2:
        raise TextError(
            f"{len(usable)} of {len(prompts)} texts are longer than skip={skip} tokens: give at "
            "least two, one to train on and one to measure on"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(usable), generator=generator).tolist()
    kept = min(len(usable) - 1, max(1, round(held_out * len(usable))))
    x_test, own_test = _states(m, [usable[i] for i in order[:kept]], index, skip)
    x, own = _states(m, [usable[i] for i in order[kept:]], index, skip)  # [X, L, d], [X, d]
    step = f"a step of {batch} tokens over {len(index)} layers"
    with frozen(m), sparing(m.device, step, f"lower batch (now {batch}) or give fewer layers"):
        weight, bias, losses = _train(m, x, own, steps, batch, lr, weight_decay, generator)
    some = torch.randperm(len(x), generator=generator)[: len(x_test)]
    tensors = {
        "weight": weight,
        "bias": bias,
        "kl": _losses(m, x_test, own_test, weight, bias),
        "kl_logit": _losses(m, x_test, own_test, 0 * weight, 0 * bias),
        "kl_train": _losses(m, x[some], own[some], weight, bias),
        "kl_constant": _constant(m, own, own_test)[None],
        "loss": losses,
    }
    per_layer = ("kl", "kl_logit", "kl_train")
    table = [
        {"layer": layer, **{name: round(tensors[name][j].item(), 4) for name in per_layer}}
        for j, layer in enumerate(index)
    ]
    constant = tensors["kl_constant"].item()
    shown = sorted({0, len(index) // 2, len(index) - 1})
    lines = [
        f"trained on {len(x)} tokens of {len(usable) - kept} texts, measured on {len(x_test)} of "
        f"{kept} others; nats from the model's own prediction, in brackets the logit lens: "
        + ", ".join(
            f"layer {index[j]} {tensors['kl'][j]:.3g} ({tensors['kl_logit'][j]:.3g})" for j in shown
        ),
        f"control, the mean prediction whatever the state: {constant:.3g}",
        "on training tokens: "
        + ", ".join(f"layer {index[j]} {tensors['kl_train'][j]:.3g}" for j in shown),
    ]
    if worse := [index[j] for j in range(len(index)) if table[j]["kl"] > table[j]["kl_logit"]]:
        lines.append(f"worse than the logit lens at layers {worse}: more texts, or fewer steps")
    return Result(
        title=f"tuned lens of {len(index)} layers",
        tensors=to_cpu(tensors),
        dims={
            "weight": ("layer", "d_out", "d_in"),
            "bias": ("layer", "d"),
            "kl_constant": ("control",),
            "loss": ("step", "layer"),
            **dict.fromkeys(per_layer, ("layer",)),
        },
        labels={"layer": index},
        rows=table,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "layer",
            "lines": ["kl", "kl_logit", "kl_train"],
            "units": ["nats from the model's own prediction"],
        },
        provenance=provenance(
            m,
            "train_tuned_lens",
            started,
            prompts=[p.ids for p in usable],
            seed=seed,
            layers=index,
            steps=steps,
            batch=batch,
            lr=lr,
            weight_decay=weight_decay,
            held_out=held_out,
            skip=skip,
            max_tokens=max_tokens,
        ),
    )


def tuned_lens(
    m: Model,
    lens: Result,
    text: Text,
    *,
    layers: Layers = "all",
    positions: Position = "all",
    k: int = 5,
    track: Sequence[str] | Mapping[str, Sequence[str]] = (),
    n_random: int = 16,
    seed: int = 0,
    steer: Steer = None,
) -> Result:
    """What does a layer's state already let one predict of the model's answer?

    Each state goes through the layer's trained affine map, then is read like `logit_lens`. At the
    last layer this is the model's own prediction, exactly.

    Args:
        lens: what `train_tuned_lens` returned, or Result.load of a saved one.
        text: as in `logit_lens`.
        layers: as in `logit_lens`, of those that were trained and the last; "all" are these.
        positions: as in `logit_lens`.
        k: as in `logit_lens`.
        track: as in `logit_lens`.
        n_random: as in `logit_lens`; the random states go through the map too.
        seed: of the random states.
        steer: as in `generate`.

    Returns:
        Result: as `logit_lens`, and kl, kl_logit [prompt, layer, position]: nats from the model's
        own prediction of this lens and of the plain logit lens.

    Raises:
        ModelError: a lens of a model of another width, or another Result.
        TextError: a layer that was not trained; a position that does not exist here.

    Use when:
        You want the course of a prediction over the layers, least biased by their basis.

    Not when:
        The lens was trained on texts unlike these: see the kl of this call, not of the training.

    Cost:
        one forward pass, and layers * positions * (d * d + 3 * vocabulary * d).

    Controls:
        the plain logit lens of the same states, and tracked words ranked on random states, on by
        default; a lens trained on other weights (base and adapter) is said to be.

    Paper:
        arXiv 2303.08112

    Example:
        from tool_packs.tuned_lens import train_tuned_lens, tuned_lens
        lens = train_tuned_lens(m, ["the cat sat on the mat", "the dog is here"], steps=5)
        r = tuned_lens(m, lens, "the cat sat on the", positions="last")
        r.rows[0]["top"]
    """
    maps = _maps(m, lens)
    last = m.n_layers - 1
    chosen = sorted({*maps, last}) if is_all(layers) else m.layer_indices(layers)
    for layer in chosen:
        if layer != last and layer not in maps:
            known = ", ".join(map(str, maps))
            raise TextError(
                f"layer {layer} was not trained; trained: {known}, and the last needs no map"
            )

    def carry(h: Tensor, layer: int) -> Tensor:
        return h if layer == last else _apply(h, *maps[layer])

    return lens_grid(
        m,
        text,
        chosen,
        positions,
        k=k,
        track=track,
        n_random=n_random,
        seed=seed,
        steer=steer,
        technique="tuned_lens",
        carry=carry,
        lens=lens,
    )


def _refuse_settings(steps: int, batch: int, held_out: float, skip: int, max_tokens: int) -> None:
    if steps < 0 or batch < 1 or not 0 < held_out < 1 or skip < 0 or max_tokens <= skip:
        raise TextError(
            f"steps={steps}, batch={batch}, held_out={held_out}, skip={skip}, "
            f"max_tokens={max_tokens}: steps is at least 0, batch at least 1, held_out between 0 "
            "and 1, skip at least 0, and max_tokens more than skip"
        )


def _states(
    m: Model, prompts: Sequence[Prompt], index: Sequence[int], skip: int
) -> tuple[Tensor, Tensor]:
    """States of these layers [X, L, d], and of the last [X, d], at every token but the first."""
    where = [list(range(skip, len(p))) for p in prompts]
    h = collect(m, prompts, [*index, m.n_layers - 1], where)["resid_post"]  # [N, L + 1, P, d]
    there = torch.zeros(h.shape[0], h.shape[2], dtype=torch.bool)
    for i, w in enumerate(where):
        there[i, : len(w)] = True
    h = h.transpose(1, 2)[there]  # [X, L + 1, d]
    if not h.isfinite().all():
        raise TextError(
            "a state is NaN or infinite: look at the texts, or load the model with dtype='float32'"
        )
    return h[:, :-1], h[:, -1]


def _apply(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return h + h @ weight.T + bias


def _train(
    m: Model,
    x: Tensor,
    own: Tensor,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [L, d, d], bias [L, d] and the loss [step, L] of states x [X, L, d] to own [X, d]."""
    n, n_layers, d = x.shape
    x, own = x.to(m.device), own.to(m.device)
    weights = [torch.zeros(d, d, device=m.device, requires_grad=True) for _ in range(n_layers)]
    biases = [torch.zeros(d, device=m.device, requires_grad=True) for _ in range(n_layers)]
    optimiser = torch.optim.AdamW([*weights, *biases], lr=lr, weight_decay=weight_decay)
    losses = torch.zeros(steps, n_layers)
    rows = max(1, CHUNK // (8 * m.vocab_size))  # logits of one backward pass
    for step in progress(range(steps), "tuned lens"):
        for group in optimiser.param_groups:
            group["lr"] = lr * (1 - step / steps)
        picked = torch.randperm(n, generator=generator)[:batch].to(m.device)
        for part in picked.split(rows):
            with torch.no_grad():
                p = m.unembed(m.norm(own[part])).log_softmax(-1)  # [x, V]
            for j in range(n_layers):  # one by one: the logits of one layer are in memory
                with torch.enable_grad():
                    carried = _apply(x[part, j], weights[j], biases[j])
                    q = m.unembed(m.norm(carried)).log_softmax(-1)
                    loss = (p.exp() * (p - q)).sum() / len(picked)
                    loss.backward()
                losses[step, j] += loss.item()
        optimiser.step()
        optimiser.zero_grad()
    weight, bias = torch.stack(weights).detach().cpu(), torch.stack(biases).detach().cpu()
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise ModelError(f"the training went to NaN at lr={lr}: lower it, or use dtype='float32'")
    return weight, bias, losses


def _losses(m: Model, x: Tensor, own: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean divergence [L] of the lens from the model's own prediction."""
    carried = [_apply(x[:, j], weight[j], bias[j]) for j in range(x.shape[1])]
    return torch.stack([divergence(m, own, h).mean() for h in carried])


@torch.no_grad()
def _constant(m: Model, own: Tensor, own_test: Tensor) -> Tensor:
    """Mean divergence of the training tokens' mean prediction from those of the test tokens."""
    rows = max(1, CHUNK // (8 * m.vocab_size))
    total = sum(m.unembed(m.norm(h)).softmax(-1).double().sum(0) for h in own.split(rows))
    q = (total / len(own)).log()  # [V]
    found = []
    for h in own_test.split(rows):
        p = m.unembed(m.norm(h)).double().log_softmax(-1)
        found.append((p.exp() * (p - q)).sum(-1).float().cpu())
    return torch.cat(found).mean()


def _maps(m: Model, lens: Result) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight and bias of each trained layer."""
    if not isinstance(lens, Result) or not {"weight", "bias"} <= lens.tensors.keys():
        raise ModelError(f"{lens!r:.60} is no tuned lens: give what train_tuned_lens returned")
    index, width = lens.labels["layer"], lens["bias"].shape[-1]
    if width != m.width or max(index) >= m.n_layers - 1:
        raise ModelError(
            f"the lens is of width {width} and reaches layer {max(index)}; {m.name} has width "
            f"{m.width} and {m.n_layers} layers: train one on it"
        )
    return dict(zip(index, zip(lens["weight"], lens["bias"], strict=True), strict=True))
