"""Patching by gradients: which activations, or which edges between parts, carry the difference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.engine import fitting, site_name
from tool_packs.errors import TextError
from tool_packs.patching import (
    Answers,
    Run,
    Score,
    answers_of,
    at_columns,
    logits_of,
    read_pairs,
    record_pair,
    refuse_inexact,
    score_states,
)
from tool_packs.prompts import Text
from tool_packs.replay import Change, Recording, readers, stack, sweep
from tool_packs.result import Result, mean_sd, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["attribute"]

METHODS = ("atp", "ig", "eap", "eap-ig")
INPUTS = ("attn_in", "mlp_in")
PARTS = ("attn_out", "mlp_out", "head")  # what an edge begins at, beside the embedding


def attribute(
    m: Model,
    clean: Text,
    corrupt: Text,
    metric: str | Score = "logit_diff",
    *,
    method: str = "atp",
    answers: Answers = None,
    sites: str | Sequence[str] = ("resid_post", "attn_out", "mlp_out"),
    steps: int = 5,
    check: int = 12,
    seed: int = 0,
) -> Result:
    """Which of very many activations or edges would matter if they were patched?

    A first-order estimate of `patch`: (clean activation - corrupt activation) times the gradient
    of the metric, for all cells at once; then the strongest cells, and as many drawn at random,
    are patched exactly. "atp" takes the gradient in the corrupt run. "ig" takes its mean over
    `steps` points between the two runs' embeddings, which repairs most of what saturation hides.
    "eap" and "eap-ig" do the same for the edges of the residual stream, from the embedding, single
    heads and MLPs to attention blocks (queries, keys and values together), MLPs and the logits:
    (difference of what the upstream part writes) times (gradient at what the downstream part
    alone reads), summed over positions.

    Args:
        clean: a prompt, or several, as in `patch`.
        corrupt: as many, each of as many tokens as its clean one.
        metric: as in `patch`; a function must be differentiable.
        method: "atp", "ig", "eap" or "eap-ig".
        answers: as in `patch`.
        sites: for "atp" and "ig": "resid_post", "resid_pre", "attn_out", "mlp_out", "head".
        steps: points of the path, for "ig" and "eap-ig".
        check: how many of the strongest cells or edges are patched exactly, and how many others
            drawn at random; 0: none.
        seed: of the cells drawn.

    Returns:
        Result: for "atp" and "ig" each site [pair, layer, position] ("head": [pair, layer,
        position, head]), in the units of `patch` (the whole difference is 1), nan where a prompt
        is shorter. For "eap" edges [pair, from, to] (nan where nothing flows), labels from and to.
        clean and corrupt [pair], the metric. checked [pair, cell, (estimate, exact)]. Rows: the
        strongest, with estimate and exact effect.

    Raises:
        TextError: as in `patch`, and a method that does not exist.
        ModelError: a model whose logits are not unembed(norm(state)); for edges, one in which what
            reads the residual stream was not found.

    Use when:
        `patch` over all cells is too dear, or you want edges, of which there are thousands.

    Not when:
        The exact grid is affordable: it is right where this is an estimate. Trust an estimate no
        further than its correlation with exact patching, which the summary gives.

    Cost:
        one forward pass for both prompts and one forward and backward ("ig": `steps` of them), of
        the tokens after what the prompts share; and the exact check.

    Controls:
        the strongest cells patched exactly, and cells drawn at random beside them.

    Paper:
        2310.10348 (EAP), 2403.17806 (EAP-IG), 2403.00745 (AtP)

    Example:
        from tool_packs.attribution import attribute
        r = attribute(m, "the cat sat on the mat", "the dog sat on the mat", answers=("he", "she"))
        r["resid_post"].shape  # [pair 1, layer, position]
        r.rows[0]  # the strongest cell: estimate and exact
    """
    started = time.perf_counter()
    refuse_inexact(m)
    if method not in METHODS:
        raise TextError(f"no method {method!r}: {', '.join(map(repr, METHODS))}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise TextError(f"steps={steps!r}: give a whole number of at least 1")
    edges = method.startswith("eap")
    names = [site_name(s) for s in ([sites] if isinstance(sites, str) else sites)]
    pairs = read_pairs(m, clean, corrupt, m)
    points = steps if method.endswith("ig") else 0
    generator = torch.Generator().manual_seed(seed)
    found, rows, lines = [], [], []
    for i, (pair, a) in enumerate(zip(pairs, answers_of(answers, len(pairs)), strict=True)):
        run = record_pair(m, pair, PARTS if edges else names, None, metric, a)
        if edges:
            table = _edges(run, points)
            cells = _pick(table, check, generator)
            exact = _exact_edges(run, cells)
        else:
            table = _nodes(run, names, points)
            cells = _pick(table, check, generator)
            exact = _exact_nodes(run, names, cells)
        estimate = torch.tensor([table[cell].item() for cell in cells])
        checked = torch.stack([estimate, exact], -1)  # [cells, 2]
        found.append((run, table, checked))
        top = len(cells) // 2 if check else 0
        lines.append(
            f"pair {i}: {run.name} {run.high:.3g} clean, {run.low:.3g} corrupt{run.note}"
            + _told(checked, top)
        )
        for cell, (guess, truth) in list(zip(cells, checked.tolist(), strict=True))[:top]:
            where = _edge_row(m, cell) if edges else _node_row(run, names, cell)
            rows.append({"pair": i, **where, "estimate": round(guess, 4), "exact": round(truth, 4)})
    tensors, dims, labels = _tables(m, names, found, edges)
    figure = {"kind": "grid", "values": "edges" if edges else names[0]}
    figure |= {"label": f"{method} (the whole difference is 1)"}
    if names[0] != "head" and not edges:
        figure["ticks"] = "tokens"
    return Result(
        title=f"{method} of {len(pairs)} pairs",
        tensors=to_cpu(tensors),
        dims=dims,
        labels=labels,
        rows=rows,
        lines=lines,
        figure=figure if edges or names[0] != "head" else None,
        provenance=provenance(
            m,
            "attribute",
            started,
            prompts=[p.ids for pair in pairs for p in (pair.clean, pair.corrupt)],
            seed=seed,
            metric=metric if isinstance(metric, str) else getattr(metric, "__name__", "function"),
            method=method,
            sites=names,
            steps=points,
        ),
    )


# Gradients


def _gradients(run: Run, reads: Sequence[tuple[str, int]], points: int) -> list[Tensor]:
    """Mean gradient of the metric [T - start, ...] at each (site, layer), on the unit scale.

    With `points`, over as many midpoints of the straight line from the corrupt to the clean
    embeddings; else in the corrupt run.
    """
    m = run.m
    low, high = (rec.at("resid_pre", 0) for rec in (run.corrupt, run.clean))
    share = (torch.arange(points) + 0.5) / points if points else torch.zeros(1)
    sums: list[Tensor] = []
    size = max(1, m.batch_tokens // (4 * len(run.corrupt.ids)))  # the graph is kept as well
    for part in share.to(low.device, low.dtype).split(size):
        x = low + part[:, None, None] * (high - low)  # [P, T - start, d]
        seen: dict[tuple[str, int], Tensor] = {}

        def keep(key: tuple[str, int], into: Any = seen) -> Callable[[Tensor], None]:
            return lambda states: into.__setitem__(key, states)

        with torch.enable_grad():
            x = x.detach().requires_grad_()
            wanted = [(site, layer, keep((site, layer))) for site, layer in reads]
            final = stack(run.corrupt, {0: x}, rows=len(x), reads=wanted)[:, -1]
            value = run.score(logits_of(m, final)).sum()
            if not value.requires_grad:
                raise TextError("the metric has no gradient: use torch operations on the logits")
            at = [seen[key] for key in reads]
            with fitting(m, len(x), len(run.corrupt.ids)):
                grads = torch.autograd.grad(value, at, allow_unused=True)
        full = [torch.zeros_like(h) if g is None else g for g, h in zip(grads, at, strict=True)]
        # Plain hooks run the whole prompt, and a recording begins behind what is shared.
        part_sums = [g.float().sum(0)[-len(low) :] for g in full]
        sums = [a + b for a, b in zip(sums, part_sums, strict=True)] if sums else part_sums
    return [g / (len(share) * (run.high - run.low)) for g in sums]


def _difference(run: Run, site: str, layer: int) -> Tensor:
    """Clean minus corrupt at a site [T - start, d] or [T - start, heads, head_dim]."""
    return run.clean.at(site, layer).float() - run.corrupt.at(site, layer).float()


# Nodes


def _nodes(run: Run, sites: Sequence[str], points: int) -> Tensor:
    """Estimates [site, L, T, heads or 1]; nan in the columns that a site does not have."""
    m = run.m
    s = m.structure
    reads = [(site, layer) for site in sites for layer in range(m.n_layers)]
    heads = s.heads if "head" in sites else 1
    out = torch.full((len(sites), m.n_layers, len(run.corrupt.ids), heads), float("nan"))
    gradients = _gradients(run, reads, points)
    for (site, layer), gradient in zip(reads, gradients, strict=True):
        delta = _difference(run, site, layer)
        if site == "head":
            gradient = gradient.unflatten(-1, (s.heads, s.head_dim))
        score = (delta.to(gradient.device) * gradient).sum(-1)  # [T - start] or [.., heads]
        score = score if site == "head" else score[:, None]
        k = sites.index(site)
        out[k, layer, : run.corrupt.start, : score.shape[1]] = 0.0
        out[k, layer, run.corrupt.start :, : score.shape[1]] = score.cpu()
    return out


def _exact_nodes(run: Run, sites: Sequence[str], cells: Sequence[tuple[int, ...]]) -> Tensor:
    changes, live = [], []
    for i, (k, layer, position, column) in enumerate(cells):
        if position < run.start:
            continue  # both runs are the same there
        head = column if sites[k] == "head" else None
        values = at_columns(run.clean, sites[k], layer, [position], head)
        changes.append(Change(sites[k], layer, [position], values, head))
        live.append(i)
    return _effects(run, changes, live, len(cells))


def _effects(run: Run, changes: Sequence[Change], live: Sequence[int], n: int) -> Tensor:
    out = torch.zeros(n)
    if changes:
        final = sweep(run.corrupt, changes, prefix=run.prefix)
        with torch.no_grad():
            out[list(live)] = run.normal(score_states(run, final)).cpu()
    return out


def _node_row(run: Run, sites: Sequence[str], cell: tuple[int, ...]) -> dict[str, Any]:
    k, layer, position, column = cell
    row = {"site": sites[k], "layer": layer, "position": position, "token": run.tokens[position]}
    return row | ({"head": column} if sites[k] == "head" else {})


# Edges


def upstream(m: Model) -> list[str]:
    """The parts that write to the residual stream, in order: embedding, then heads and MLP."""
    per_layer = [
        [*(f"{layer}.head{h}" for h in range(m.structure.heads)), f"{layer}.mlp"]
        for layer in range(m.n_layers)
    ]
    return ["embedding", *(name for names in per_layer for name in names)]


def downstream(m: Model) -> list[str]:
    """The parts that read it: attention and MLP of each layer, and the logits."""
    names = [name for layer in range(m.n_layers) for name in (f"{layer}.attn", f"{layer}.mlp")]
    return [*names, "logits"]


@torch.no_grad()
def _written(run: Run, part: int) -> Tensor:
    """Clean minus corrupt of what an upstream part writes [T - start, d]."""
    if part == 0:
        return _difference(run, "resid_pre", 0)
    layer, k = divmod(part - 1, run.m.structure.heads + 1)
    if k == run.m.structure.heads:
        return _difference(run, "mlp_out", layer)
    return _head_writes(run, layer, k, run.clean) - _head_writes(run, layer, k, run.corrupt)


def _head_writes(run: Run, layer: int, head: int, rec: Recording) -> Tensor:
    """What one head adds to the stream [T - start, d], without the mix's bias.

    A norm after attention (Gemma) is held at the scale that it has in this run, so that the heads
    sum to what attention adds.
    """
    s = run.m.structure
    mix = s.head_mix[layer]
    z = rec.at("head", layer)  # [T - start, heads, head_dim]
    alone = torch.zeros_like(z)
    alone[:, head] = z[:, head]
    nothing = mix(torch.zeros_like(z).flatten(1)[None])[0].float()
    written = mix(alone.flatten(1)[None])[0].float() - nothing
    mixed, added = mix(z.flatten(1)[None])[0].float(), rec.at("attn_out", layer).float()
    added = added.to(mixed.device)
    if torch.allclose(mixed, added, rtol=1e-4, atol=1e-4 * added.abs().max().item()):
        return written
    return written * torch.where(mixed == 0, torch.zeros_like(mixed), added / mixed)


def _flows(m: Model) -> Tensor:
    """Whether what each part writes reaches what each other reads [from, to]."""
    heads, found = m.structure.heads, readers(m)
    out = torch.zeros(1 + m.n_layers * (heads + 1), 2 * m.n_layers + 1, dtype=torch.bool)
    out[0] = True
    for layer in range(m.n_layers):
        first = 1 + layer * (heads + 1)
        out[first : first + heads + 1, 2 * layer + 2 :] = True
        if found[layer]["mlp_in"].sees_attention:
            out[first : first + heads, 2 * layer + 1] = True
    return out


def _edges(run: Run, points: int) -> Tensor:
    """Estimates [from, to], nan where nothing flows."""
    m = run.m
    flows = _flows(m)
    reads = [(site, layer) for layer in range(m.n_layers) for site in INPUTS]
    reads.append(("resid_post", m.n_layers - 1))
    gradients = torch.stack([g.cpu() for g in _gradients(run, reads, points)])  # [to, T', d]
    out = torch.full(flows.shape, float("nan"))
    for part in range(len(flows)):
        scores = torch.einsum("td,vtd->v", _written(run, part).cpu(), gradients)
        out[part, flows[part]] = scores[flows[part]]
    return out


def _exact_edges(run: Run, cells: Sequence[tuple[int, ...]]) -> Tensor:
    """The effect of giving one part's clean output to one reader alone."""
    last = 2 * run.m.n_layers
    columns = list(range(run.corrupt.start, len(run.corrupt.ids)))
    changes = []
    for part, reader in cells:
        values = _written(run, part)
        if reader == last:
            change = Change("resid_post", run.m.n_layers - 1, columns, values, add=True)
        else:
            change = Change(INPUTS[reader % 2], reader // 2, columns, values, add=True)
        changes.append(change)
    return _effects(run, changes, range(len(cells)), len(cells))


def _edge_row(m: Model, cell: tuple[int, ...]) -> dict[str, Any]:
    return {"from": upstream(m)[cell[0]], "to": downstream(m)[cell[1]]}


# Checks and tables


def _pick(table: Tensor, check: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """The strongest cells, then as many of the others drawn at random."""
    flat = table.flatten()
    present = flat.isfinite().nonzero().flatten()
    order = present[flat[present].abs().argsort(descending=True)]
    n = min(check, len(order) // 2)
    rest = order[n:]
    # Where nothing differs yet the estimate is 0 and right: such cells would flatter it.
    rest = rest[flat[rest] != 0] if (flat[rest] != 0).any() else rest
    drawn = rest[torch.randperm(len(rest), generator=generator)[:n]]
    chosen = torch.cat([order[: len(drawn)], drawn]).tolist()
    shape = table.shape
    return [tuple(int(x) for x in torch.unravel_index(torch.tensor(c), shape)) for c in chosen]


def _told(checked: Tensor, top: int) -> str:
    if top < 2:
        return "; not checked by exact patching"
    x, y = checked.T
    r = torch.corrcoef(torch.stack([x, y]))[0, 1].item()
    return (
        f"; correlation with exact patching {r:.3f} over {len(x)} checked; exact effect of the "
        f"{top} strongest {mean_sd(y[:top].abs())}, of {top} drawn at random "
        f"{mean_sd(y[top:].abs())}"
    )


def _tables(
    m: Model, sites: Sequence[str], found: Sequence[tuple[Run, Tensor, Tensor]], edges: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]], dict[str, list[Any]]]:
    n = max(len(checked) for _, _, checked in found)
    checks = torch.full((len(found), n, 2), float("nan"))
    for i, (_, _, checked) in enumerate(found):
        checks[i, : len(checked)] = checked
    tensors = {
        "checked": checks,
        "clean": torch.tensor([run.high for run, _, _ in found]),
        "corrupt": torch.tensor([run.low for run, _, _ in found]),
    }
    dims: dict[str, tuple[str, ...]] = {
        "checked": ("pair", "cell", "estimate_exact"),
        "clean": ("pair",),
        "corrupt": ("pair",),
    }
    labels: dict[str, list[Any]] = {"tokens": [run.tokens for run, _, _ in found]}
    if edges:
        tensors["edges"] = torch.stack([table for _, table, _ in found])
        dims["edges"] = ("pair", "from", "to")
        return tensors, dims, labels | {"from": upstream(m), "to": downstream(m)}
    longest = max(len(run.tokens) for run, _, _ in found)
    for k, site in enumerate(sites):
        heads = m.structure.heads if site == "head" else 1
        out = torch.full((len(found), m.n_layers, longest, heads), float("nan"))
        for i, (run, table, _) in enumerate(found):
            out[i, :, : len(run.tokens)] = table[k, ..., :heads]
        tensors[site] = out if site == "head" else out[..., 0]
        dims[site] = ("pair", "layer", "position", "head")[: tensors[site].ndim]
    return tensors, dims, labels | {"layer": list(range(m.n_layers))}
