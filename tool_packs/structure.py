"""Where the parts of a transformer are, found from its shapes and arithmetic, not by its name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tool_packs.errors import ModelError, StructureUnknown

__all__ = ["Structure"]


@dataclass
class Structure:
    """The parts of one causal language model, adapters included where PEFT put them."""

    core: nn.Module  # the *ForCausalLM
    backbone: nn.Module  # what holds the layers; its output is normed, not yet unembedded
    layers: list[nn.Module]
    layers_path: str
    embedding: nn.Module
    final_norm: nn.Module
    unembedding: nn.Module
    softcap: float | None  # tanh cap of the final logits
    logit_scale: float  # the final logits are multiplied by this
    width: int
    attention: list[nn.Module | None]
    mlp: list[nn.Module | None]
    attn_out: list[nn.Module | None]  # whose output is added to the residual stream
    mlp_out: list[nn.Module | None]
    heads: int
    head_dim: int
    kv_heads: int
    head_mix: list[nn.Module | None]  # its input is the heads' outputs side by side
    embed_scale: float = 1.0
    lens_error: float = float("nan")  # max |unembed(norm(last layer)) - logits| when it was checked
    tied: bool = False


def text_config(core: Any) -> Any:
    """The configuration of the language model, also inside a multimodal one."""
    return core.config.get_text_config(decoder=True)


def find_structure(
    core: nn.Module, *, layers: str | None = None, norm: str | None = None
) -> Structure:
    """Finds the parts of `core`, then runs four tokens through it to check them.

    Called once by load_model. `layers` and `norm` are dotted paths that override the search.

    Raises:
        StructureUnknown: with the line to write to get past it.
    """
    config = text_config(core)
    embedding = core.get_input_embeddings()
    unembedding = core.get_output_embeddings()
    if embedding is None or unembedding is None:
        raise StructureUnknown(
            f"{type(core).__name__} has no token embedding or no unembedding: "
            "it is not a causal language model, and the packs read those only"
        )
    path, blocks = _layers(core, embedding, config, layers)
    owner = path.rpartition(".")[0]
    backbone = core.get_submodule(owner)
    width = embedding.weight.shape[-1]
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    head_dim = int(getattr(config, "head_dim", None) or (width // heads if heads else 0))
    attention = [_child(block, ("attn", "attention")) for block in blocks]
    norms = _final_norms(core, backbone, path, width, norm)
    s = Structure(
        core=core,
        backbone=backbone,
        layers=blocks,
        layers_path=path,
        embedding=embedding,
        final_norm=norms[0],
        unembedding=unembedding,
        softcap=getattr(config, "final_logit_softcapping", None),
        logit_scale=_logit_scale(config),
        width=width,
        attention=attention,
        mlp=[_child(block, ("mlp", "moe", "feed_forward", "ffn")) for block in blocks],
        attn_out=[None] * len(blocks),
        mlp_out=[None] * len(blocks),
        heads=heads,
        head_dim=head_dim,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_mix=[_head_mix(a, heads * head_dim, width) if a else None for a in attention],
        tied=weight_of(unembedding) is weight_of(embedding),
    )
    _check(s, norms)
    return s


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a module, under the wrappers that PEFT puts around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module.weight


def device_of(module: nn.Module) -> torch.device:
    """Where the module computes, also where device_map keeps its weights elsewhere until it runs."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    weight = next(module.parameters())
    return torch.device(module._hf_hook.execution_device) if weight.is_meta else weight.device


def held(module: nn.Module) -> AbstractContextManager[Any]:
    """Within this the module's own weights have values, those too that device_map put on disk."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def copied(module: nn.Module) -> nn.Module:
    """A copy in float32 on the CPU, with its weights and without what device_map has put around it."""
    hook = getattr(module, "_hf_hook", None)
    with held(module):
        other = copy.deepcopy(module, {id(hook): None})  # the hook holds the weights of all others
    if hook is not None:
        for name in ("_hf_hook", "_old_forward", "forward"):
            vars(other).pop(name, None)
    return other.cpu().float()


def first_tensor(output: Any) -> Tensor:
    """A module's output where it is a tensor (transformers 5), else its first item."""
    return output if isinstance(output, Tensor) else output[0]


