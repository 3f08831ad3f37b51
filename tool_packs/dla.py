"""Which parts of the model a logit difference is the sum of: direct logit attribution."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tool_packs.attention import attended
from tool_packs.engine import fitting, per_row, run, shown_batches, spans_of
from tool_packs.errors import ModelError, TextError
from tool_packs.logit_lens import refuse_inexact
from tool_packs.patching import Answers, _token, answers_of
from tool_packs.prompts import Position, Prompt, Text, read, resolve, token_strings
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.structure import copied, device_of

if TYPE_CHECKING:
    from tool_packs.engine import Steer
    from tool_packs.models import Model

__all__ = ["dla"]


def dla(
    m: Model,
    text: Text,
    answers: Answers = None,
    *,
    position: Position = "last",
    attend: int = 6,
    n_random: int = 64,
    seed: int = 0,
    steer: Steer = None,
) -> Result:
    """Which attention, MLP or head writes the logit difference of two answers into the residual stream?

    The last state is the sum of what the embedding, every attention and every MLP added to it (with
    the norms that Gemma 2 puts after them). With the final norm's scale held at its value, the norm
    and the unembedding are linear, so the logit difference is a sum over these too; so is an
    attention's part over its heads. A softcap counts as the factor by which it shrinks this
    difference. What remains is the biases of norm and unembedding ("bias"). The components add up
    to the model's own logit difference, and it is checked that they do.

    Args:
        text: a str (plain text), a chat, or a list of either.
        answers: (right, wrong), words or token ids, for all texts, or a list with one tuple a text;
            None: the two likeliest tokens of each.
        position: where the answer is predicted; one position a text.
        attend: heads with the largest attribution whose attended tokens are named; 0: none.
        n_random: pairs of random tokens that the same components are attributed to.
        seed: of the random tokens.
        steer: as in `generate`.

    Returns:
        Result: attribution [prompt, component] in logits; head [prompt, layer, head] (nan where a
        layer has none) and head_bias [prompt, layer] add up to that layer's attention;
        logit_difference [prompt] of the model; error [prompt], the sum of the components less that;
        null [prompt, component, null] and head_null [layer, head, null] (mean over prompts) for
        random pairs. Rows: component, attribution, share, control, p, and for the largest heads
        what they attend to.

    Raises:
        TextError: two answers that are one token; a position that is more than one.
        ModelError: the model's logits are not unembed(norm(x)); components that do not add up.

    Use when:
        You want to know where a prediction is written, before patching tells what it needs.

    Not when:
        A part acts through later parts: this sees the last step only. `patch` sees the rest.

    Cost:
        one forward pass, two with `attend`; n_random * components * d.

    Controls:
        the same components for pairs of random tokens, on by default.

    Paper:
        arXiv 2211.00593

    Example:
        from tool_packs.dla import dla
        r = dla(m, "the cat sat on the", (" mat", " dog"))
        r.rows[0], r["head"].shape, r["error"]
    """
    started = time.perf_counter()
    refuse_inexact(m)
    prompts = read(m, text)
    where = _one_each(prompts, position)
    parts = _parts(m, prompts, where, steer)
    final = parts.final  # [N, d]
    with torch.no_grad():
        logits = m.unembed(m.norm(final)).cpu()  # [N, V]
    pairs = _pairs(m, answers_of(answers, len(prompts)), logits)  # [N, 2]
    generator = torch.Generator().manual_seed(seed)
    random = torch.randint(m.vocab_size, (n_random, 2), generator=generator)
    norm = linear_norm(m.structure.final_norm, final, "the final norm")
    own, own_bias = _functional(m, norm, final, pairs[:, None])  # [N, 1, d], [N, 1]
    null, null_bias = _functional(m, norm, final, random.expand(len(prompts), -1, -1))
    stacked = torch.stack([*parts.added.values()], 1)  # [N, C, d]
    found = torch.einsum("ncd,nkd->nck", stacked, torch.cat([own, null], 1))
    found = torch.cat([found, torch.cat([own_bias, null_bias], 1)[:, None]], 1)  # [N, C + 1, 1 + k]
    components = [*parts.added, "bias"]
    difference = logits.gather(1, pairs).diff(dim=1)[:, 0].neg()  # [N]
    error = found[:, :, 0].sum(1) - difference
    half = m.dtype in (torch.float16, torch.bfloat16)
    scale = max(1.0, found[:, :, 0].abs().sum(1).max().item())
    if not error.abs().max() <= (5e-2 if half else 1e-3) * scale:
        raise ModelError(
            f"{m.name}: the components are off the logit difference by {error.abs().max():.3g}: "
            "something else writes to the residual stream"
        )
    head, head_bias, inseparable = _heads(m, parts, torch.cat([own, null], 1), found, components)
    tensors = {
        "attribution": found[:, :, 0],
        "logit_difference": difference,
        "error": error,
        "null": found[:, :, 1:],
    }
    dims: dict[str, tuple[str, ...]] = {
        "attribution": ("prompt", "component"),
        "logit_difference": ("prompt",),
        "error": ("prompt",),
        "null": ("prompt", "component", "null"),
    }
    if head is not None:
        tensors |= {
            "head": head[..., 0],
            "head_bias": head_bias,
            "head_null": head[..., 1:].mean(0),
        }
        dims |= {
            "head": ("prompt", "layer", "head"),
            "head_bias": ("prompt", "layer"),
            "head_null": ("layer", "head", "null"),
        }
    table = [
        _row(name, tensors["attribution"][:, c], tensors["null"][:, c].mean(0), difference)
        for c, name in enumerate(components)
    ]
    table.sort(key=lambda row: -abs(row["attribution"]))
    names = [" - ".join(map(repr, token_strings(m, pair.tolist()))) for pair in pairs]
    lines = [
        f"logit difference {names[0]}: {difference[0]:.4g}"
        + (
            f" (mean of {len(prompts)} prompts {difference.mean():.4g})" if len(prompts) > 1 else ""
        ),
        f"the components add up to it within {error.abs().max():.1e}",
        "largest (control, random pairs of tokens): "
        + ", ".join(f"{r['component']} {r['attribution']:+.3g} ({r['null']})" for r in table[:5]),
    ]
    if m.softcap is not None:
        lines.append(f"the softcap of {m.softcap:g} counts as a factor of this difference")
    if head is not None:
        rows = _head_rows(m, tensors, prompts, where, difference, attend, steer)
        lines.append(
            "largest heads: "
            + ", ".join(f"{r['component']} {r['attribution']:+.3g} ({r['null']})" for r in rows[:4])
        )
        table += rows
    if inseparable:
        lines.append(f"layers whose heads or parts could not be told apart: {inseparable}")
    return Result(
        title=f"direct logit attribution of {len(prompts)} prompts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={
            "component": components,
            "layer": list(range(m.n_layers)),
            "head": list(range(m.structure.heads)),
            "answers": names,
        },
        rows=table,
        lines=lines,
        figure={"kind": "grid", "values": "head", "label": "logits"}
        if head is not None
        else {"kind": "bars", "x": "component", "y": "attribution"},
        provenance=provenance(
            m,
            "dla",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            answers=pairs.tolist(),
            position=str(position),
            n_random=n_random,
            steered=steer is not None,
        ),
    )


def _one_each(prompts: Sequence[Prompt], position: Position) -> list[int]:
    where = [resolve(p, position) for p in prompts]
    if longest := next((w for w in where if len(w) != 1), None):
        raise TextError(
            f"position={position!r:.40} is {len(longest)} positions: give one, as 'last' or an int"
        )
    return [w[0] for w in where]


def _pairs(m: Model, answers: Sequence[Any], logits: Tensor) -> Tensor:
    """Right and wrong token [N, 2] of each prompt."""
    pairs = []
    for answer, own in zip(answers, logits, strict=True):
        if answer is None:
            pairs.append(own.topk(2).indices.tolist())
            continue
        if not isinstance(answer, (tuple, list)) or len(answer) != 2:
            raise TextError(f'answers={answer!r:.40}: give two, as in (" Paris", " Rome")')
        pair = [_token(m, word, own) for word in answer]
        if pair[0] == pair[1]:
            raise TextError(f"{answer[0]!r} and {answer[1]!r} are one token ({pair[0]})")
        pairs.append(pair)
    return torch.tensor(pairs)


def _row(name: str, values: Tensor, null: Tensor, difference: Tensor) -> dict[str, Any]:
    value, total = values.mean().item(), difference.mean().item()
    row: dict[str, Any] = {"component": name, "attribution": round(value, 4)}
    row["share"] = round(value / total, 3) if abs(total) > 1e-6 else None
    row["null"] = mean_sd(null) if len(null) else "not run"
    as_large = (null.abs() >= abs(value)).sum().item()
    row["p"] = round((1 + as_large) / (1 + len(null)), 4)
    return row


# What is added to the residual stream


@dataclass
class _Parts:
    added: dict[str, Tensor]  # by component [N, d]; they sum to `final`
    final: Tensor  # [N, d], before the final norm
    mixed: dict[int, Tensor] = field(default_factory=dict)  # by layer [N, heads * head_dim]


def _parts(m: Model, prompts: Sequence[Prompt], where: Sequence[int], steer: Steer) -> _Parts:
    """One pass: what every part adds at these positions, and what the heads' mix is given."""
    s, last = m.structure, m.n_layers - 1
    wanted = [("resid_pre", 0), ("resid_post", last)]
    for layer in range(m.n_layers):
        if s.attn_out[layer] is None or s.mlp_out[layer] is None or steer is not None:
            wanted += [("resid_pre", layer), ("resid_post", layer)]
        if s.attn_out[layer] is not None and s.mlp_out[layer] is not None:
            wanted += [("attn_out", layer), ("mlp_out", layer)]
            if s.head_mix[layer] is not None and s.heads:
                wanted.append(("head", layer))
    wanted = list(dict.fromkeys(wanted))
    seen: dict[tuple[str, int], Tensor] = {}
    changes = per_row(steer, len(prompts))
    spans = spans_of(prompts, changes)
    for batch in shown_batches(m, prompts, "logit attribution"):
        columns = torch.tensor([batch.pad[b] + where[i] for b, i in enumerate(batch.index)])

        def keep(key: tuple[str, int], columns: Tensor = columns, batch: Any = batch) -> Any:
            def see(h: Tensor) -> None:  # h [B, T, d]
                rows = torch.arange(len(columns), device=h.device)
                mine = h[rows, columns.to(h.device)].float().cpu()
                out = seen.setdefault(key, torch.zeros(len(prompts), mine.shape[-1]))
                out[torch.tensor(batch.index)] = mine

            return see

        run(
            m,
            batch,
            [(site, layer, keep((site, layer))) for site, layer in wanted],
            steer=[changes[i] for i in batch.index] if changes else (),
            spans=[spans[i] for i in batch.index] if changes else (),
        )
    tokens = torch.tensor([p.ids[i] for p, i in zip(prompts, where, strict=True)])
    embedded = m.embed(tokens).detach().float().cpu()
    parts = _Parts({}, seen["resid_post", last])
    start = seen["resid_pre", 0]
    if torch.allclose(start, embedded, rtol=1e-2, atol=1e-3 * start.abs().max().item()):
        parts.added["embed"] = start
    else:  # learned positions, as in GPT-2
        parts.added |= {"embed": embedded, "pos_embed": start - embedded}
    for layer in range(m.n_layers):
        pieces = [(name, seen.get((f"{name}_out", layer))) for name in ("attn", "mlp")]
        told = {f"L{layer} {name}": value for name, value in pieces if value is not None}
        if ("resid_post", layer) in seen and ("resid_pre", layer) in seen:
            whole = seen["resid_post", layer] - seen["resid_pre", layer]
            if not told:
                told = {f"L{layer} whole": whole}
            elif steer is not None:
                told[f"L{layer} steering"] = whole - sum(told.values())
        parts.added |= told
        if ("head", layer) in seen:
            parts.mixed[layer] = seen["head", layer]
    return parts


