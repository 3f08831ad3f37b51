"""Where heads look: attention patterns, whatever kernel the model computes with."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers
from tool_packs.engine import Batch, Steer, per_row, removing, run, shown_batches, spans_of
from tool_packs.errors import CaptureTooLarge, ModelError
from tool_packs.prompts import Prompt, Text, read, token_strings
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["attention_patterns"]

KINDS = ("previous", "first", "self", "induction")


def attention_patterns(
    m: Model,
    text: Text,
    layers: Layers = "all",
    *,
    steer: Steer = None,
    seed: int = 0,
    limit_gb: float = 4.0,
) -> Result:
    """Where does each head look, and is that a matter of place or of content?

    The weights of every head after softmax. A model that computes with a fused kernel does not have
    them, so it is run once more with the plain one, and each head's output is compared with that of
    the model's own run.

    Args:
        text: a str (plain text), a chat, or a list of either.
        layers: "all", an int, a depth in 0..1, or a list.
        steer: as in `generate`.
        seed: of the shuffle of the control.
        limit_gb: above this many GB nothing is run.

    Returns:
        Result: pattern [prompt, layer, head, query, key], each query's keys sum to 1, nan beyond a
        prompt's end; scores [layer, head, kind], the mean weight on the previous token, the first
        token, the token itself, and (induction) the token after an earlier occurrence of this one,
        over the queries that have such a key; scores_uniform [kind] of attention spread evenly;
        scores_shuffled [layer, head, kind] with the texts' tokens in random order, the first in its
        place. Rows: layer, head, and each kind.

    Raises:
        ModelError: attention that shows no weights, as in a state-space model; weights that are not
            those of the model's own run.
        CaptureTooLarge: patterns above limit_gb.

    Use when:
        `dla` or `patch` named a head and you ask what it reads.

    Not when:
        You ask what matters: weights say where a head looks, not what it carries.

    Cost:
        three forward passes up to the deepest layer; heads * tokens² numbers a layer.

    Controls:
        even attention and shuffled tokens, on by default.

    Paper:
        arXiv 2211.00593

    Example:
        from tool_packs.attention import attention_patterns
        r = attention_patterns(m, "the cat sat on the cat", layers=[0, 1])
        r["pattern"][0, 1, 2], r.rows[0]
    """
    started = time.perf_counter()
    prompts = read(m, text)
    index = m.layer_indices(layers)
    longest = max(map(len, prompts))
    size = len(prompts) * len(index) * m.structure.heads * longest**2 * 4
    if size > limit_gb * 1e9:
        raise CaptureTooLarge(
            f"{size / 1e9:.1f} GB of patterns ({len(prompts)} prompts x {len(index)} layers x "
            f"{m.structure.heads} heads x {longest}² tokens) is above limit_gb={limit_gb:g}: "
            "ask for fewer layers or shorter texts, or raise limit_gb"
        )
    pattern = patterns(m, prompts, index, steer=steer)
    generator = torch.Generator().manual_seed(seed)
    mixed = []
    for p in prompts:
        order = (1 + torch.randperm(len(p) - 1, generator=generator)).tolist()
        mixed.append(Prompt((p.ids[0], *(p.ids[i] for i in order)), p.text))
    even = torch.tril(torch.ones(longest, longest))
    even = (even / even.sum(-1, keepdim=True)).expand(len(prompts), 1, 1, -1, -1)
    tensors = {
        "pattern": pattern,
        "scores": _scores(prompts, pattern),
        "scores_uniform": _scores(prompts, even)[0, 0],
        "scores_shuffled": _scores(mixed, patterns(m, mixed, index, check=False)),
    }
    table = [
        {
            "layer": layer,
            "head": h,
            **{kind: round(tensors["scores"][j, h, c].item(), 4) for c, kind in enumerate(KINDS)},
        }
        for j, layer in enumerate(index)
        for h in range(pattern.shape[2])
    ]
    lines = []
    for c, kind in enumerate(KINDS):
        values = tensors["scores"][:, :, c]
        if values.isnan().all():
            lines.append(f"{kind}: no token of these texts has such a key")
            continue
        j, h = divmod(int(values.nan_to_num(-1).argmax()), values.shape[1])
        lines.append(
            f"{kind}: most in L{index[j]}H{h}, {values[j, h]:.3f}; control, even attention "
            f"{tensors['scores_uniform'][c]:.3f}, the same head on shuffled tokens "
            f"{tensors['scores_shuffled'][j, h, c]:.3f}"
        )
    tokens = [token_strings(m, p.ids) for p in prompts]
    return Result(
        title=f"attention patterns of {len(index)} layers on {len(prompts)} prompts",
        tensors=to_cpu(tensors),
        dims={
            "pattern": ("prompt", "layer", "head", "query", "key"),
            "scores": ("layer", "head", "kind"),
            "scores_uniform": ("kind",),
            "scores_shuffled": ("layer", "head", "kind"),
        },
        labels={
            "layer": index,
            "head": list(range(pattern.shape[2])),
            "kind": list(KINDS),
            "tokens": tokens,
        },
        rows=table,
        lines=lines,
        figure={"kind": "grid", "values": "pattern", "label": "attention"},
        provenance=provenance(
            m,
            "attention_patterns",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layers=index,
            steered=steer is not None,
        ),
    )


def attended(
    m: Model,
    prompt: Prompt,
    query: int,
    heads: Sequence[tuple[int, int]],
    *,
    k: int = 3,
    steer: Steer = None,
) -> list[str]:
    """In words, for each (layer, head): the tokens that `query` attends to most."""
    index = sorted({layer for layer, _ in heads})
    entry = steer if steer is None or not isinstance(steer, list) else [steer[0]]
    pattern = patterns(m, [prompt], index, steer=entry)[0]  # [L, H, T, T]
    strings = token_strings(m, prompt.ids)
    query, out = query % len(prompt), []
    for layer, h in heads:
        weights = pattern[index.index(layer), h, query]
        top = weights.topk(min(k, query + 1))
        out.append(
            ", ".join(
                f"{strings[i]!r} at {i} {w:.2f}"
                for i, w in zip(top.indices.tolist(), top.values.tolist(), strict=True)
            )
        )
    return out


def patterns(
    m: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    *,
    steer: Steer = None,
    check: bool = True,
) -> Tensor:
    """[N, L, H, T, T] on the CPU, nan beyond a prompt's end."""
    longest = max(map(len, prompts))
    shape = (len(prompts), len(layers), m.structure.heads, longest, longest)
    out = torch.full(shape, float("nan"))
    changes = per_row(steer, len(prompts))
    spans = spans_of(prompts, changes)
    for batch in shown_batches(m, prompts, "attention"):
        editing = {
            "steer": [changes[i] for i in batch.index] if changes else (),
            "spans": [spans[i] for i in batch.index] if changes else (),
        }
        own = _outputs(m, batch, layers, editing) if check else {}
        seen: dict[int, Tensor] = {}
        with eager(m), removing([]) as handles:
            for layer in layers:
                handles.append(_watch(m, layer, seen))
            plain = _outputs(m, batch, layers, editing)
        for j, layer in enumerate(layers):
            if layer not in seen:
                raise ModelError(f"{m.name}: the attention of layer {layer} shows no weights")
            for b, i in enumerate(batch.index):
                n, pad = len(prompts[i]), batch.pad[b]
                out[i, j, :, :n, :n] = seen[layer][b, :, pad:, -n:].float().cpu()
        for layer in own:
            _compare(m, layer, batch, own[layer], plain[layer])
    return out


