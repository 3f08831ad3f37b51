"""Read activations: the residual stream, what attention and MLP add to it, single heads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.engine import Steer, per_row, run, shown_batches, site_name, spans_of
from tool_packs.errors import CaptureTooLarge, TextError
from tool_packs.prompts import Position, Prompt, Text, read, resolve, token_strings
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["capture"]

Layers = str | int | float | Sequence[int | float]


def capture(
    m: Model,
    text: Text,
    layers: Layers = "all",
    positions: Position = "last",
    *,
    sites: str | Sequence[str] = "resid_post",
    steer: Steer = None,
    limit_gb: float = 8.0,
) -> Result:
    """What are the activations at these layers and positions?

    Runs the prompts in length buckets, stops at the deepest layer asked for, never unembeds, and
    keeps the chosen positions only. resid_post of the last layer is before the final norm, which
    `hidden_states[-1]` of transformers is not.

    Args:
        text: a str (plain text), a chat, or a list of either.
        layers: "all", an int, a depth in 0..1, or a list; resid_post is after the layer.
        positions: an int (negative from the end), "last", "last_user", "assistant_start",
            "response" (every token of the assistant's answer that ends a chat), "all", a span
            (start, stop) or slice, or a list of ints and names.
        sites: "resid_post", "resid_pre", "attn_out", "mlp_out" (what each adds to the stream,
            post-norms included), "head" (each head's output before the mix); one or a list.
        steer: as in `generate`; activations are those of the steered model.
        limit_gb: above this many GB nothing is run.

    Returns:
        Result: for each site a tensor [prompt, layer, position, d] ("head": [prompt, layer,
        position, head, head_dim]) in float32, nan where a prompt has fewer positions; mask
        [prompt, position]; positions [prompt, position] (-1 where there is none); rows prompt,
        text, tokens, positions.

    Raises:
        TextError: a layer, position or site that does not exist here.
        CaptureTooLarge: with the size, and what to narrow.

    Use when:
        You want the numbers themselves (hidden states, activations), for a probe, a similarity or
        an embedding, a plot of your own.

    Not when:
        You want a concept direction (`direction`) or an adapter's effect (`difference`).

    Cost:
        one forward pass up to the deepest layer, without the unembedding.

    Controls:
        None of its own: an activation is no effect yet.

    Paper:
        n/a

    Example:
        from tool_packs.activations import capture
        r = capture(m, ["Paris is a city", "the cat"], layers=[0, 0.5, -1], positions="last")
        r["resid_post"].shape  # [prompt 2, layer 3, position 1, d]
    """
    started = time.perf_counter()
    prompts = read(m, text)
    names = [site_name(s) for s in ([sites] if isinstance(sites, str) else sites)]
    index = m.layer_indices(layers)
    where = [resolve(prompt, positions) for prompt in prompts]
    tensors = collect(m, prompts, index, where, names, steer=steer, limit_gb=limit_gb)
    columns = max(len(w) for w in where)
    chosen = torch.full((len(prompts), columns), -1)
    for i, w in enumerate(where):
        chosen[i, : len(w)] = torch.tensor(w)
    dims: dict[str, tuple[str, ...]] = {
        "mask": ("prompt", "position"),
        "positions": ("prompt", "position"),
    }
    rows, tokens = [], []
    for i, (prompt, w) in enumerate(zip(prompts, where, strict=True)):
        strings = token_strings(m, [prompt.ids[p] for p in w])
        tokens.append(strings)
        shown = prompt.text if len(prompt.text) <= 200 else prompt.text[:200] + "…"
        rows.append({"prompt": i, "text": shown, "tokens": strings, "positions": w})
    lines = []
    for name in names:
        dims[name] = ("prompt", "layer", "position", "d")
        if name == "head":
            dims[name] = ("prompt", "layer", "position", "head", "head_dim")
        norms = tensors[name].flatten(3).norm(dim=-1)  # [N, L, P]
        tensors[f"{name}_norm"] = norms
        dims[f"{name}_norm"] = ("prompt", "layer", "position")
        means = norms.nanmean(dim=(0, 2))
        shown_layers = {0, len(index) // 2, len(index) - 1}
        text_norms = ", ".join(f"layer {index[j]} {means[j]:.3g}" for j in sorted(shown_layers))
        lines.append(f"{name}: mean norm {text_norms}")
    tensors |= {"mask": chosen >= 0, "positions": chosen}
    return Result(
        title=f"activations of {len(prompts)} prompts at {len(index)} layers",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"layer": index, "tokens": tokens},
        rows=rows,
        lines=lines,
        figure={
            "kind": "grid",
            "values": f"{names[0]}_norm",
            "ticks": "tokens",
            "label": f"norm of {names[0]}",
        },
        provenance=provenance(
            m,
            "capture",
            started,
            prompts=[p.ids for p in prompts],
            layers=index,
            positions=str(positions),
            sites=names,
            steered=steer is not None,
        ),
    )


def collect(
    m: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    where: Sequence[Sequence[int]],
    sites: Sequence[str] = ("resid_post",),
    *,
    steer: Steer = None,
    limit_gb: float = 8.0,
) -> dict[str, Tensor]:
    """The numbers behind `capture`: [N, L, P, d] float32 on the CPU by site, nan where absent."""
    columns = max(len(w) for w in where)
    s = m.structure
    shapes = {site: (s.heads, s.head_dim) if site == "head" else (m.width,) for site in sites}
    cells = len(prompts) * len(layers) * columns
    size = sum(cells * torch.Size(shape).numel() * 4 for shape in shapes.values())
    if size > limit_gb * 1e9:
        raise CaptureTooLarge(
            f"{size / 1e9:.1f} GB of activations ({len(prompts)} prompts x {len(layers)} layers x "
            f"{columns} positions x {', '.join(sites)}) is above limit_gb={limit_gb:g}: "
            "ask for fewer layers or positions, or raise limit_gb"
        )
    out = {
        site: torch.full((len(prompts), len(layers), columns, *shape), float("nan"))
        for site, shape in shapes.items()
    }
    changes = per_row(steer, len(prompts))
    spans = spans_of(prompts, changes)
    for batch in shown_batches(m, prompts, "activations"):
        rows = [b for b, i in enumerate(batch.index) for _ in where[i]]
        cols = [batch.pad[b] + p for b, i in enumerate(batch.index) for p in where[i]]
        to_prompt = torch.tensor([i for i in batch.index for _ in where[i]])
        to_slot = torch.tensor([k for i in batch.index for k in range(len(where[i]))])
        at = torch.tensor(rows), torch.tensor(cols)

        def keep(site: str, j: int, at: Any = at, to: Any = (to_prompt, to_slot)) -> Any:
            def see(h: Tensor) -> None:  # h [B, T, d]
                chosen = h[at[0].to(h.device), at[1].to(h.device)].float().cpu()  # [B * P, d]
                out[site][to[0], j, to[1]] = chosen.unflatten(-1, shapes[site])

            return see

        reads = [(site, layer, keep(site, j)) for site in sites for j, layer in enumerate(layers)]
        run(
            m,
            batch,
            reads,
            steer=[changes[i] for i in batch.index] if changes else (),
            spans=[spans[i] for i in batch.index] if changes else (),
        )
    return out


def collect_tokens(
    m: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    positions: Position,
    site: str = "resid_post",
) -> Tensor:
    """Activations [L, N, P, d] at these positions, nan where a text has fewer of them.

    Raises:
        TextError: an activation is NaN or infinite, which no probe or direction survives.
    """
    where = [resolve(p, positions) for p in prompts]
    x = collect(m, prompts, layers, where, (site,))[site]  # [N, L, P, d]
    there = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)
    for i, w in enumerate(where):
        there[i, : len(w)] = True
    bad = ~x.isfinite().all(-1) & there[:, None]  # [N, L, P]
    if bad.any():
        i, j, column = bad.nonzero()[0].tolist()
        raise TextError(
            f"{site} of text {i} at layer {layers[j]}, position {where[i][column]} is NaN or "
            "infinite, not finite: look at that text, or load the model with dtype='float32'"
        )
    return x.transpose(0, 1)
