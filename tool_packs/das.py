"""Distributed alignment search: a subspace that, taken from another run, brings its answer along."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import collect
from tool_packs.engine import (
    Batch,
    _keeps_logits,
    batches,
    fitting,
    make_batch,
    removing,
    site_name,
)
from tool_packs.errors import TextError
from tool_packs.generation import last_logits
from tool_packs.prompts import Position, Prompt, Text, read, resolve, word_ids
from tool_packs.replay import _register_edit
from tool_packs.result import Result, mean_sd, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["das"]

FEWEST = 8  # pairs
ARMS = ("unpatched", "learned", "shuffled", "random", "whole state")


def das(
    m: Model,
    base: Text,
    source: Text,
    *,
    answers: Sequence[str | int] | None = None,
    layer: int | float = 0.5,
    position: Position = "last",
    site: str = "resid_post",
    dim: int = 1,
    steps: int = 100,
    batch: int = 16,
    lr: float = 0.05,
    held_out: float = 0.3,
    n_random: int = 5,
    seed: int = 0,
) -> Result:
    """Which few dimensions of a state hold a variable, so that swapping them swaps the answer?

    For each pair the model runs on `base`, and at one layer and position the part of its state that
    lies in a subspace is exchanged for that of the run on `source` (an interchange intervention).
    The subspace is learned, on a part of the pairs, so that the counterfactual's answer comes out.

    Args:
        base: prompts; str is plain text, chats go through the template.
        source: as many: each differs from its base in the variable that is looked for.
        answers: what shall come out with the variable taken from the source, one a pair, as words
            or token ids (of a word the form that is likelier after the source). None: what the
            model says after the source.
        layer: an int or a depth in 0..1.
        position: one position, in base and source alike (an int, "last", "last_user", ...).
        site: "resid_post", "resid_pre", "attn_out" or "mlp_out".
        dim: dimensions of the subspace, 1..d.
        steps: of training.
        batch: pairs a step.
        lr: of Adam on the matrix whose orthonormalised columns span the subspace.
        held_out: share of the pairs on which accuracy is measured and nothing is learned.
        n_random: random subspaces of the same dimension.
        seed: of the split, the beginning, and the controls.

    Returns:
        Result: accuracy [arm, split] of interchange interventions, the share of pairs in which the
        counterfactual's answer has the largest logit of all answers in use (arms unpatched,
        learned, shuffled, random, whole state; splits training, held_out); random [control], held
        out; subspace [d, dim], orthonormal columns; loss [step], in nats; chosen [pair], what comes
        out with the learned subspace (a token), and wanted [pair]. Rows: the arms.

    Raises:
        TextError: unequal numbers of prompts or answers, fewer than 8 pairs, one answer only, more
            than one position, a dim, layer or site that does not exist here, NaN in the states.

    Use when:
        You have a hypothesis (the variable and what it would change) and ask where it is held.

    Not when:
        You ask only at which layer and position: `patch` needs no training. You have few pairs: a
        subspace of many dimensions learns them by heart, as the row "shuffled" shows.

    Cost:
        2 * steps * batch forward and backward passes above the layer (the passes below it are
        forward only), and 2 * pairs * (4 + n_random) forward passes.

    Controls:
        random subspaces of the same dimension; a subspace learned on answers shuffled over the
        pairs, and measured against them; the run as it is; the whole state exchanged.

    Paper:
        arXiv 2303.02536

    Example:
        from tool_packs.das import das
        one = [f"the {a} {b}" for a in ("cat", "dog", "nurse") for b in ("is", "sat", "on", "here")]
        r = das(m, one, one[5:] + one[:5], layer=1, dim=2, steps=8)
        r["accuracy"], r["subspace"].shape
    """
    started = time.perf_counter()
    index, site = m.layer_index(layer), site_name(site)
    if site == "head":
        raise TextError('site "head" has no one state at a position: use attn_out')
    if not 1 <= dim <= m.width:
        raise TextError(f"dim={dim}: a state of this model has 1..{m.width} dimensions")
    if steps < 1 or batch < 1 or n_random < 1 or not 0 < held_out < 1:
        raise TextError(
            f"steps={steps}, batch={batch} and n_random={n_random} are at least 1, "
            f"held_out={held_out} in (0, 1)"
        )
    pairs = _read_pairs(m, base, source, position, index, site)
    wanted, choices = _answers(m, pairs, answers)  # [N] into choices [C]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(wanted), generator=generator)
    count = min(max(2, round(held_out * len(order))), len(order) - 4)
    test, train = order[:count], order[count:]
    shuffled = wanted[torch.randperm(len(wanted), generator=generator)]

    bar = _progress(2 * steps)
    with bar:
        begin = torch.randn(m.width, dim, generator=generator)
        options: dict[str, Any] = {"steps": steps, "rows": batch, "lr": lr, "seed": seed}
        learned, loss = _fit(m, pairs, wanted, choices, train, begin, bar, **options)
        by_heart, _ = _fit(m, pairs, shuffled, choices, train, begin, bar, **options)
    randoms = [torch.randn(m.width, dim, generator=generator) for _ in range(n_random)]

    def said(basis: Tensor | None) -> Tensor:
        return _all_logits(m, pairs, basis)[:, choices].argmax(-1)  # [N]

    def right(chosen: Tensor, targets: Tensor = wanted) -> Tensor:
        hits = (chosen == targets).float()
        return torch.stack([hits[train].mean(), hits[test].mean()])  # [split]

    chosen = said(learned)
    by_random = torch.stack([right(said(_orthonormal(r))) for r in randoms])  # [control, split]
    accuracy = torch.stack(
        [
            right(said(torch.zeros(m.width, 1))),
            right(chosen),
            right(said(by_heart), shuffled),
            by_random.mean(0),
            right(said(None)),
        ]
    )  # [arm, split]
    common = wanted[test].bincount().max().item() / len(test)
    seen = {t for i in train.tolist() for t in (pairs.base[i].ids, pairs.source[i].ids)}
    again = sum(pairs.base[i].ids in seen or pairs.source[i].ids in seen for i in test.tolist())
    table = dict(zip(ARMS, accuracy.tolist(), strict=True))
    rows = [
        {"arm": arm, "training": round(a, 4), "held_out": round(b, 4)}
        for arm, (a, b) in table.items()
    ]
    lines = [
        f"interchange accuracy on {len(test)} held-out pairs {table['learned'][1]:.3f} (training "
        f"{table['learned'][0]:.3f}); controls: {n_random} random subspaces "
        f"{mean_sd(by_random[:, 1])}, answers shuffled {table['shuffled'][1]:.3f} (training "
        f"{table['shuffled'][0]:.3f}), unpatched {table['unpatched'][1]:.3f}",
        f"the whole state exchanged {table['whole state'][1]:.3f}; always the commonest of "
        f"{len(choices)} answers {common:.3f}; loss {loss[0]:.3f} -> {loss[-1]:.3f} nats",
    ]
    if again:
        lines.append(f"{again} of the held-out pairs have a text that training saw")
    return Result(
        title=f"{dim} of {m.width} dimensions of {site} {index} at {position!r}, {len(order)} pairs",
        tensors=to_cpu(
            {
                "accuracy": accuracy,
                "random": by_random[:, 1],
                "subspace": learned,
                "loss": loss,
                "chosen": choices[chosen],
                "wanted": choices[wanted],
            }
        ),
        dims={
            "accuracy": ("arm", "split"),
            "random": ("control",),
            "subspace": ("d", "dim"),
            "loss": ("step",),
            "chosen": ("pair",),
            "wanted": ("pair",),
        },
        labels={
            "arm": list(ARMS),
            "split": ["training", "held_out"],
            "answers": [m.tokenizer.decode([t]) for t in choices.tolist()],
            "held_out": sorted(test.tolist()),
        },
        rows=rows,
        lines=lines,
        figure={"kind": "bars", "x": "arm", "y": "held_out"},
        provenance=provenance(
            m,
            "das",
            started,
            prompts=[p.ids for p in (*pairs.base, *pairs.source)],
            seed=seed,
            layer=index,
            position=str(position),
            site=site,
            dim=dim,
            steps=steps,
            batch=batch,
            lr=lr,
            held_out=held_out,
        ),
    )


# Pairs


@dataclass
class Pairs:
    """Base and source prompts, and what stands at the place that is exchanged."""

    base: list[Prompt]
    source: list[Prompt]
    layer: int
    site: str
    where: list[int]  # the position in each base
    states: Tensor  # [N, d] of the sources


def _read_pairs(
    m: Model, base: Text, source: Text, position: Position, layer: int, site: str
) -> Pairs:
    one, two = read(m, base), read(m, source)
    if len(one) != len(two):
        raise TextError(f"{len(one)} base prompts and {len(two)} sources: give as many")
    if len(one) < FEWEST:
        raise TextError(f"{len(one)} pairs: give at least {FEWEST}, as some are held out")
    places = [[resolve(p, position) for p in prompts] for prompts in (one, two)]
    if more := next((w for w in (*places[0], *places[1]) if len(w) != 1), None):
        raise TextError(f"position={position!r} is {len(more)} tokens of a prompt: give one")
    states = collect(m, two, [layer], places[1], (site,))[site][:, 0, 0]  # [N, d]
    if bad := int((~states.isfinite().all(-1)).sum()):
        raise TextError(f"{bad} of {len(states)} states at {site} {layer} hold NaN or infinity")
    return Pairs(one, two, layer, site, [w[0] for w in places[0]], states)


def _answers(m: Model, pairs: Pairs, answers: Sequence[str | int] | None) -> tuple[Tensor, Tensor]:
    """Which answer each pair shall give [N], as an index into the tokens in use [C]."""
    after_source = last_logits(m, pairs.source)  # [N, V]
    if answers is None:
        wanted = after_source.argmax(-1).cpu()
        also = last_logits(m, pairs.base).argmax(-1).cpu()  # what would come out unpatched
    else:
        if isinstance(answers, str) or len(answers) != len(pairs.base):
            raise TextError(f"{len(answers)} answers to {len(pairs.base)} pairs: give one a pair")
        token = {a: _token(m, a, after_source, answers) for a in dict.fromkeys(answers)}
        also = wanted = torch.tensor([token[a] for a in answers])
    choices = torch.cat([wanted, also]).unique()
    if len(choices) < 2:
        word = m.tokenizer.decode(choices.tolist())
        raise TextError(f"all pairs have one answer, {word!r}: nothing can be told by it")
    return torch.searchsorted(choices, wanted), choices


def _token(m: Model, answer: str | int, logits: Tensor, answers: Sequence[str | int]) -> int:
    """One token for this answer in all its pairs: of a word's forms the likeliest there."""
    if isinstance(answer, int):
        if not 0 <= answer < m.vocab_size:
            raise TextError(f"token {answer} is outside this model's 0..{m.vocab_size - 1}")
        return answer
    exact = m.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if answer.startswith(" ") and len(exact) == 1:
        return exact[0]
    mine = logits[[i for i, a in enumerate(answers) if a == answer]].mean(0)
    return max(word_ids(m, answer), key=lambda i: mine[i].item())


