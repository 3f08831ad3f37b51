"""Steer the model along a vector: sweeps with coherence and random controls, and a context."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import collect
from tool_packs.engine import FOREVER, Intervention, all_logits, editing, shown_batches
from tool_packs.errors import TextError
from tool_packs.generation import complete, decode, last_logits
from tool_packs.prompts import Prompt, Text, as_chat, as_list, read, word_ids
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["intervention", "steer", "steering"]

QUESTIONS = (
    "Tell me about yourself.",
    "What did you do today?",
    "Write a short story.",
    "What do you think about the future?",
)


def intervention(
    m: Model,
    vec: Tensor,
    layer: int | float,
    strength: float = 1.0,
    *,
    start: int | str = 0,
    stop: int | str | None = None,
    edit: Callable[[Tensor], Tensor] | None = None,
) -> Intervention:
    """What should be added to the residual stream, where, and from which token on?

    Makes the object that `generate`, `capture`, `next_token` and `logit_lens` take as `steer`. It
    can be scaled and negated: `2 * x`, `-x`.

    Args:
        vec: [d], or [layer, d] (as `direction` gives for all layers): that layer's row is taken.
        layer: after which layer; an int or a depth in 0..1.
        strength: the vector is multiplied by this.
        start: first position changed: an int, "last", "last_user", "assistant_start".
        stop: first position no longer changed; None: all later tokens are, decoded ones too.
        edit: in place of adding: a function from states [n, d] to states [n, d]; vec is not used.

    Returns:
        Intervention: to be given as steer=.

    Raises:
        TextError: a vector or layer that does not fit this model.

    Use when:
        Rows of one batch are to be steered differently, or from a certain token on.

    Not when:
        You want a sweep with controls: `steer`.

    Cost:
        none until it is used; then an addition a layer.

    Controls:
        None of its own: steer a row with a random vector of the same norm beside it.

    Paper:
        arXiv 2308.10248

    Example:
        from tool_packs.steering import intervention
        from tool_packs.generation import generate
        x = intervention(m, torch.ones(m.width), 0.5, strength=0.2, start="assistant_start")
        r = generate(m, ["Who are you?"] * 3, steer=[None, x, -x], max_new_tokens=4)
        r["text"]
    """
    index = m.layer_index(layer)
    if edit is not None:
        return Intervention(index, None, 1.0, edit, start, stop)
    return Intervention(index, _vector(m, vec, index), float(strength), None, start, stop)


@contextlib.contextmanager
def steering(
    m: Model,
    vec: Tensor,
    layer: int | float,
    strength: float = 1.0,
    *,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Model]:
    """What does the model do while this vector is added, in any code of your own?

    Within it every forward pass of `m.hf` is steered, transformers' `generate` included; afterwards
    nothing is left, whatever happened inside.

    Args:
        vec: as in `intervention`.
        layer: as in `intervention`.
        strength: the vector is multiplied by this.
        start: first position changed, as a number.
        stop: first position no longer changed; None: all later tokens, decoded ones too.

    Returns:
        a context manager that gives m.

    Raises:
        TextError: a vector, layer or position that does not fit.

    Use when:
        You call the model yourself, through transformers or another technique.

    Not when:
        `generate(steer=...)` does it: rows can differ there, and positions have names.

    Cost:
        an addition a forward pass.

    Controls:
        None of its own: repeat with a random vector of the same norm.

    Paper:
        arXiv 2308.10248

    Example:
        from tool_packs.steering import steering
        from tool_packs.generation import next_token
        ids = m.tokenizer("the cat", return_tensors="pt")["input_ids"].to(m.device)
        with steering(m, torch.ones(m.width), 1, strength=0.5):
            words = m.hf.generate(ids, max_new_tokens=4, do_sample=False)
            r = next_token(m, "the cat")
    """
    for position in (start, stop):
        if position is not None and (not isinstance(position, int) or position < 0):
            raise TextError(
                f"position {position!r}: here the prompt is not known, so give a number >= 0; "
                "generate(steer=intervention(...)) knows names"
            )
    change = intervention(m, vec, layer, strength, start=start, stop=stop)
    with editing(m, [(change,)], [[(start, FOREVER if stop is None else stop)]]):
        yield m


def steer(
    m: Model,
    vec: Tensor,
    layer: int | float,
    *,
    strengths: Sequence[float] = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0),
    convs: Text = QUESTIONS,
    scorer: Callable[[str], float] | None = None,
    towards: Sequence[str] = (),
    away: Sequence[str] = (),
    n_random: int = 2,
    max_new_tokens: int = 32,
    start: int | str = 0,
    seed: int = 0,
) -> Result:
    """Does adding this vector change what the model says, more than a random vector of its norm?

    All strengths, of the vector and of the random controls, are rows of one batch. Coherence is the
    mean log probability of the steered text under the unsteered model: where it falls far below
    that of strength 0, the effect is damage.

    Args:
        vec: as in `intervention`.
        layer: as in `intervention`.
        strengths: multiples of the vector; 0 is always added.
        convs: as in `generate`; four open questions unless given.
        scorer: text -> number, averaged over the answers.
        towards: words whose next-token log probability minus that of `away` is the effect, read at
            the first token of the answer; without a scorer.
        away: the opposite words.
        n_random: random vectors of the same norm, steered at the same strengths.
        max_new_tokens: length of the answers.
        start: first position changed.
        seed: of the random vectors; answers are greedy.

    Returns:
        Result: effect [strength], effect_random [strength, control], coherence [strength] (nats a
        token), coherence_random [strength, control], effect_answers [strength, conv]; rows arm,
        strength, norm_ratio (what is added over the stream's norm), effect, coherence, example.
        The unit of effect is the scorer's, or nats.

    Raises:
        TextError: neither scorer nor towards is given, or a vector that does not fit.

    Use when:
        You have a direction and want causal evidence that it does what its name says.

    Not when:
        The effect you score is the one the direction was chosen by: choose on other texts.

    Cost:
        (strengths * (1 + n_random) * convs) rows decoded in one batch, and one pass to score them.

    Controls:
        random vectors of the same norm, and coherence under the unsteered model: both by default.

    Paper:
        arXiv 2308.10248, 2312.06681

    Example:
        from tool_packs.steering import steer
        v = m.embed(torch.tensor([9]))[0]
        r = steer(m, v, 0.5, strengths=[-2, 2], towards=["she"], away=["he"], max_new_tokens=4)
        r["effect"], r["effect_random"], r["coherence"]
    """
    started = time.perf_counter()
    if scorer is None and not towards:
        raise TextError(
            "say what to measure: scorer=(text -> number), or towards=[words], away=[words]"
        )
    if scorer is not None and towards:
        raise TextError("give scorer or towards, not both: each is a measure of its own")
    index = m.layer_index(layer)
    vector = _vector(m, vec, index)
    generator = torch.Generator().manual_seed(seed)
    levels = sorted({float(s) for s in strengths} | {0.0})
    arms = [vector, *(_random_like(vector, generator) for _ in range(n_random))]  # each [d]
    prompts = read(m, [as_chat(m, c) for c in as_list(convs)])
    plan = [(a, s, c) for a in range(len(arms)) for s in levels for c in range(len(prompts))]
    # Strength 0 is the same row in every arm: it is computed once.
    distinct = [(a, s, c) for a, s, c in plan if a == 0 or s != 0]
    rows_prompts = [prompts[c] for _, _, c in distinct]
    changes = [(Intervention(index, arms[a], s, None, start),) if s else () for a, s, _ in distinct]
    answers = [
        done[0] for done in complete(m, rows_prompts, max_new_tokens=max_new_tokens, steer=changes)
    ]
    texts = [decode(m, answer.ids) for answer in answers]
    coherent = mean_logprob(m, rows_prompts, [answer.ids for answer in answers])  # [rows]
    if scorer is not None:
        effects = torch.tensor([float(scorer(text)) for text in texts])
    else:
        effects = _word_difference(m, rows_prompts, changes, towards, away)
    where = {key: i for i, key in enumerate(distinct)}
    pick = torch.tensor([where[a if s else 0, s, c] for a, s, c in plan])
    shape = (len(arms), len(levels), len(prompts))
    effect = effects[pick].reshape(shape)  # [arm, strength, conv]
    coherence = coherent[pick].reshape(shape)
    stream = _stream_norm(m, prompts, index)
    rows = []
    for a in range(len(arms)):
        for j, s in enumerate(levels):
            rows.append(
                {
                    "arm": "vector" if a == 0 else f"random {a}",
                    "strength": s,
                    "norm_ratio": round(abs(s) * vector.norm().item() / stream, 4),
                    "effect": round(effect[a, j].mean().item(), 4),
                    "coherence": round(coherence[a, j].mean().item(), 4),
                    "example": texts[where[a if s else 0, s, 0]][:200],
                }
            )
    zero = levels.index(0.0)
    unit = "score" if scorer is not None else "nats"
    lines = [
        f"strength 0: effect {effect[0, zero].mean():.3g} {unit}, "
        f"coherence {coherence[0, zero].mean():.2f} nats a token"
    ]
    for j, s in enumerate(levels):
        if j != zero and len(lines) < 12:
            change = (effect[0, j] - effect[0, zero]).mean()
            control = (effect[1:, j] - effect[0, zero]).mean(1)
            beside = (
                ", ".join(f"{c:+.3g}" for c in control.tolist())
                if n_random
                else "none (n_random=0)"
            )
            lines.append(
                f"strength {s:+g}: effect {change:+.3g}; control, random vectors: {beside}; "
                f"coherence {coherence[0, j].mean():.2f}, "
                f"random {coherence[1:, j].mean():.2f}"
            )
    tensors = {
        "effect": effect[0].mean(-1),
        "effect_random": effect[1:].mean(-1).T,
        "coherence": coherence[0].mean(-1),
        "coherence_random": coherence[1:].mean(-1).T,
        "effect_answers": effect[0],
    }
    panels = [["effect"], ["coherence"]]
    bands = {}
    if n_random:
        panels = [["effect", "effect_random"], ["coherence", "coherence_random"]]
        bands = {"effect_random": "control", "coherence_random": "control"}
    return Result(
        title=f"steering after layer {index}, {len(prompts)} conversations",
        tensors=to_cpu(tensors),
        dims={
            "effect": ("strength",),
            "effect_random": ("strength", "control"),
            "coherence": ("strength",),
            "coherence_random": ("strength", "control"),
            "effect_answers": ("strength", "conv"),
        },
        labels={"strength": levels},
        rows=rows,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "strength",
            "panels": panels,
            "bands": bands,
            "units": [f"effect ({unit})", "log probability (nats a token)"],
        },
        provenance=provenance(
            m,
            "steer",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layer=index,
            strengths=levels,
            n_random=n_random,
            max_new_tokens=max_new_tokens,
            start=start,
            vector_norm=round(vector.norm().item(), 4),
            measure="scorer" if scorer is not None else f"{list(towards)} - {list(away)}",
        ),
    )


def mean_logprob(m: Model, prompts: Sequence[Prompt], answers: Sequence[Sequence[int]]) -> Tensor:
    """Mean log probability [N] of each answer's tokens after its prompt, unsteered, in nats."""
    joined = [Prompt((*p.ids, *ids), p.text) for p, ids in zip(prompts, answers, strict=True)]
    out = torch.full((len(joined),), float("nan"))
    for batch in shown_batches(m, joined, "log probabilities"):
        logits = all_logits(m, batch)  # [B, T, V]
        for b, i in enumerate(batch.index):
            first = batch.pad[b] + len(prompts[i])  # column of the answer's first token
            steps = logits[b, first - 1 : -1].float().log_softmax(-1)  # [answer, V]
            chosen = batch.ids[b, first:].to(steps.device)
            out[i] = steps.gather(-1, chosen[:, None]).mean().cpu()
    return out


def _word_difference(
    m: Model,
    prompts: Sequence[Prompt],
    changes: Sequence[tuple[Any, ...]],
    towards: Sequence[str],
    away: Sequence[str],
) -> Tensor:
    logprobs = last_logits(m, prompts, changes).log_softmax(-1)  # [rows, V]
    up = sorted({i for word in towards for i in word_ids(m, word)})
    down = sorted({i for word in away for i in word_ids(m, word)} - set(up))
    effect = logprobs[:, up].logsumexp(-1)
    if down:
        effect = effect - logprobs[:, down].logsumexp(-1)
    return effect.cpu()


def _vector(m: Model, vec: Tensor, layer: int) -> Tensor:
    try:
        vec = torch.as_tensor(vec).detach().float().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TextError(
            f"vec = {vec!r:.80}: give numbers, a tensor or list of [{m.width}] or [{m.n_layers}, {m.width}]"
        ) from error
    if vec.shape == (m.n_layers, m.width):
        vec = vec[layer]
    if vec.shape != (m.width,):
        raise TextError(
            f"vec has shape {tuple(vec.shape)}: give [{m.width}], or [{m.n_layers}, {m.width}] "
            "with a row for each layer"
        )
    if (bad := int((~vec.isfinite()).sum())) > 0:
        raise TextError(f"vec has {bad} of {m.width} values that are NaN or infinite, not finite")
    return vec


def _random_like(vec: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction with the norm of `vec`."""
    guess = torch.randn(vec.shape, generator=generator)
    return guess / guess.norm() * vec.norm()


def _stream_norm(m: Model, prompts: Sequence[Prompt], layer: int) -> float:
    where = [[len(p) - 1] for p in prompts]
    return collect(m, prompts, [layer], where)["resid_post"].norm(dim=-1).mean().item()
