"""Prompts that begin alike: their beginning is computed once, and every row goes on from there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.engine import Batch, Intervention, editing, step_logits

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__: list[str] = []

WORTH_TOKENS = 256  # fewer saved than this do not pay for a second pass
WORTH_SHARE = 0.25  # of the batch's tokens
CUTS = 16  # places to cut that are looked at

Steering = Sequence[tuple[Intervention, ...]]
Spans = Sequence[Sequence[tuple[int, int]]]


def prefill(m: Model, batch: Batch, steer: Steering = (), spans: Spans = ()) -> tuple[Tensor, Any]:
    """Logits [B, V] (float32) after each prompt of the batch, and the KV cache of all of them.

    The batch is cut at one column. What stands left of it is computed once for each distinct
    beginning; its keys and values are then shifted to where each row has them, so that no row has
    padding inside and a sliding window reaches as far as it does in the row alone.
    """
    cut = _best_cut(batch, steer, spans)
    if cut is None or not _has_plain_cache(m):
        with editing(m, steer, spans):
            return step_logits(m, batch.ids, batch.mask, batch.positions, None)
    cache = _beginnings(m, batch, cut, steer, spans)
    with editing(m, steer, spans):
        return step_logits(m, batch.ids[:, cut:], batch.mask, batch.positions[:, cut:], cache)


def _best_cut(batch: Batch, steer: Steering, spans: Spans) -> int | None:
    """The column at which cutting saves most tokens; None where it saves too few."""
    rows, width = batch.ids.shape
    if rows < 2 or rows * width < WORTH_TOKENS:
        return None
    texts = _texts(batch)
    order = sorted(texts)
    cuts = {min(_common(a, b), width - 1) for a, b in pairwise(order)} - {0}
    looked_at = sorted(cuts)[:: 1 + len(cuts) // CUTS]
    saved = {
        cut: cut * (rows - len(set(_beginning_keys(texts, cut, steer, spans)))) for cut in looked_at
    }
    best = max(saved, key=lambda cut: saved[cut], default=None)
    if best is None or saved[best] < max(WORTH_TOKENS, WORTH_SHARE * rows * width):
        return None
    return best


def _texts(batch: Batch) -> list[tuple[int, ...]]:
    return [tuple(row[pad:]) for row, pad in zip(batch.ids.tolist(), batch.pad, strict=True)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _beginning_keys(
    texts: Sequence[tuple[int, ...]], cut: int, steer: Steering, spans: Spans
) -> list[Hashable]:
    """What each row's beginning is: its tokens, and all that changes them."""
    keys = []
    for b, text in enumerate(texts):
        changes = [
            (i.layer, id(i.vector), i.strength, id(i.edit), start, min(stop, cut))
            for i, (start, stop) in (zip(steer[b], spans[b], strict=True) if steer else ())
            if start < cut
        ]
        keys.append((text[:cut], tuple(changes)))
    return keys


def _beginnings(m: Model, batch: Batch, cut: int, steer: Steering, spans: Spans) -> Any:
    """The KV cache of the columns left of the cut, for every row."""
    from transformers import DynamicCache

    texts = _texts(batch)
    keys = _beginning_keys(texts, cut, steer, spans)
    first = {key: b for b, key in reversed(list(enumerate(keys)))}  # a row that begins so
    distinct = list(first)
    device = batch.ids.device
    # Padded on the right: nothing to the right of a token changes it.
    begun = [list(texts[b][:cut]) for b in first.values()]
    ids = torch.tensor([row + [m.pad_id] * (cut - len(row)) for row in begun], device=device)
    positions = torch.arange(cut, device=device).expand(len(begun), -1)
    # Without a configuration the cache keeps every token, those outside a sliding window too: a
    # row with padding needs more of them than the window holds. The mask knows the window.
    cache = DynamicCache()
    with editing(m, [steer[b] for b in first.values()] if steer else (), _of(spans, first)):
        step_logits(m, ids, torch.ones_like(ids), positions, cache)
    source = torch.tensor([distinct.index(key) for key in keys], device=device)  # [B]
    if not any(batch.pad):  # nothing moves
        for layer in cache.layers:
            layer.keys, layer.values = (_repeated(x, source) for x in (layer.keys, layer.values))
        return cache
    pad = torch.tensor(batch.pad, device=device)[:, None]
    columns = (torch.arange(cut, device=device) - pad).clamp(min=0)  # [B, cut], 0 under padding
    for layer in cache.layers:
        layer.keys = _shifted(layer.keys, source, columns)
        layer.values = _shifted(layer.values, source, columns)
    return cache


def _of(spans: Spans, first: dict[Hashable, int]) -> Spans:
    return [spans[b] for b in first.values()] if spans else ()


def _repeated(states: Tensor, source: Tensor) -> Tensor:
    """[U, heads, cut, d] -> [B, heads, cut, d]: row b is row source[b]; one row is not copied."""
    if len(states) == 1:
        return states.expand(len(source), -1, -1, -1)
    return states[source.to(states.device)]


def _shifted(states: Tensor, source: Tensor, columns: Tensor) -> Tensor:
    """[U, heads, cut, d] -> [B, heads, cut, d]: row b is row source[b], its columns moved."""
    source, columns = source.to(states.device), columns.to(states.device)
    moved = states.transpose(1, 2)[source[:, None], columns]  # [B, cut, heads, d]
    return moved.transpose(1, 2).contiguous()


def _has_plain_cache(m: Model) -> bool:
    """Whether the model's cache is keys and values by token, which can be shifted; asked once."""
    if m.plain_cache is None:
        m.plain_cache = _probe(m)
    return m.plain_cache


def _probe(m: Model) -> bool:
    from transformers import cache_utils

    kinds = set(getattr(m.config, "layer_types", None) or ())
    if not kinds <= {"full_attention", "sliding_attention"}:
        return False
    rope = f"{getattr(m.config, 'rope_parameters', '')}{getattr(m.config, 'rope_scaling', '')}"
    if "dynamic" in rope or "longrope" in rope:  # a token's angle depends on the text's length
        return False
    one = torch.tensor([[m.pad_id]], device=m.device)
    _, cache = step_logits(m, one, torch.ones_like(one), torch.zeros_like(one), None)
    plain = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
    return (
        type(cache) is cache_utils.DynamicCache
        and len(cache.layers) == m.n_layers
        and all(type(layer) in plain and layer.is_initialized for layer in cache.layers)
    )
