"""Remove a direction from the weights: from every matrix that writes into the residual stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tool_packs.engine import fitting, removing
from tool_packs.errors import ModelError, TextError
from tool_packs.structure import device_of, first_tensor, require_numbers, weight_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["orthogonalised"]

Directions = Tensor | Sequence[Tensor]


@contextlib.contextmanager
def orthogonalised(m: Model, direction: Directions) -> Iterator[Model]:
    """What does the model do when its weights can no longer write this direction?

    Each matrix W that writes into the residual stream (token and position embeddings, attention and
    MLP outputs, their biases) becomes W - r r^T W. The unembedding stays as it is, also where it is
    tied to the embedding. Afterwards the very parameters of before are back, whatever happened
    inside. Adapters: the base's matrices and the B of every loaded LoRA are edited, so that
    `m.base()` and `m.adapter(...)` inside are orthogonalised as well. Where a norm stands between
    the matrices and the stream (Gemma 2 and 3, OLMo 2), the edit is made for what comes out of the
    norm: the direction is gone exactly, and the norm's scale is that of what is left.

    Args:
        direction: [d], or a list of such to remove the space that they span.

    Returns:
        a context manager that gives m.

    Raises:
        TextError: a direction that does not fit this model, or is zero or not finite.
        ModelError: quantised weights, or something writes to the stream that is no matrix here
            (experts, DoRA): `ablating` removes the direction there.

    Use when:
        You want the edited model itself: to save with `m.hf.save_pretrained`, to run at full speed.

    Not when:
        You want to compare conditions with controls (`ablate`), or only some layers (`ablating`).

    Cost:
        a copy of the matrices that are edited, about a third of the weights; no cost a token.

    Controls:
        None of its own: repeat with a random direction. Four tokens check that nothing is left.

    Paper:
        arXiv 2406.11717

    Example:
        from tool_packs.orthogonal import orthogonalised
        from tool_packs.generation import generate
        v = m.embed(torch.tensor([9]))[0]
        with orthogonalised(m, v):
            r = generate(m, ["Who are you?"], max_new_tokens=4)
    """
    rows = basis(m, direction)  # [k, d]
    changes = [*_embeddings(m, rows), *_outputs(m, rows)]
    fingerprints = m._fingerprints
    with contextlib.ExitStack() as back:
        back.callback(setattr, m, "_fingerprints", fingerprints)
        m._fingerprints = {}  # within, results name the edited weights
        for change in changes:
            before = change.owner._parameters[change.name]
            back.callback(change.owner._parameters.__setitem__, change.name, before)
            edited = nn.Parameter(change.value, requires_grad=before.requires_grad)
            change.owner._parameters[change.name] = edited
        _refuse_rest(m, rows)
        yield m


def basis(m: Model, direction: Directions) -> Tensor:
    """Orthonormal rows [k, d] that span the directions given.

    Raises:
        TextError: a direction of another shape, zero, not finite, or one that the others span.
    """
    given = list(direction) if isinstance(direction, (list, tuple)) else [direction]
    if not given:
        raise TextError(f"no direction: give [{m.width}], or a list of such")
    vectors = [torch.as_tensor(v).detach().double().cpu() for v in given]
    for v in vectors:
        if v.shape != (m.width,):
            raise TextError(
                f"a direction has shape {tuple(v.shape)}: give [{m.width}] (one row of a "
                "[layer, d]), or a list of such to remove all of them"
            )
        if (bad := int((~v.isfinite()).sum())) > 0:
            raise TextError(f"a direction has {bad} of {m.width} values that are not finite")
        if v.norm() == 0:
            raise TextError("a direction of norm 0 points nowhere")
    units = torch.stack([v / v.norm() for v in vectors], 1)  # [d, k]
    q, r = torch.linalg.qr(units)
    if q.shape[1] < len(given) or r.diagonal().abs().min() < 1e-5:
        raise TextError(f"the {len(given)} directions span fewer dimensions: leave some out")
    return q.T.float()


@dataclass
class _Change:
    """A parameter of a module, and what it becomes."""

    owner: nn.Module
    name: str
    value: Tensor


def _without(weight: Tensor, rows: Tensor, axis: int, gain: Tensor | None = None) -> Tensor:
    """The weight whose vectors along `axis` have lost their part in the span of rows [k, d].

    With a gain g [d], g * vector has lost it.
    """
    if not weight.is_floating_point() or weight.is_meta:
        raise ModelError(
            f"a weight of type {weight.dtype} on {weight.device} cannot be edited: load the model "
            "without quantization or offloading, or use ablating(m, direction)"
        )
    precise = torch.promote_types(weight.dtype, torch.float32)
    w = weight.detach().to(precise).movedim(axis, -1)  # [..., d]
    r = rows.to(w.device, precise)
    g = torch.ones_like(w[(0,) * (w.ndim - 1)]) if gain is None else gain.to(w.device, precise)
    w = w - ((w * g) @ r.T) @ r / g
    return w.movedim(-1, axis).to(weight.dtype).contiguous()


def _embeddings(m: Model, rows: Tensor) -> Iterator[_Change]:
    """What is put into the stream before the first layer: tokens, and positions where learned."""
    s = m.structure
    inside = {id(x) for layer in s.layers for x in layer.modules()}
    for module in s.backbone.modules():
        if id(module) in inside or module is s.unembedding:
            continue
        if isinstance(module, nn.Embedding) and module.weight.shape[-1] == m.width:
            yield _Change(module, "weight", _without(module.weight, rows, -1))
        for adapter in getattr(module, "lora_embedding_B", {}):  # each [d, rank]
            store = module.lora_embedding_B
            yield _Change(store, adapter, _without(store[adapter], rows, 0))


def _outputs(m: Model, rows: Tensor) -> Iterator[_Change]:
    """The matrices whose outputs the layers add to the stream, their biases and LoRAs."""
    for module, gain in _writers(m):
        matrix = _unwrapped(module)
        axis = 0 if isinstance(matrix, nn.Linear) else 1  # GPT-2's Conv1D has [in, out]
        yield _Change(matrix, "weight", _without(matrix.weight, rows, axis, gain))
        if matrix.bias is not None:
            yield _Change(matrix, "bias", _without(matrix.bias, rows, 0, gain))
        for lora in getattr(module, "lora_B", {}).values():  # each Linear, [d, rank]
            yield _Change(lora, "weight", _without(lora.weight, rows, 0, gain))
            if lora.bias is not None:
                yield _Change(lora, "bias", _without(lora.bias, rows, 0, gain))


@torch.no_grad()
def _writers(m: Model) -> list[tuple[nn.Module, Tensor | None]]:
    """(matrix, gain of the norm behind it or None): attention's and MLP's of every layer.

    Found by running four tokens: the matrix whose output is what is added, to the last bit.
    """
    s = m.structure
    seen: dict[int, Tensor] = {}
    inputs: dict[int, Tensor] = {}

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen[id(module)] = first_tensor(output)
        if args and isinstance(args[0], Tensor):
            inputs[id(module)] = args[0]

    with removing([]) as handles:
        for layer in s.layers:
            parts = [x for x in layer.modules() if _unwrapped(x) is not None]
            handles.extend(x.register_forward_hook(see) for x in parts)
        parts = [x for x in (*s.attn_out, *s.mlp_out) if x is not None]
        handles.extend(x.register_forward_hook(see) for x in parts if _unwrapped(x) is None)
        with fitting(m, 1, 4):
            out = s.backbone(input_ids=_four_tokens(m), use_cache=False)
    require_numbers(m.core, out.last_hidden_state)
    found = []
    for i, layer in enumerate(s.layers):
        for name, part in (("attention", s.attn_out[i]), ("MLP", s.mlp_out[i])):
            matrices = [x for x in layer.modules() if _unwrapped(x) is not None and id(x) in seen]
            mine = _whose(seen.get(id(part)), matrices, seen)
            if mine is not None:
                found.append((mine, None))
                continue
            mine = _whose(inputs.get(id(part)), matrices, seen)
            gain = None if mine is None or part is None else _gain(part, m.width)
            if mine is None or gain is None:
                raise ModelError(
                    f"the matrix by which the {name} of layer {i} writes to the stream was not "
                    f"found in {type(layer).__name__} (experts have several): "
                    "ablating(m, direction) removes the direction there"
                )
            found.append((mine, gain))
    return found


def _whose(
    output: Tensor | None, matrices: list[nn.Module], seen: dict[int, Tensor]
) -> nn.Module | None:
    if output is None:
        return None
    return next((x for x in matrices if torch.equal(seen[id(x)], output)), None)


def _unwrapped(module: nn.Module) -> nn.Module | None:
    """The matrix under the wrappers of PEFT, None where there is none."""
    from transformers.pytorch_utils import Conv1D

    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module if isinstance(module, (nn.Linear, Conv1D)) else None


def _gain(norm: nn.Module, width: int) -> Tensor | None:
    """g [d] of a norm that gives g * x / rms(x), None where this norm does something else."""
    weight = next(norm.parameters(), None)
    if weight is None:
        return None
    x = torch.randn(width, generator=torch.Generator().manual_seed(0)).sign()  # rms 1
    x = x.to(device_of(norm), weight.dtype)
    y = torch.ones_like(x)
    y[: width // 2] *= -3
    y = y / y.float().square().mean().sqrt().to(y.dtype)
    gain, other = (norm(v[None, None])[0, 0].float() / v.float() for v in (x, y))
    close = torch.allclose(gain, other, rtol=2e-2 if weight.dtype != torch.float32 else 1e-3)
    return gain if close and gain.abs().min() > 1e-6 else None


def _four_tokens(m: Model) -> Tensor:
    vocabulary = weight_of(m.structure.embedding).shape[0]
    return (torch.arange(4, device=m.device) + vocabulary // 3)[None] % vocabulary  # [1, 4]


@torch.no_grad()
def _refuse_rest(m: Model, rows: Tensor) -> None:
    """Raises ModelError where the stream still has a part along the rows [k, d]."""
    limit = 1e-4 if m.dtype == torch.float32 else 3e-2
    left: dict[int, float] = {}

    def see(i: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            h = first_tensor(output).float()
            part = (h @ rows.to(h.device).T).norm(dim=-1) / h.norm(dim=-1)
            left[i] = max(left.get(i, 0.0), part.max().item())

        return hook

    for adapter in (None, *m.adapters):
        with m.adapter(adapter), removing([]) as handles:
            handles.extend(x.register_forward_hook(see(i)) for i, x in enumerate(m.layers))
            with fitting(m, 1, 4):
                m.structure.backbone(input_ids=_four_tokens(m), use_cache=False)
        if (worst := max(left.values())) > limit:
            layer = max(left, key=lambda i: left[i])
            raise ModelError(
                f"after the edit {worst:.1%} of the stream still points along the direction after "
                f"layer {layer}{f' with adapter {adapter}' if adapter else ''}: something else "
                "writes to it. ablating(m, direction) removes it there"
            )
