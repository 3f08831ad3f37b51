"""Read what a state is disposed to make the model say, later tokens included: the Jacobian lens."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tool_packs.activations import Layers
from tool_packs.engine import Steer, _Stop, removing, sparing
from tool_packs.errors import ModelError, TextError
from tool_packs.logit_lens import lens_grid
from tool_packs.prompts import Position, Text, read
from tool_packs.result import Result, provenance, to_cpu
from tool_packs.structure import first_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tool_packs.models import Model

__all__ = ["fit_jacobian_lens", "jacobian_lens"]


def fit_jacobian_lens(
    m: Model,
    text: Text,
    layers: Layers = "all",
    *,
    skip: int = 16,
    max_tokens: int = 128,
    rows: int = 16,
) -> Result:
    """How do the final states move, here and at later tokens, when a layer's state moves?

    For each prompt the Jacobian of the last layer's residual stream with respect to layer l's: the
    effects on all positions t' >= t are summed, the source positions t are averaged, prompts count
    alike. The first `skip` positions (attention sinks) and the last one are neither source nor
    target. The last layer has no matrix: its Jacobian is the identity.

    Args:
        text: texts to average over; about 100 of 128 tokens are enough for a usable lens.
        layers: which layers to fit; "all" are all but the last.
        skip: leading positions left out.
        max_tokens: longer prompts are cut here.
        rows: output dimensions of one backward pass; each is a copy of the prompt in memory.

    Returns:
        Result: jacobian [layer, d, d], to be multiplied with a state from the left (J @ h);
        split_half [layer], the cosine between the mean matrices of the even and of the odd prompts
        (nan with one prompt); from_identity [layer], |J - 1| / |1|. Save it with
        `.save(folder)`, read it with `Result.load(folder)`.

    Raises:
        TextError: no prompt is longer than skip + 1 tokens; a layer that does not exist here.
        ModelError: weights or activations that have no gradient.

    Use when:
        Early and middle layers say nothing through the logit lens, or you want directions of
        words for an intervention there.

    Not when:
        You want the best guess at the next token from a layer: that is a tuned lens. This one
        spreads over what is said later, and may guess the next token worse than the logit lens.

    Cost:
        one forward pass and ceil(d / rows) backward passes a prompt, each over `rows` copies.

    Controls:
        the agreement of two halves of the prompts, on by default; the plain logit lens beside
        every reading.

    Paper:
        Gurnee et al. 2026 (Transformer Circuits, n/a on arXiv)

    Example:
        from tool_packs.jacobian_lens import fit_jacobian_lens, jacobian_lens
        lens = fit_jacobian_lens(m, ["the cat sat on the mat", "she is in the house"], skip=1)
        r = jacobian_lens(m, lens, "the cat sat on the", track=["mat"])
        r.rows[0]
    """
    started = time.perf_counter()
    index = fitted_layers(m, layers)
    if rows < 1 or skip < 0 or max_tokens < skip + 2:
        raise TextError(
            f"rows={rows}, skip={skip}, max_tokens={max_tokens}: rows is at least 1, "
            "skip at least 0, and max_tokens at least skip + 2"
        )
    prompts = read(m, text)
    usable = [p.ids[:max_tokens] for p in prompts if min(len(p), max_tokens) > skip + 1]
    if not usable:
        longest = max(len(p) for p in prompts)
        raise TextError(
            f"the longest text has {longest} tokens; skip={skip} leaves out the first {skip} and "
            f"the last one: give texts of at least {skip + 2} tokens, or a smaller skip"
        )
    halves = [torch.zeros(len(index), m.width, m.width) for _ in range(2)]
    with frozen(m):
        for i, ids in enumerate(progress(usable)):
            copies = min(rows, m.width)
            what = f"{copies} copies of a text of {len(ids)} tokens and their gradients"
            with sparing(m.device, what, f"lower rows (now {rows}) or max_tokens"):
                halves[i % 2] += _jacobian(m, ids, index, skip, copies)
    mean = (halves[0] + halves[1]) / len(usable)  # [L, d, d]
    agreement = torch.cosine_similarity(halves[0].flatten(1), halves[1].flatten(1), dim=-1)
    if len(usable) == 1:
        agreement = torch.full_like(agreement, float("nan"))
    identity = torch.eye(m.width)
    distance = (mean - identity).flatten(1).norm(dim=-1) / identity.norm()
    table = [
        {
            "layer": layer,
            "split_half": round(agreement[j].item(), 4),
            "from_identity": round(distance[j].item(), 4),
        }
        for j, layer in enumerate(index)
    ]
    shown = sorted({0, len(index) // 2, len(index) - 1})
    lines = [
        f"averaged over {len(usable)} prompts"
        + (f"; {left} too short to use" if (left := len(prompts) - len(usable)) else ""),
        "distance from the identity (0: the logit lens): "
        + ", ".join(f"layer {index[j]} {distance[j]:.3g}" for j in shown),
        "control, cosine between the halves of the prompts: "
        + ", ".join(f"layer {index[j]} {agreement[j]:.3f}" for j in shown),
    ]
    return Result(
        title=f"Jacobian lens of {len(index)} layers",
        tensors=to_cpu({"jacobian": mean, "split_half": agreement, "from_identity": distance}),
        dims={
            "jacobian": ("layer", "d_out", "d_in"),
            "split_half": ("layer",),
            "from_identity": ("layer",),
        },
        labels={"layer": index},
        rows=table,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "layer",
            "panels": [["from_identity"], ["split_half"]],
            "units": ["|J - 1| / |1|", "cosine"],
        },
        provenance=provenance(
            m,
            "fit_jacobian_lens",
            started,
            prompts=usable,
            layers=index,
            skip=skip,
            max_tokens=max_tokens,
            width=m.width,
        ),
    )


def jacobian_lens(
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
    """What is a layer's state disposed to make the model say, now or later?

    Each state is carried to the last layer by the mean Jacobian, then read like `logit_lens`: J @ h
    through the model's own final norm, unembedding, scale and softcap. At the last layer this is
    the model's own prediction, exactly.

    Args:
        lens: what `fit_jacobian_lens` returned, or Result.load of a saved one.
        text: as in `logit_lens`.
        layers: as in `logit_lens`, of those that were fitted and the last; "all" are these.
        positions: as in `logit_lens`.
        k: as in `logit_lens`.
        track: as in `logit_lens`.
        n_random: as in `logit_lens`; the random states are carried too.
        seed: of the random states.
        steer: as in `generate`.

    Returns:
        Result: as `logit_lens`, and kl, kl_logit [prompt, layer, position]: nats from the model's
        own prediction of this lens and of the plain logit lens.

    Raises:
        ModelError: a lens of a model of another width, or another Result.
        TextError: a layer that was not fitted; a position that does not exist here.

    Use when:
        You ask which words a middle layer holds that are said only later, or never.

    Not when:
        The lens was fitted on few or unlike texts: look at its split_half first.

    Cost:
        one forward pass, and layers * positions * (d * d + 3 * vocabulary * d).

    Controls:
        the plain logit lens of the same states, and tracked words ranked on random states, on by
        default.

    Paper:
        Gurnee et al. 2026 (Transformer Circuits, n/a on arXiv)

    Example:
        from tool_packs.jacobian_lens import fit_jacobian_lens, jacobian_lens
        lens = fit_jacobian_lens(m, "the cat sat on the mat and the dog", skip=2)
        r = jacobian_lens(m, lens, "the cat sat on the", layers=[0, -1], positions="last")
        r["kl"], r["kl_logit"]
    """
    matrices = matrices_of(m, lens)
    chosen = sorted({*matrices, m.n_layers - 1}) if is_all(layers) else m.layer_indices(layers)
    for layer in chosen:
        matrix_at(m, matrices, layer)

    def carry(h: Tensor, layer: int) -> Tensor:
        return h if layer == m.n_layers - 1 else h @ matrices[layer].T

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
        technique="jacobian_lens",
        carry=carry,
        lens=lens,
    )


# Fitting


def fitted_layers(m: Model, layers: Layers) -> list[int]:
    last = m.n_layers - 1
    if is_all(layers):
        if last == 0:
            raise TextError(f"{m.name} has one layer, which needs no lens")
        return list(range(last))
    index = sorted(set(m.layer_indices(layers)))
    if index[-1] == last:
        raise TextError(f"layer {last} is the last: its Jacobian is the identity; leave it out")
    return index


def is_all(layers: Layers) -> bool:
    return isinstance(layers, str) and layers == "all"


@contextlib.contextmanager
def frozen(m: Model) -> Iterator[None]:
    """Within this no weight has a gradient, so that the graph begins at the first layer asked for."""
    learning = [p for p in m.hf.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _jacobian(m: Model, ids: Sequence[int], layers: Sequence[int], skip: int, rows: int) -> Tensor:
    """Mean Jacobian [L, d, d] of one prompt: a row a dimension, a copy of the prompt a row."""
    seen: dict[int, Tensor] = {}
    last = m.n_layers - 1

    def source(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = first_tensor(output)
            if layer == layers[0]:  # the graph begins here
                h = h.detach().requires_grad_()
            seen[layer] = h  # [rows, T, d]
            if layer == last:
                raise _Stop
            return h if isinstance(output, Tensor) else (h, *output[1:])

        return hook

    tokens = torch.tensor(ids, device=m.device).expand(rows, -1)
    with torch.enable_grad(), removing([]) as handles:
        for layer in (*layers, last):
            handles.append(m.layers[layer].register_forward_hook(source(layer)))
        with contextlib.suppress(_Stop):
            m.structure.backbone(input_ids=tokens, use_cache=False)
    target = seen[last]
    if not target.requires_grad:
        raise ModelError(
            f"{m.name}: the last layer has no gradient with respect to layer {layers[0]}"
        )
    if not target.isfinite().all():
        raise ModelError(f"{m.name}: states of the last layer are not finite: try dtype='float32'")
    out = torch.zeros(len(layers), m.width, m.width)
    for start in range(0, m.width, rows):
        count = min(rows, m.width - start)
        # At every position at once: the gradient at t is the sum over t' >= t, for the model is
        # causal.
        cotangent = torch.zeros_like(target)
        cotangent[:count, skip:-1, start : start + count] = torch.eye(count)[:, None].to(target)
        gradients = torch.autograd.grad(
            target,
            [seen[layer] for layer in layers],
            cotangent,
            retain_graph=start + rows < m.width,
        )
        for j, gradient in enumerate(gradients):
            out[j, start : start + count] = gradient[:count, skip:-1].float().mean(1).cpu()
    return out


def progress(items: Sequence[Any], what: str = "Jacobian lens") -> Any:
    from tqdm.auto import tqdm

    return tqdm(items, desc=what, leave=False)


# Using a lens


def matrices_of(m: Model, lens: Result) -> dict[int, Tensor]:
    """The matrix of each fitted layer."""
    if not isinstance(lens, Result) or "jacobian" not in lens.tensors:
        raise ModelError(f"{lens!r:.60} is no Jacobian lens: give what fit_jacobian_lens returned")
    matrices = lens["jacobian"]
    deepest = max(lens.labels["layer"])
    if matrices.shape[-1] != m.width or deepest >= m.n_layers:
        raise ModelError(
            f"the lens is of width {matrices.shape[-1]} and reaches layer {deepest}; {m.name} has "
            f"width {m.width} and {m.n_layers} layers: fit one on it"
        )
    return dict(zip(lens.labels["layer"], matrices, strict=True))


def matrix_at(m: Model, matrices: dict[int, Tensor], layer: int) -> Tensor:
    if layer == m.n_layers - 1:
        return torch.eye(m.width)
    if layer not in matrices:
        known = ", ".join(map(str, matrices))
        raise TextError(f"layer {layer} was not fitted; fitted: {known}, and the last needs no fit")
    return matrices[layer]
