"""Read activations: the residual stream, what attention and MLP add to it, single heads."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.engine import (
    Batch,
    Intervention,
    Steer,
    per_row,
    run,
    shown_batches,
    site_name,
    spans_of,
)
from tool_packs.errors import CaptureTooLarge, TextError
from tool_packs.prompts import Position, Prompt, Text, read, resolve, token_strings
from tool_packs.result import Result, provenance, to_cpu
from tool_packs.tensor_file import TensorFile, bytes_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["capture"]

HELD = 2**28  # bytes of activations in memory while they are written to a folder

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
    to: str | Path | None = None,
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
        limit_gb: above this many GB nothing is run, unless they go to a folder.
        to: a folder for activations that are larger than memory: they are written there pass by
            pass, and the result's tensors are read from the file as they are used. It is also
            saved there (`Result.load(to)`).

    Returns:
        Result: for each site a tensor [prompt, layer, position, d] ("head": [prompt, layer,
        position, head, head_dim]) in float32, nan where a prompt has fewer positions, and its norm
        as "SITE_norm" [prompt, layer, position]; mask [prompt, position]; positions [prompt,
        position] (-1 where there is none); rows prompt, text, tokens, positions.

    Raises:
        TextError: a layer, position or site that does not exist here; `to` that is a file.
        CaptureTooLarge: with the size, and what to narrow; with `to` where the disk is too full.

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
    columns = max(len(w) for w in where)
    chosen = torch.full((len(prompts), columns), -1)
    for i, w in enumerate(where):
        chosen[i, : len(w)] = torch.tensor(w)
    told = {"mask": chosen >= 0, "positions": chosen}
    if to is None:
        tensors = collect(m, prompts, index, where, names, steer=steer, limit_gb=limit_gb)
        tensors |= {f"{name}_norm": tensors[name].flatten(3).norm(dim=-1) for name in names}
    else:
        tensors = _written(m, prompts, index, where, names, steer, Path(to), told)
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
        norms = tensors[f"{name}_norm"]  # [N, L, P]
        dims[f"{name}_norm"] = ("prompt", "layer", "position")
        means = norms.nanmean(dim=(0, 2))
        shown_layers = {0, len(index) // 2, len(index) - 1}
        text_norms = ", ".join(f"layer {index[j]} {means[j]:.3g}" for j in sorted(shown_layers))
        lines.append(f"{name}: mean norm {text_norms}")
    tensors |= told
    result = Result(
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
    if to is not None:
        result.save_rest(Path(to))
    return result


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
    shapes = _shapes(m, prompts, layers, where, sites)
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    if size > limit_gb * 1e9:
        raise CaptureTooLarge(
            f"{_told(size, shapes)} is above limit_gb={limit_gb:g}: "
            "ask for fewer layers or positions, raise limit_gb, or give capture a folder (to=)"
        )
    out = {site: torch.full(shape, float("nan")) for site, shape in shapes.items()}
    changes = per_row(steer, len(prompts))
    spans = spans_of(prompts, changes)
    for batch in shown_batches(m, prompts, "activations"):
        _read_batch(m, batch, layers, where, out, batch.index, changes, spans)
    return out


def _shapes(
    m: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    where: Sequence[Sequence[int]],
    sites: Sequence[str],
) -> dict[str, tuple[int, ...]]:
    """[N, L, P, d] by site, of "head" [N, L, P, heads, head_dim]."""
    s, cells = m.structure, (len(prompts), len(layers), max(len(w) for w in where))
    return {
        site: (*cells, s.heads, s.head_dim) if site == "head" else (*cells, m.width)
        for site in sites
    }


def _told(size: int, shapes: Mapping[str, Sequence[int]]) -> str:
    prompts, layers, columns = next(iter(shapes.values()))[:3]
    return (
        f"{size / 1e9:.1f} GB of activations ({prompts} prompts x {layers} layers x "
        f"{columns} positions x {', '.join(shapes)})"
    )


def _read_batch(
    m: Model,
    batch: Batch,
    layers: Sequence[int],
    where: Sequence[Sequence[int]],
    out: Mapping[str, Tensor],
    slots: Sequence[int],
    changes: Sequence[tuple[Intervention, ...]],
    spans: Sequence[Sequence[tuple[int, int]]],
) -> None:
    """One pass; its rows go to out[site][slot], a slot for each row of the batch."""
    rows = [b for b, i in enumerate(batch.index) for _ in where[i]]
    cols = [batch.pad[b] + p for b, i in enumerate(batch.index) for p in where[i]]
    to = (
        torch.tensor([slot for i, slot in zip(batch.index, slots, strict=True) for _ in where[i]]),
        torch.tensor([k for i in batch.index for k in range(len(where[i]))]),
    )
    at = torch.tensor(rows), torch.tensor(cols)

    def keep(site: str, j: int) -> Any:
        def see(h: Tensor) -> None:  # h [B, T, d]
            chosen = h[at[0].to(h.device), at[1].to(h.device)].float().cpu()  # [B * P, d]
            out[site][to[0], j, to[1]] = chosen.unflatten(-1, out[site].shape[3:])

        return see

    run(
        m,
        batch,
        [(site, layer, keep(site, j)) for site in out for j, layer in enumerate(layers)],
        steer=[changes[i] for i in batch.index] if changes else (),
        spans=[spans[i] for i in batch.index] if changes else (),
    )


def _written(
    m: Model,
    prompts: Sequence[Prompt],
    layers: Sequence[int],
    where: Sequence[Sequence[int]],
    sites: Sequence[str],
    steer: Steer,
    folder: Path,
    told: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """As `collect`, with the norms and what is `told` beside it; written to a file and mapped from there.

    At no time is more than one pass in memory, and of long passes no more than HELD bytes or one
    prompt.
    """
    from safetensors.torch import load_file

    shapes = _shapes(m, prompts, layers, where, sites)
    plan: dict[str, tuple[torch.dtype, Sequence[int]]] = {
        name: (t.dtype, t.shape) for name, t in told.items()
    }
    for site, shape in shapes.items():
        plan |= {site: (torch.float32, shape), f"{site}_norm": (torch.float32, shape[:3])}
    if folder.is_file():
        raise TextError(f"to={str(folder)!r} is a file: give a folder, new or old")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)  # what is not finished is no result
    size, free = bytes_of(plan), shutil.disk_usage(folder).free
    if size > free:
        raise CaptureTooLarge(
            f"{_told(size, shapes)} do not fit on the disk of {folder}, which has {free / 1e9:.1f} "
            "GB left: ask for fewer layers or positions, or give a folder elsewhere"
        )
    changes = per_row(steer, len(prompts))
    spans = spans_of(prompts, changes)
    rows = max(1, HELD // (4 * sum(math.prod(shape[1:]) for shape in shapes.values())))
    path = folder / "tensors.safetensors"
    path.unlink(missing_ok=True)  # an earlier result may be mapped from it
    with TensorFile(path, plan) as file:
        for name, tensor in told.items():
            file.put(name, 0, tensor)
        for batch in shown_batches(m, prompts, "activations", rows=rows):
            part = {
                site: torch.full((len(batch.index), *shape[1:]), float("nan"))
                for site, shape in shapes.items()
            }
            slots = range(len(batch.index))
            _read_batch(m, batch, layers, where, part, slots, changes, spans)
            for site, states in part.items():
                norms = states.flatten(3).norm(dim=-1)
                for slot, i in enumerate(batch.index):
                    file.put(site, i, states[slot])
                    file.put(f"{site}_norm", i, norms[slot])
    return load_file(path)


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