# Interchange


def _orthonormal(matrix: Tensor) -> Tensor:
    """An orthonormal basis [d, dim] of the columns' span; gradients pass."""
    return torch.linalg.qr(matrix)[0]


def _logits(m: Model, pairs: Pairs, rows: Batch, basis: Tensor | None) -> Tensor:
    """Next-token logits [B, V] of the bases with the sources' part in the subspace; None: all of it.

    What lies below the layer needs no gradient, and is cut off where the exchange is made.
    """
    at = torch.tensor([pad + pairs.where[i] for i, pad in zip(rows.index, rows.pad, strict=True)])

    def exchange(h: Tensor) -> Tensor:  # [B, T, d]
        h = h.detach().clone()
        b = torch.arange(len(at), device=h.device)
        mine = h[b, at.to(h.device)].float()
        theirs = pairs.states[rows.index].to(h.device)
        change = theirs - mine
        if basis is not None:
            q = basis.to(h.device)
            change = change @ q @ q.T
        h[b, at.to(h.device)] = (mine + change).to(h.dtype)
        return h

    keywords: dict[str, Any] = {"logits_to_keep": 1} if _keeps_logits(m) else {}
    with fitting(m, *rows.ids.shape), removing([]) as handles:
        handles.append(_register_edit(m, pairs.site, pairs.layer, exchange))
        return m.core(**rows.keywords(), use_cache=False, **keywords).logits[:, -1].float()