def _outputs(
    m: Model, batch: Batch, layers: Sequence[int], editing: dict[str, Any]
) -> dict[int, Tensor]:
    """The heads' outputs of these layers, [B, T, heads * head_dim]."""
    kept: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        return lambda h: kept.update({layer: h})

    mixing = [layer for layer in layers if m.structure.head_mix[layer] is not None]
    reads = [("resid_post", max(layers), lambda h: None)]
    reads += [("head", layer, keep(layer)) for layer in mixing]
    run(m, batch, reads, **editing)
    return kept


def _compare(m: Model, layer: int, batch: Batch, own: Tensor, plain: Tensor) -> None:
    there = batch.mask.bool().to(own.device)
    off = (own - plain)[there].abs().max().item()
    near = 3e-2 if own.dtype in (torch.float16, torch.bfloat16) else 1e-4
    if not off <= near * max(1.0, own[there].abs().max().item()):
        raise ModelError(
            f"{m.name}: heads of layer {layer} put out something else with the plain attention (off "
            f"by {off:.3g}), so its weights are not those of the model as loaded: "
            "load_model(name, attn_implementation='eager')"
        )


def _watch(m: Model, layer: int, seen: dict[int, Tensor]) -> Any:
    module = m.structure.attention[layer]
    if module is None:
        raise ModelError(f"{m.name}: layer {layer} has no attention")

    def look(_: Any, args: Any, output: Any) -> None:
        for item in output if isinstance(output, tuple) else ():
            if isinstance(item, Tensor) and item.ndim == 4 and item.shape[1] == m.structure.heads:
                seen[layer] = item

    return module.register_forward_hook(look)


@contextlib.contextmanager
def eager(m: Model) -> Iterator[None]:
    """Within this, attention is computed in the plain way, which has weights to show."""
    before = m.core.config._attn_implementation
    if before == "eager":
        yield
        return
    try:
        m.core.set_attn_implementation("eager")
        yield
    finally:
        m.core.set_attn_implementation(before)


def _scores(prompts: Sequence[Prompt], pattern: Tensor) -> Tensor:
    """Mean weight [L, H, kind] on the keys of each kind, over the queries that have one."""
    total = torch.zeros(*pattern.shape[1:3], len(KINDS))
    queries = torch.zeros(len(KINDS))
    for i, p in enumerate(prompts):
        n = len(p)
        ids = torch.tensor(p.ids)
        at = torch.arange(n)
        place = at[:, None] - at[None]  # query less key
        same = torch.zeros(n, n, dtype=torch.bool)
        same[:, 1:] = ids[:, None] == ids[None, :-1]
        masks = (place == 1, at[None].expand(n, n) == 0, place == 0, same & (place >= 0))
        for c, mask in enumerate(masks):
            mask = mask.clone()
            if KINDS[c] != "self":
                mask[0] = False  # the first token can only look at itself
            total[..., c] += (pattern[i, :, :, :n, :n] * mask).sum((-1, -2))
            queries[c] += mask.any(-1).sum()
    return total / queries.masked_fill(queries == 0, float("nan"))
