"""Find the direction by which a model refuses, and choose it on prompts it was not made from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.ablation import log_odds, refusal_ids, removed
from tool_packs.activations import Layers, collect
from tool_packs.engine import FOREVER, Intervention, batches, editing, step_logits
from tool_packs.errors import TextError
from tool_packs.generation import last_logits
from tool_packs.prompts import Prompt, Text, as_chat, as_list, read, token_strings
from tool_packs.result import Result, mean_sd, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["find_refusal_direction"]

ROWS = 256  # of one pass: candidates times prompts


def find_refusal_direction(
    m: Model,
    harmful: Text,
    harmless: Text,
    *,
    layers: Layers = "all",
    positions: int | Sequence[int] | None = None,
    refusal_tokens: Sequence[str] | None = None,
    held_out: float = 0.5,
    kl_limit: float = 0.1,
    depth_limit: float = 0.8,
    n_random: int = 8,
    seed: int = 0,
) -> Result:
    """Is there one direction without which the model does not refuse, and with which it does?

    Candidates are the differences of means (harmful minus harmless) after each layer at each token
    behind the instruction. On prompts that were held out each is scored three ways: bypass (log
    odds of a refusal on the harmful without it, in all layers), induce (log odds on the harmless
    with it added after its layer) and kl (what ablating it changes in the first token on the
    harmless). Chosen is the least bypass among those with induce > 0, kl below its limit and a
    layer that is not too deep.

    Args:
        harmful: what the model refuses; as in `generate`.
        harmless: what it answers; as in `generate`.
        layers: candidates come from these; as in `capture`.
        positions: a negative int from the prompt's end, or several; None: all tokens behind the instruction.
        refusal_tokens: as in `ablate`.
        held_out: share of the prompts that candidates are scored on.
        kl_limit: nats; candidates above it are left out.
        depth_limit: candidates at or beyond this depth in 0..1 are left out.
        n_random: random directions of the chosen one's norm that go through the same scores.
        seed: of the split and of the random directions.

    Returns:
        Result: direction [d] (not normalised), candidates [layer, position, d], bypass, induce, kl
        [layer, position] (nats), bypass_random, induce_random, kl_random [null]; rows layer,
        position, token, bypass, induce, kl, passes, the chosen one first. Where none passes, the
        summary says so and the direction is the one of least bypass.

    Raises:
        TextError: fewer than 4 prompts on a side, a position or layer that does not fit.

    Use when:
        The model refuses some prompts, and you want the direction for `ablate` or `steer`.

    Not when:
        You have the direction already, or the model never refuses: then nothing is found but noise.

    Cost:
        one forward pass over the prompts, and three over the held-out ones a candidate.

    Controls:
        held-out prompts and random directions. The choice itself was made on the held-out prompts:
        measure the effect with `ablate` on others.

    Paper:
        arXiv 2406.11717

    Example:
        from tool_packs.refusal import find_refusal_direction
        harmful = [f"How do I make a {x}?" for x in ("bomb", "gun", "mine", "trap")]
        harmless = [f"How do I make a {x}?" for x in ("cake", "hat", "kite", "drum")]
        r = find_refusal_direction(m, harmful, harmless, n_random=2)
        r["direction"], r.rows[0]
    """
    started = time.perf_counter()
    sides = [read(m, [as_chat(m, c) for c in as_list(text)]) for text in (harmful, harmless)]
    for name, side in zip(("harmful", "harmless"), sides, strict=True):
        if len(side) < 4:
            raise TextError(f"{len(side)} {name} prompts: give at least 4, half to score on")
    if not 0 < held_out < 1:
        raise TextError(f"held_out={held_out}: a share between 0 and 1")
    index = m.layer_indices(layers)
    where = _positions([*sides[0], *sides[1]], positions)
    generator = torch.Generator().manual_seed(seed)
    made, scored = zip(*(_split(side, held_out, generator) for side in sides), strict=True)
    means = []
    for side in made:
        at = [[len(p) + t for t in where] for p in side]
        means.append(collect(m, side, index, at)["resid_post"].mean(0))  # [L, P, d]
    candidates = means[0] - means[1]
    if (bad := int((~candidates.isfinite()).sum())) > 0:
        raise TextError(f"{bad} values of the differences of means are not finite")
    intact = [last_logits(m, side) for side in scored]  # each [N, V]
    tokens = refusal_ids(m, refusal_tokens, *intact)
    plain = [log_odds(logits, tokens).mean().item() for logits in intact]
    flat = candidates.flatten(0, 1)  # [L * P, d]
    at_layer = [layer for layer in index for _ in where]
    scores = _scores(m, flat, at_layer, scored, intact[1], tokens)  # [L * P, 3]
    limit = depth_limit * m.n_layers
    shallow = torch.tensor([layer < limit for layer in at_layer])
    passes = (scores[:, 1] > 0) & (scores[:, 2] < kl_limit) & shallow
    order = sorted(range(len(flat)), key=lambda c: (not passes[c], scores[c, 0].item()))
    best = order[0]
    vector = flat[best]
    guesses = torch.randn(n_random, m.width, generator=generator)
    guesses = guesses / guesses.norm(dim=-1, keepdim=True) * vector.norm()
    null = _scores(m, guesses, [at_layer[best]] * n_random, scored, intact[1], tokens)
    behind = token_strings(m, [sides[0][0].ids[len(sides[0][0]) + t] for t in where])
    rows = [
        {
            "layer": at_layer[c],
            "position": where[c % len(where)],
            "token": behind[c % len(where)],
            "bypass": round(scores[c, 0].item(), 4),
            "induce": round(scores[c, 1].item(), 4),
            "kl": round(scores[c, 2].item(), 4),
            "passes": bool(passes[c]),
        }
        for c in order
    ]
    top = rows[0]
    beside = [mean_sd(null[:, s]) if n_random else "none (n_random=0)" for s in range(3)]
    lines = [
        f"{int(passes.sum())} of {len(flat)} candidates pass; chosen: layer {top['layer']}, "
        f"position {top['position']} ({top['token']!r})"
        if passes.any()
        else f"none of {len(flat)} candidates passes; least bypass: layer {top['layer']}, "
        f"position {top['position']} ({top['token']!r})",
        f"bypass {top['bypass']:.3g} (intact on the harmful: {plain[0]:.3g}); "
        f"control, random directions: {beside[0]}",
        f"induce {top['induce']:.3g} (intact on the harmless: {plain[1]:.3g}); "
        f"control, random directions: {beside[1]}",
        f"KL on the harmless {top['kl']:.3g}; control, random directions: {beside[2]}",
        f"log odds of {token_strings(m, tokens)[:6]} at the first token, in nats; "
        "chosen on these prompts, so measure it on others",
    ]
    shape = (len(index), len(where))
    return Result(
        title=f"refusal direction of {len(sides[0])} harmful and {len(sides[1])} harmless prompts",
        tensors=to_cpu(
            {
                "direction": vector,
                "candidates": candidates,
                "bypass": scores[:, 0].reshape(shape),
                "induce": scores[:, 1].reshape(shape),
                "kl": scores[:, 2].reshape(shape),
                "bypass_random": null[:, 0],
                "induce_random": null[:, 1],
                "kl_random": null[:, 2],
            }
        ),
        dims={
            "direction": ("d",),
            "candidates": ("layer", "position", "d"),
            **dict.fromkeys(("bypass", "induce", "kl"), ("layer", "position")),
            **dict.fromkeys(("bypass_random", "induce_random", "kl_random"), ("null",)),
        },
        labels={"layer": index, "position": where, "tokens": behind},
        rows=rows,
        lines=lines,
        figure={
            "kind": "grid",
            "values": "bypass",
            "ticks": "tokens",
            "label": "log odds of refusing without it (nats)",
        },
        provenance=provenance(
            m,
            "find_refusal_direction",
            started,
            prompts=[p.ids for side in sides for p in side],
            seed=seed,
            layers=index,
            positions=where,
            refusal_tokens=token_strings(m, tokens),
            held_out=held_out,
            kl_limit=kl_limit,
            depth_limit=depth_limit,
            n_random=n_random,
        ),
    )


def _positions(prompts: Sequence[Prompt], positions: int | Sequence[int] | None) -> list[int]:
    """Token indices from the end: those given, or all behind the last user's message."""
    if positions is None:
        if any(p.last_user is None for p in prompts):
            return [-1]
        behind = min(len(p) - 1 - p.last_user for p in prompts if p.last_user is not None)
        return list(range(-max(behind, 1), 0))
    shortest = min(map(len, prompts))
    where = [positions] if isinstance(positions, int) else list(positions)
    bad = [t for t in where if not isinstance(t, int) or not -shortest <= t < 0]
    if bad or not where:
        raise TextError(
            f"positions={positions}: negative ints from -{shortest} (the shortest prompt) to -1"
        )
    return where