@torch.no_grad()
def _all_logits(m: Model, pairs: Pairs, basis: Tensor | None) -> Tensor:
    """Next-token logits [N, V] of all pairs."""
    out = torch.empty(len(pairs.base), m.vocab_size)
    for rows in batches(m, pairs.base):
        out[rows.index] = _logits(m, pairs, rows, basis).cpu()
    return out


def _fit(
    m: Model,
    pairs: Pairs,
    wanted: Tensor,
    choices: Tensor,
    train: Tensor,
    begin: Tensor,
    bar: Any,
    *,
    steps: int,
    rows: int,
    lr: float,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """An orthonormal basis [d, dim] that makes the wanted answer likeliest, and the losses."""
    matrix = _orthonormal(begin).to(m.device).requires_grad_()
    optimizer = torch.optim.Adam([matrix], lr=lr)
    generator = torch.Generator().manual_seed(seed + 1)
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        drawn = train[torch.randperm(len(train), generator=generator)[:rows]].tolist()
        some = make_batch(m, pairs.base, drawn)
        with torch.enable_grad():
            logits = _logits(m, pairs, some, _orthonormal(matrix))[:, choices.to(m.device)]
            loss = torch.nn.functional.cross_entropy(logits, wanted[drawn].to(m.device))
            # Not backward(): the model's own weights gather no gradient.
            with fitting(m, *some.ids.shape):
                (matrix.grad,) = torch.autograd.grad(loss, matrix)
        optimizer.step()
        losses.append(loss.detach())
        bar.update()
    return _orthonormal(matrix.detach()).cpu(), torch.stack(losses).cpu()


def _progress(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc="das", leave=False)