# The linear map from a state to a logit difference


@dataclass
class LinearNorm:
    """A norm with its scale held: h -> scale * gain * h + bias, h centred first in a LayerNorm."""

    gain: Tensor  # [d]
    bias: Tensor  # [d]
    centred: bool
    scale: Tensor  # [N]

    def pull(self, w: Tensor) -> Tensor:
        """Functionals on its output [N, ..., d] as functionals on its input."""
        v = w * self.gain
        if self.centred:
            v = v - v.mean(-1, keepdim=True)
        return v * self.scale.view(-1, *[1] * (w.ndim - 1))


@torch.no_grad()
def linear_norm(norm: nn.Module, h: Tensor, name: str) -> LinearNorm:
    """What this norm does at states h [N, d], found by trying it on vectors and then checked."""
    norm = copied(norm)
    d = h.shape[-1]
    bias = norm(torch.zeros(1, d))[0]
    probe = torch.full((1, d), 1e3)
    probe[:, 1::2] = -1e3  # so large that the norm's epsilon does not matter
    ramp = torch.linspace(1e3, 3e3, d)[None]
    centred = torch.allclose(norm(ramp), norm(ramp + 1e3), rtol=1e-3, atol=1e-3)
    shown = probe - probe.mean() if centred else probe
    gain = ((norm(probe) - bias) / (shown / shown.square().mean().sqrt()))[0]
    put_in = h - h.mean(-1, keepdim=True) if centred else h
    out, shape = norm(h) - bias, put_in * gain
    scale = (out * shape).sum(-1) / shape.square().sum(-1).clamp(min=1e-30)
    off = (out - scale[:, None] * shape).abs().max()
    if not off <= 1e-4 * max(1.0, out.abs().max().item()):
        raise ModelError(
            f"{name} ({type(norm).__name__}) is no linear map with a scale: off by {off:.3g}"
        )
    return LinearNorm(gain, bias, centred, scale)