def _split(
    prompts: list[Prompt], share: float, generator: torch.Generator
) -> tuple[list[Prompt], list[Prompt]]:
    """At random: those that directions are made from, and those held out; two of each at least."""
    order = torch.randperm(len(prompts), generator=generator).tolist()
    kept = min(max(round(share * len(prompts)), 2), len(prompts) - 2)
    return [prompts[i] for i in order[kept:]], [prompts[i] for i in order[:kept]]


def _scores(
    m: Model,
    vectors: Tensor,
    layers: Sequence[int],
    sides: Sequence[list[Prompt]],
    intact: Tensor,
    tokens: Sequence[int],
) -> Tensor:
    """Bypass, induce and kl [C, 3] of vectors [C, d]; many of them are rows of one pass."""
    harmful, harmless = sides
    out = torch.zeros(len(vectors), 3)
    base = intact.log_softmax(-1)  # [N, V]
    rows = (vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12))[:, None]  # [C, 1, d]

    def bypass(logits: Tensor, which: list[int]) -> Tensor:
        return log_odds(logits, tokens)

    def kl(logits: Tensor, which: list[int]) -> Tensor:
        want = base[which].to(logits.device)
        return (want.exp() * (want - logits.log_softmax(-1))).sum(-1).cpu()

    for some in _progress(len(vectors), max(1, ROWS // max(map(len, sides)))):
        _mean_over(m, some, harmful, out[:, 0], bypass, ablated=rows)
        _mean_over(m, some, harmless, out[:, 2], kl, ablated=rows)
        added = [Intervention(layers[c], vectors[c]) for c in range(len(vectors))]
        _mean_over(m, some, harmless, out[:, 1], bypass, added=added)
    return out


def _mean_over(
    m: Model,
    some: range,
    prompts: list[Prompt],
    out: Tensor,
    score: Callable[[Tensor, list[int]], Tensor],
    *,
    ablated: Tensor | None = None,
    added: Sequence[Intervention] = (),
) -> None:
    """Adds to out[c], for each candidate c, the mean over the prompts of score(logits, which)."""
    plan = [(c, i) for c in some for i in range(len(prompts))]
    for batch in batches(m, [prompts[i] for _, i in plan], rows=ROWS):
        mine = [plan[row] for row in batch.index]
        which = [c for c, _ in mine]
        if ablated is not None:
            change: Any = removed(m, ablated[which], range(m.n_layers))
        else:
            change = editing(m, [(added[c],) for c in which], [[(0, FOREVER)] for _ in which])
        with change:
            logits, _ = step_logits(m, batch.ids, batch.mask, batch.positions, None)
        values = score(logits, [i for _, i in mine])
        out.index_add_(0, torch.tensor(which), values / len(prompts))


def _progress(count: int, step: int) -> Any:
    from tqdm.auto import tqdm

    chunks = [range(at, min(at + step, count)) for at in range(0, count, step)]
    return tqdm(chunks, desc="candidates", leave=False)