def _layers(
    core: nn.Module, embedding: nn.Module, config: Any, override: str | None
) -> tuple[str, list[nn.Module]]:
    lists = {
        p: mod for p, mod in core.named_modules() if isinstance(mod, nn.ModuleList) and len(mod)
    }
    if override is not None:
        if override not in lists:
            raise StructureUnknown(
                f"no list of layers at {override!r}; lists here: {_shown(lists)}"
            )
        return override, list(lists[override])
    count = getattr(config, "num_hidden_layers", None)
    # The decoder's own list has as many entries as the configuration says, and shares the smallest
    # subtree with the token embedding (a vision tower has no token embedding).
    fitting = [p for p, mod in lists.items() if len(mod) == count]
    homes = [p for p in fitting if any(x is embedding for x in _owner(core, p).modules())]
    if not homes:
        raise StructureUnknown(
            f"{type(core).__name__}: no list of {count} layers beside the token embedding. "
            f"Lists here: {_shown(lists)}. "
            'Name the right one: load_model(name, layers="path.to.the.layers")'
        )
    best = max(homes, key=lambda p: (p.count("."), -homes.index(p)))
    return best, list(lists[best])


def _owner(core: nn.Module, path: str) -> nn.Module:
    return core.get_submodule(path.rpartition(".")[0])


def _shown(lists: dict[str, nn.ModuleList]) -> str:
    return ", ".join(f"{path} ({len(mod)})" for path, mod in list(lists.items())[:12]) or "none"


def _final_norms(
    core: nn.Module, backbone: nn.Module, layers_path: str, width: int, override: str | None
) -> list[nn.Module]:
    """What may be the final norm, the likeliest first: `_check` takes the one that fits."""
    if override is not None:
        return [core.get_submodule(override)]
    children = list(backbone.named_children())
    names = [name for name, _ in children]
    at = names.index(layers_path.rpartition(".")[2])
    found = []
    for _, child in [*children[at + 1 :], *children[:at]]:
        weight = getattr(child, "weight", None)
        has_norm_name = "norm" in type(child).__name__.lower()
        if has_norm_name or (isinstance(weight, Tensor) and weight.shape == (width,)):
            found.append(child)
    if not found:
        raise StructureUnknown(
            f"{type(core).__name__}: no final norm beside {layers_path}, only {names}. "
            'Name it: load_model(name, norm="path.to.the.norm")'
        )
    return found


def _child(block: nn.Module, words: tuple[str, ...]) -> nn.Module | None:
    for name, child in block.named_children():
        is_norm = (
            "norm" in name.lower() or "ln" in name.lower() or "norm" in type(child).__name__.lower()
        )
        has_weights = next(child.parameters(), None) is not None  # dropouts bear such names too
        if has_weights and not is_norm and any(word in name.lower() for word in words):
            return child
    return None


def _head_mix(attention: nn.Module, wide: int, width: int) -> nn.Module | None:
    for _, child in reversed(list(attention.named_children())):
        if isinstance(getattr(child, "base_layer", child), nn.Module):
            try:
                shape = tuple(weight_of(child).shape)
            except AttributeError:  # a module without a weight: rotary, dropout
                continue
            if shape in {(wide, width), (width, wide)}:
                return child
    return None


def _logit_scale(config: Any) -> float:
    if (factor := getattr(config, "logit_scale", None)) is not None:
        return float(factor)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        return 1.0 / float(divisor)
    return 1.0


def unembed(s: Structure, h: Tensor) -> Tensor:
    """Logits [..., V] of final-normed states [..., d]: scaled and capped as the model does it."""
    weight = weight_of(s.unembedding)
    dtype = h.dtype if not weight.is_floating_point() else weight.dtype  # 4-bit weights are bytes
    logits = s.unembedding(h.to(device_of(s.unembedding), dtype)) * s.logit_scale
    if s.softcap is not None:
        logits = torch.tanh(logits / s.softcap) * s.softcap
    return logits.float()


def apply_norm(s: Structure, h: Tensor) -> Tensor:
    """The final norm on states [..., d], where the norm's weights are and in their precision."""
    weight = next(s.final_norm.parameters(), None)
    if weight is not None:
        h = h.to(device_of(s.final_norm), weight.dtype)
    return s.final_norm(h)