def _unembedding_rows(m: Model, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [K, d] and biases [K] of the unembedding for these tokens, adapters included."""
    dtype = m.dtype
    device = device_of(m.structure.unembedding)
    x = torch.zeros(len(ids), m.width, device=device, dtype=dtype, requires_grad=True)
    with fitting(m, len(ids), 1), torch.enable_grad():
        out = m.structure.unembedding(x).gather(1, ids[:, None].to(device))[:, 0]
        (rows,) = torch.autograd.grad(out.sum(), x)  # it is linear: the gradient is the row
    scale = m.structure.logit_scale
    return rows.float().cpu() * scale, out.detach().float().cpu() * scale


def _functional(m: Model, norm: LinearNorm, final: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """For token pairs [N, k, 2]: [N, k, d] on states before the norm, and constants [N, k]."""
    ids, back = pairs.unique(return_inverse=True)
    parts = [_unembedding_rows(m, some) for some in ids.split(256)]
    if not parts:
        return torch.zeros(*pairs.shape[:2], m.width), torch.zeros(pairs.shape[:2])
    rows, biases = torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    one, two = rows[back[..., 0]], rows[back[..., 1]]  # [N, k, d]
    b1, b2 = biases[back[..., 0]], biases[back[..., 1]]
    raw = norm.pull(one - two)
    constant = (one - two) @ norm.bias + b1 - b2
    if (cap := m.softcap) is not None:
        first = torch.einsum("nd,nkd->nk", final, norm.pull(one)) + one @ norm.bias + b1
        second = first - torch.einsum("nd,nkd->nk", final, raw) - constant
        gap = first - second
        slope = (torch.tanh(first / cap) - torch.tanh(second / cap)) * cap / gap
        flat = 1 - torch.tanh(first / cap) ** 2
        factor = torch.where(gap.abs() > 1e-4, slope, flat)  # of one token twice: the tangent
        raw, constant = raw * factor[..., None], constant * factor
    return raw, constant


# Heads


@torch.no_grad()
def _heads(
    m: Model, parts: _Parts, functional: Tensor, found: Tensor, components: Sequence[str]
) -> tuple[Tensor | None, Tensor, list[int]]:
    """Attribution [N, L, H, 1 + k] of each head, of the mix's bias [N, L], and layers without."""
    s, (n, k, _) = m.structure, functional.shape
    bias = torch.full((n, m.n_layers), float("nan"))
    inseparable = [layer for layer in range(m.n_layers) if layer not in parts.mixed]
    if not parts.mixed:
        return None, bias, inseparable
    out = torch.full((n, m.n_layers, s.heads, k), float("nan"))
    for layer, mixed in parts.mixed.items():
        each, constant = _mix(
            s.head_mix[layer], mixed.unflatten(-1, (s.heads, s.head_dim)), m.dtype
        )
        added = parts.added[f"L{layer} attn"]
        whole = each.sum(1) + constant  # [N, d]
        size = max(1e-6, added.abs().max().item())
        near = 3e-2 if m.dtype in (torch.float16, torch.bfloat16) else 1e-4
        v, rest = functional, torch.zeros(n)
        if (whole - added).abs().max() > near * size:  # a norm after attention, as in Gemma 2
            try:
                norm = linear_norm(s.attn_out[layer], whole, f"the norm after attention {layer}")
            except ModelError:
                inseparable.append(layer)
                continue
            rest = functional[:, 0] @ norm.bias
            v = norm.pull(functional)
        out[:, layer] = torch.einsum("nhd,nkd->nhk", each, v)
        bias[:, layer] = v[:, 0] @ constant + rest
        want = found[:, components.index(f"L{layer} attn"), 0]
        off = (out[:, layer, :, 0].sum(1) + bias[:, layer] - want).abs().max()
        if off > 10 * near * max(1.0, found[:, :, 0].abs().max().item()):
            out[:, layer], bias[:, layer] = float("nan"), float("nan")
            inseparable.append(layer)
    return out, bias, sorted(inseparable)


def _mix(module: nn.Module, z: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What each head's output z [N, H, head_dim] becomes alone [N, H, d], and the bias [d]."""
    device = device_of(module)
    alone = torch.diag_embed(z.transpose(1, 2)).permute(0, 2, 3, 1)  # [N, H, H, head_dim]
    alone = alone.flatten(2).to(device, dtype)  # [N, H, H * head_dim], zero but for one head
    constant = module(torch.zeros_like(alone[:1, :1]))[0, 0]  # [d]
    each = torch.stack([module(row) for row in alone]) - constant
    return each.float().cpu(), constant.float().cpu()


def _head_rows(
    m: Model,
    tensors: dict[str, Tensor],
    prompts: Sequence[Prompt],
    where: Sequence[int],
    difference: Tensor,
    attend: int,
    steer: Steer,
) -> list[dict[str, Any]]:
    """A row for each of the largest heads, with what it attends to in the first prompt."""
    means = tensors["head"].mean(0)  # [L, H]
    order = means.nan_to_num().abs().flatten().argsort(descending=True).tolist()
    heads = means.shape[1]
    rows, chosen = [], []
    for at in order[: max(attend, 6)]:
        layer, h = divmod(at, heads)
        if means[layer, h].isnan():  # a layer that has none
            continue
        null = tensors["head_null"][layer, h]
        rows.append(_row(f"L{layer}H{h}", tensors["head"][:, layer, h], null, difference))
        chosen.append((layer, h))
    if chosen and attend:
        looks = attended(m, prompts[0], where[0], chosen[:attend], steer=steer)
        for row, look in zip(rows, looks, strict=False):
            row["attends"] = look
    return rows
