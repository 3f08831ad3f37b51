"""Look at a model before you measure it: its parts, and how it reads a text."""

from __future__ import annotations

import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from tool_packs.prompts import Text, as_list, read, token_strings
from tool_packs.result import Result, provenance
from tool_packs.structure import describe_parts, weight_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["anatomy", "tokenize"]


def anatomy(m: Model) -> Result:
    """What is this model made of?

    Returns:
        Result: rows part, module, count, parameters, shape (of one of them), for the embedding,
        each kind of module inside a layer, the final norm and the unembedding; lines on attention,
        positions, norms, tied weights, softcap, scales, special tokens and adapters.

    Raises:
        nothing of its own.

    Use when:
        You meet a model for the first time and want its architecture, or a technique behaves oddly
        on it.

    Not when:
        The report that `load_model` gives is enough: show `m`.

    Cost:
        no forward pass.

    Controls:
        None: nothing is claimed about behaviour.

    Paper:
        n/a

    Example:
        from tool_packs.anatomy import anatomy
        r = anatomy(m)
        r.rows[:3]
    """
    started = time.perf_counter()
    s, c = m.structure, m.config
    rows = [_part("embedding", s.embedding, 1)]
    first = s.layers[0]
    for path, module in first.named_modules():
        own = [p for name, p in module.named_parameters(recurse=False)]
        if own:
            rows.append(_part(path or "layer", module, m.n_layers))
    rows.append(_part("final norm", s.final_norm, 1))
    rows.append(_part("unembedding" + (" (tied)" if s.tied else ""), s.unembedding, 1))
    kinds = Counter(getattr(c, "layer_types", None) or ["full_attention"] * m.n_layers)
    sharing = "multi-head"
    if s.kv_heads == 1 and s.heads > 1:
        sharing = "multi-query"
    elif s.kv_heads < s.heads:
        sharing = f"grouped-query ({s.heads // s.kv_heads} heads a key)"
    rope = getattr(c, "rope_parameters", None)
    parts = describe_parts(s)
    special = {
        name: token
        for name, token in m.tokenizer.special_tokens_map.items()
        if isinstance(token, str)
    }
    post_norm = s.attn_out[0] is not None and s.attn_out[0] is not s.attention[0]
    lines = [
        m.describe().split("\n")[0],
        f"attention: {sharing}, {s.heads} heads of {s.head_dim}, {s.kv_heads} kv; "
        + ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        + (f", window {c.sliding_window}" if getattr(c, "sliding_window", None) else ""),
        f"positions: {f'rotary {rope}' if rope else 'learned or other (no rope in the config)'}",
        f"norm: {parts['final norm']}"
        + (", and one after attention and MLP (post-norm)" if post_norm else ", before each part"),
        f"final logits: softcap {s.softcap}, scale {s.logit_scale:g}; "
        f"embedding scale {s.embed_scale:g}; tied {s.tied}",
        f"special tokens: {special}; chat template: {'yes' if m.has_chat_template else 'no'}",
        f"adapters: {', '.join(m.adapters) or 'none'}, active: {m.active_adapter}",
    ]
    return Result(
        title=f"anatomy of {m.name}",
        tensors={},
        dims={},
        rows=rows,
        lines=lines,
        provenance=provenance(m, "anatomy", started),
    )


def tokenize(m: Model, text: Text) -> Result:
    """How does the model read this text: which tokens, at which positions, and what is added?

    Args:
        text: a str (plain text), a chat, or a list of either.

    Returns:
        Result: rows text, position, id, token, special, added (by the chat template or the
        tokenizer, not in what you gave), name ("last", "last_user", "assistant_start" where it is
        one); tensor ids [text, position], -1 on the right of shorter texts.

    Raises:
        TextError: an empty text, or a chat that the template refuses.

    Use when:
        You choose positions, or a word does not behave as one token.

    Not when:
        You only need the number of tokens: `len(m.tokenizer(text)["input_ids"])`.

    Cost:
        no forward pass.

    Controls:
        None: nothing is claimed about behaviour.

    Paper:
        n/a

    Example:
        from tool_packs.anatomy import tokenize
        r = tokenize(m, [{"role": "user", "content": "the cat sat"}])
        [(row["position"], row["token"], row["added"]) for row in r.rows]
    """
    started = time.perf_counter()
    given, prompts = as_list(text), read(m, text)
    special = set(m.tokenizer.all_special_ids)
    rows: list[dict[str, Any]] = []
    lines = []
    for i, (source, prompt) in enumerate(zip(given, prompts, strict=True)):
        strings = token_strings(m, prompt.ids)
        mine = _given(m, source, prompt.text, prompt.ids)
        names = {len(prompt) - 1: ["last"]}
        for name in ("last_user", "assistant_start"):
            if (at := getattr(prompt, name)) is not None:
                names.setdefault(at, []).append(name)
        for p, (token, string) in enumerate(zip(prompt.ids, strings, strict=True)):
            rows.append(
                {
                    "text": i,
                    "position": p,
                    "id": token,
                    "token": string,
                    "special": token in special,
                    "added": not mine[p],
                    "name": ", ".join(names.get(p, [])),
                }
            )
        bos = (
            prompt.ids.count(m.tokenizer.bos_token_id)
            if m.tokenizer.bos_token_id is not None
            else 0
        )
        where = ", ".join(f"{name} {at}" for at, ns in names.items() for name in ns)
        shown = " ".join(f"{p}:{t!r}" for p, t in list(enumerate(strings))[:40])
        lines.append(
            f"text {i}: {len(prompt)} tokens, {mine.count(False)} added, {bos} BOS; {where}\n"
            f"{shown}"
        )
    ids = torch.full((len(prompts), max(map(len, prompts))), -1)
    for i, prompt in enumerate(prompts):
        ids[i, : len(prompt)] = torch.tensor(prompt.ids)
    return Result(
        title=f"tokens of {len(prompts)} texts",
        tensors={"ids": ids},
        dims={"ids": ("text", "position")},
        rows=rows,
        lines=lines,
        provenance=provenance(m, "tokenize", started, prompts=[p.ids for p in prompts]),
    )


def _part(name: str, module: Any, count: int) -> dict[str, Any]:
    parameters = sum(p.numel() for p in module.parameters(recurse=name == "unembedding"))
    shape = list(weight_of(module).shape) if hasattr(module, "weight") else []
    return {
        "part": name,
        "module": type(module).__name__,
        "count": count,
        "parameters": parameters * count,
        "shape": shape,
    }


def _given(m: Any, source: Any, text: str, ids: tuple[int, ...]) -> list[bool]:
    """Which tokens hold characters of what was given, and not of the template or tokenizer."""
    special = set(m.tokenizer.all_special_ids)
    if isinstance(source, str):
        return [token not in special for token in ids]
    if not m.tokenizer.is_fast:
        return [token not in special for token in ids]
    encoded = m.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans, cursor = [], 0
    for message in source:
        content = str(message["content"]).strip()
        at = text.find(content, cursor)
        if content and at >= 0:
            cursor = at + len(content)
            spans.append((at, cursor))
    return [
        any(a < end and b > start for start, end in spans) for a, b in encoded["offset_mapping"]
    ]