def require_numbers(model: nn.Module, x: Tensor) -> None:
    """Raises ModelError where `x`, which the model gave, holds NaN; names the weights that do."""
    if not x.isnan().any():
        return
    bad = []
    for path, module in model.named_modules():
        with held(module):
            bad += [
                f"{path}.{name}"
                for name, w in module.named_parameters(recurse=False)
                if w.is_floating_point() and w.isnan().any()
            ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(
            f"this model gives NaN because there is NaN in {', '.join(bad[:3])}{more}: load it anew"
        )
    dtype = str(x.dtype).removeprefix("torch.")
    raise ModelError(
        f"this model gives NaN though no weight is NaN: in {dtype} it may overflow "
        "(load_model(..., dtype='float32')), or what was put into it is too large"
    )


def _residual_writers(parts: list[tuple[nn.Module, Tensor]], delta: Tensor) -> tuple[Any, Any]:
    """The two modules whose outputs sum to what the block added: attention first.

    This is how a norm after attention (Gemma 2, OLMo 2) is told from a norm before the MLP, which
    may bear the same name.
    """
    scale = delta.abs().max().clamp(min=1e-12)
    tolerance = 1e-4 if delta.dtype == torch.float32 else 3e-2
    for i, (first, a) in enumerate(parts):
        for second, b in parts[i + 1 :]:
            if ((a + b - delta).abs().max() / scale) < tolerance:
                return first, second
    return None, None


@torch.no_grad()
def _check(s: Structure, norms: list[nn.Module]) -> None:
    """Four tokens through the model: fills embed_scale, attn_out, mlp_out, final_norm, lens_error."""
    device = device_of(s.embedding)
    vocabulary = weight_of(s.embedding).shape[0]
    ids = (torch.arange(4, device=device) + vocabulary // 3).unsqueeze(0) % vocabulary  # [1, 4]
    seen: dict[Any, Tensor] = {}

    def keep(key: Any) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) and output else output
            if isinstance(out, Tensor) and out.shape == (1, 4, s.width):
                seen[key] = out

        return hook

    def keep_input(key: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            seen["in", key] = args[0] if args else kwargs["hidden_states"]

        return hook

    with ExitStack() as stack:
        for i, block in enumerate(s.layers):
            stack.callback(block.register_forward_pre_hook(keep_input(i), with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(keep(("out", i))).remove)
            for name, part in _writers(block):
                stack.callback(part.register_forward_hook(keep((i, name))).remove)
        stack.callback(s.embedding.register_forward_hook(keep("embedding")).remove)
        logits = s.core(input_ids=ids, use_cache=False).logits.float()

    require_numbers(s.core, logits)
    last = len(s.layers) - 1
    if ("out", last) not in seen:
        raise StructureUnknown(
            f"{type(s.core).__name__}: the entries of {s.layers_path} do not put out "
            f"[batch, token, {s.width}]: "
            'name the residual layers: load_model(name, layers="path.to.the.layers")'
        )
    for i, block in enumerate(s.layers):
        children = dict(_writers(block))
        # `seen` is in the order in which they ran; Bamba defines its MLP before its attention.
        ran = [key[1] for key in seen if isinstance(key, tuple) and key[0] == i]
        parts = [(children[name], seen[i, name]) for name in ran]
        start = seen["in", i]
        added = seen["out", i] - start.to(seen["out", i].device)
        s.attn_out[i], s.mlp_out[i] = _residual_writers(parts, added)
    s.embed_scale = _embed_scale(s, ids, seen)
    errors = []
    for s.final_norm in norms:
        lens = unembed(s, apply_norm(s, seen["out", last]))
        errors.append((lens - logits.to(lens.device)).abs().max().item())
    s.lens_error = min(errors)
    s.final_norm = norms[errors.index(s.lens_error)]


def _writers(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What in a block may write to the residual stream, in its order of definition."""
    return block.named_children()


def _embed_scale(s: Structure, ids: Tensor, seen: dict[Any, Tensor]) -> float:
    """What the embedding's rows are multiplied by before the first layer (Gemma: sqrt(width))."""
    with held(s.embedding):
        rows = weight_of(s.embedding)[ids].float()
    if not rows.is_floating_point() or rows.shape[-1] != s.width:
        return 1.0
    for start in (seen["in", 0], seen.get("embedding")):
        if start is None or start.shape != rows.shape:
            continue
        start = start.float().to(rows.device)
        if torch.cosine_similarity(start.flatten(), rows.flatten(), dim=0) > 0.9999:
            return round((start.norm() / rows.norm()).item(), 5)
    return 1.0


def lens_is_exact(s: Structure) -> bool:
    """Whether unembed(norm(last layer)) gave the model's own logits when the model was loaded."""
    half = weight_of(s.unembedding).dtype != torch.float32
    return s.lens_error <= (0.25 if half else 2e-3)


def describe_parts(s: Structure) -> dict[str, Any]:
    """The findings as plain values, for reports."""
    return {
        "layers at": s.layers_path,
        "layer": type(s.layers[0]).__name__,
        "final norm": type(s.final_norm).__name__,
        "softcap": s.softcap,
        "logit scale": s.logit_scale,
        "embedding scale": s.embed_scale,
        "tied": s.tied,
    }
