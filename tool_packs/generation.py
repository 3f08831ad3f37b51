"""Let the model write: batched answers, prefills, samples, and the probabilities of next tokens."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.engine import (
    Batch,
    Steer,
    batches,
    editing,
    per_row,
    progress,
    shown_batches,
    span_of,
    spans_of,
    step_logits,
)
from tool_packs.errors import ModelError, TextError
from tool_packs.prefix import prefill as prefill_batch
from tool_packs.prompts import Prompt, Text, as_chat, as_list, read, token_strings, word_ids
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["generate", "next_token"]

ROWS = 128  # decoded together


@dataclass
class Completion:
    """What the model wrote after one prompt."""

    ids: list[int]  # the end-of-answer token included
    logprobs: list[float]
    finished: bool
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]


def generate(
    m: Model,
    convs: Text,
    *,
    prefill: str | None = None,
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    steer: Steer = None,
    logprobs: int = 0,
    raw: bool = False,
) -> Result:
    """What does the model answer, alone, prefilled, sampled or steered?

    All conversations are decoded in batches. A str is one user message where the model has a chat
    template (`raw=True`: a text to go on with); a chat that ends with an assistant message is
    continued inside that message. Greedy answers are those that transformers' own `generate` gives
    to each conversation alone.

    Args:
        convs: a str, a chat [{"role", "content"}, ...], or a list of either.
        prefill: the beginning of the assistant's answer, which the model continues to the letter.
        n: samples for each conversation; use temperature > 0 to have them differ.
        max_new_tokens: the most tokens an answer may have.
        temperature: 0 is greedy.
        top_p: the share of probability that sampling draws from.
        seed: a sample depends on the seed, its conversation's index and its own, not on the batch.
        steer: an Intervention for all, a tuple of them for all, or a list with one entry for each
            conversation (None, an Intervention, or a tuple of them).
        logprobs: this many alternatives are kept for each token.
        raw: a str is plain text, without the chat template.

    Returns:
        Result: rows conv, sample, prompt, prefill, text, tokens, finished, mean_logprob;
        tensors tokens [row, step] (-1 after the end) and logprobs [row, step] in nats (nan after
        the end); with logprobs=k top_ids and top_logprobs [row, step, k]. `r["text"]` is the list
        of answers, without the prefill.

    Raises:
        TextError: a chat that the template refuses, an empty text, a steer of the wrong length.

    Use when:
        You want to see behaviour: asking in a chat, prefill attacks, repeated sampling, steered
        answers.

    Not when:
        Only the next token matters: `next_token` costs one forward pass.

    Cost:
        one prefill of the conversations, what many of them begin with only once, then one pass over
        conversations * n rows a token.

    Controls:
        None of its own: compare prefilled or steered answers with the same call without.

    Paper:
        arXiv 2404.02151 (prefill), 2503.10965 (auditing games)

    Example:
        from tool_packs.generation import generate
        r = generate(m, ["Who are you?", "Name a city."], max_new_tokens=8)
        r["text"]
        generate(m, "Who are you?", prefill="My secret is", n=3, temperature=1.0, max_new_tokens=8)
    """
    started = time.perf_counter()
    if n < 1 or max_new_tokens < 1:
        raise TextError(f"n={n} and max_new_tokens={max_new_tokens}: both are at least 1")
    if temperature < 0 or not 0 < top_p <= 1:
        raise TextError(f"temperature={temperature} must be >= 0 and top_p={top_p} in (0, 1]")
    given = as_list(convs)
    chats = [
        c + (prefill or "") if raw and isinstance(c, str) else as_chat(m, c, prefill) for c in given
    ]
    prompts = read(m, chats)
    done = complete(
        m,
        prompts,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        steer=per_row(steer, len(prompts)),
        top=logprobs,
    )
    rows = []
    for index, (conv, answers) in enumerate(zip(given, done, strict=True)):
        for sample, answer in enumerate(answers):
            rows.append(
                {
                    "conv": index,
                    "sample": sample,
                    "prompt": conv if isinstance(conv, str) else str(conv[-1]["content"]),
                    "prefill": prefill or "",
                    "text": decode(m, answer.ids),
                    "tokens": len(answer.ids),
                    "finished": answer.finished,
                    "mean_logprob": round(sum(answer.logprobs) / len(answer.logprobs), 4),
                }
            )
    flat = [answer for answers in done for answer in answers]
    tensors, dims = _tensors(flat, logprobs)
    lines = [f"[{row['conv']}.{row['sample']}] {row['text'][:160]!r}" for row in rows[:8]]
    if len(rows) > 8:
        lines.append(f"... {len(rows) - 8} more in .rows")
    if not all(row["finished"] for row in rows):
        cut = sum(not row["finished"] for row in rows)
        lines.insert(0, f"{cut} of {len(rows)} answers reached max_new_tokens={max_new_tokens}")
    return Result(
        title=f"{len(rows)} answers to {len(given)} conversations",
        tensors=to_cpu(tensors),
        dims=dims,
        rows=rows,
        lines=lines,
        provenance=provenance(
            m,
            "generate",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            n=n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            prefill=prefill,
            steered=steer is not None,
        ),
    )


def next_token(
    m: Model,
    text: Text,
    candidates: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    *,
    k: int = 10,
    steer: Steer = None,
) -> Result:
    """Which token comes next, and how likely are the words that you care about?

    Args:
        text: a str (plain text), a chat, or a list of either; a chat ends where the answer begins.
        candidates: words, or groups of words by name; a word counts with its single-token forms
            (with and without a space before it, capitalised or not), their probabilities summed.
        k: this many likeliest tokens are kept.
        steer: as in `generate`.

    Returns:
        Result: rows prompt, top (the k likeliest tokens with probabilities), entropy in nats, and
        one column for each candidate (probability); tensors top_ids [prompt, k],
        top_logprobs [prompt, k] and candidate_logprobs [prompt, candidate], in nats.

    Raises:
        TextError: an empty text or a candidate without tokens.

    Use when:
        A forced choice shows the effect: he/she, Yes/No, one city or another.

    Not when:
        The behaviour shows only in a whole answer: `generate`.

    Cost:
        one forward pass over the prompts.

    Controls:
        Give the opposite candidates as well: a probability alone says nothing of a preference.

    Paper:
        n/a

    Example:
        from tool_packs.generation import next_token
        r = next_token(m, ["The doctor said that", "The nurse said that"], ["he", "she"])
        r["he"], r["she"]
    """
    started = time.perf_counter()
    prompts = read(m, text)
    groups: dict[str, list[int]] = {}
    if isinstance(candidates, Mapping):
        groups = {g: [i for w in words for i in word_ids(m, w)] for g, words in candidates.items()}
    else:
        groups = {word: word_ids(m, word) for word in candidates or ()}
    logprobs = last_logits(m, prompts, per_row(steer, len(prompts))).log_softmax(-1)  # [N, V]
    top = logprobs.topk(min(k, logprobs.shape[1]))
    entropy = -(logprobs.exp() * logprobs).nan_to_num().sum(-1)
    scores = [logprobs[:, sorted(set(ids))].logsumexp(-1) for ids in groups.values()]
    rows = []
    for i, prompt in enumerate(prompts):
        names = token_strings(m, top.indices[i].tolist())
        pairs = zip(names, top.values[i].exp().tolist(), strict=True)
        rows.append(
            {
                "prompt": prompt.text[-80:],
                "top": [(name, round(p, 5)) for name, p in pairs],
                "entropy": round(entropy[i].item(), 4),
                **{g: scores[j][i].exp().item() for j, g in enumerate(groups)},
            }
        )
    lines = []
    for row in rows[:8]:
        shown = ", ".join(f"{name!r} {p:.3f}" for name, p in row["top"][:4])
        chosen = ", ".join(f"P({g}) {row[g]:.4f}" for g in groups)
        lines.append(f"…{row['prompt'][-40:]!r}: {chosen + '; ' if chosen else ''}top {shown}")
    tensors = {
        "top_ids": top.indices,
        "top_logprobs": top.values,
        "entropy": entropy,
        "candidate_logprobs": torch.stack(scores, 1) if scores else torch.zeros(len(prompts), 0),
    }
    return Result(
        title=f"next token of {len(prompts)} prompts",
        tensors=to_cpu(tensors),
        dims={
            "top_ids": ("prompt", "k"),
            "top_logprobs": ("prompt", "k"),
            "entropy": ("prompt",),
            "candidate_logprobs": ("prompt", "candidate"),
        },
        labels={"candidate": list(groups)},
        rows=rows,
        lines=lines,
        provenance=provenance(
            m,
            "next_token",
            started,
            prompts=[p.ids for p in prompts],
            candidates={g: token_strings(m, ids) for g, ids in groups.items()},
        ),
    )


def decode(m: Model, ids: Sequence[int]) -> str:
    """The text of generated ids, special tokens left out."""
    return m.tokenizer.decode(
        list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def last_logits(
    m: Model, prompts: Sequence[Prompt], steer: Sequence[tuple[Any, ...]] = ()
) -> Tensor:
    """Logits [N, V] (float32) after each prompt, steered row by row."""
    out: dict[int, Tensor] = {}
    for batch in shown_batches(m, prompts, "next tokens"):
        mine = [steer[i] for i in batch.index] if steer else []
        spans = [[span_of(prompts[i], x) for x in steer[i]] for i in batch.index] if steer else []
        logits, _ = prefill_batch(m, batch, mine, spans)
        out.update(zip(batch.index, logits, strict=True))
    return torch.stack([out[i] for i in range(len(prompts))])


def complete(
    m: Model,
    prompts: Sequence[Prompt],
    *,
    n: int = 1,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    steer: Sequence[tuple[Any, ...]] = (),
    top: int = 0,
) -> list[list[Completion]]:
    """The n completions of each prompt. `generate` and `steer` decode through this."""
    done: list[list[Completion]] = [[] for _ in prompts]
    found = list(batches(m, prompts, rows=max(1, ROWS // n)))
    with progress(len(found) * max_new_tokens, "generate") as bar:  # tokens of a batch at once
        for count, batch in enumerate(found, 1):
            mine = [prompts[i] for i in batch.index]
            changes = [steer[i] for i in batch.index] if steer else []
            uniform = _uniform(seed, batch.index, n, max_new_tokens) if temperature > 0 else None
            answers = _decode(
                m, batch, mine, n, max_new_tokens, temperature, top_p, uniform, changes, top, bar
            )
            bar.update(count * max_new_tokens - bar.n)  # answers may end early
            for row, i in enumerate(batch.index):
                done[i] = answers[row * n : (row + 1) * n]
    return done


@torch.no_grad()
def _decode(
    m: Model,
    batch: Batch,
    prompts: list[Prompt],
    n: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    uniform: Tensor | None,
    steer: list[tuple[Any, ...]],
    top: int,
    bar: Any,
) -> list[Completion]:
    spans = spans_of(prompts, steer)
    logits, cache = prefill_batch(m, batch, steer, spans)
    if cache is None and (n > 1 or max_new_tokens > 1):
        raise ModelError(
            f"{type(m.core).__name__} keeps no key-value cache, and the packs decode with one only: "
            "use m.hf.generate(...), or read it with capture, next_token and the lenses"
        )
    mask, position = batch.mask, batch.positions[:, -1:]
    if n > 1:  # the prefix is computed once; the samples part from here
        cache.batch_repeat_interleave(n)
        logits, mask = logits.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        position = position.repeat_interleave(n, 0)
        steer = [row for row in steer for _ in range(n)]
        spans = [row for row in spans for _ in range(n)]
    rows = logits.shape[0]
    eos = torch.tensor(m.eos_ids, device=logits.device)
    alive = torch.ones(rows, dtype=torch.bool, device=logits.device)
    tokens: list[Tensor] = []
    scores: list[Tensor] = []
    tops: list[tuple[Tensor, Tensor]] = []
    with editing(m, steer, spans):
        for step in range(max_new_tokens):
            logprobs = logits.log_softmax(-1)  # [rows, V]
            if uniform is None:
                chosen = logits.argmax(-1)
            else:
                chosen = _sample(logits / temperature, top_p, uniform[:, step].to(logits.device))
            tokens.append(chosen.masked_fill(~alive, -1))
            scores.append(logprobs.gather(-1, chosen[:, None])[:, 0])
            if top:
                best = logprobs.topk(top)
                tops.append((best.indices, best.values))
            bar.update()
            alive = alive & ~torch.isin(chosen, eos)
            if step + 1 == max_new_tokens or not alive.any():
                break
            position = position + 1
            mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
            fed = chosen[:, None].to(mask.device)
            logits, cache = step_logits(m, fed, mask, position, cache)
    ids = torch.stack(tokens, 1).cpu()  # [rows, steps], -1 after the end
    values = torch.stack(scores, 1).cpu()
    out = []
    for row in range(rows):
        length = int((ids[row] >= 0).sum())
        best_ids = [t[0][row].tolist() for t in tops[:length]]
        best = [t[1][row].tolist() for t in tops[:length]]
        mine = ids[row, :length].tolist()
        finished = bool(mine) and mine[-1] in m.eos_ids
        out.append(Completion(mine, values[row, :length].tolist(), finished, best_ids, best))
    return out


def _uniform(seed: int, index: Sequence[int], n: int, steps: int) -> Tensor:
    """Uniform draws [rows, steps]: a row's depend on seed, conversation and sample alone."""
    draws = []
    for i in index:
        for sample in range(n):
            key = hashlib.sha256(f"{seed}/{i}/{sample}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
            draws.append(torch.rand(steps, generator=generator))
    return torch.stack(draws)


def _sample(logits: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """Tokens [rows] by inverting the cumulative distribution, the likeliest token first."""
    probs, order = logits.softmax(-1).sort(-1, descending=True)
    total = probs.cumsum(-1)
    inside = total - probs < top_p  # the smallest set that reaches top_p
    mass = (probs * inside).sum(-1)
    rank = torch.searchsorted(total, (uniform * mass)[:, None].contiguous(), right=True)[:, 0]
    rank = rank.clamp(max=inside.sum(-1) - 1)
    return order.gather(-1, rank[:, None])[:, 0]


def _tensors(flat: Sequence[Completion], top: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    steps = max(len(c.ids) for c in flat)
    tokens = torch.full((len(flat), steps), -1)
    values = torch.full((len(flat), steps), float("nan"))
    for row, c in enumerate(flat):
        tokens[row, : len(c.ids)] = torch.tensor(c.ids)
        values[row, : len(c.ids)] = torch.tensor(c.logprobs)
    tensors = {"tokens": tokens, "logprobs": values}
    dims: dict[str, Any] = {"tokens": ("row", "step"), "logprobs": ("row", "step")}
    if top:
        ids = torch.full((len(flat), steps, top), -1)
        best = torch.full((len(flat), steps, top), float("nan"))
        for row, c in enumerate(flat):
            ids[row, : len(c.ids)] = torch.tensor(c.top_ids)
            best[row, : len(c.ids)] = torch.tensor(c.top_logprobs)
        tensors |= {"top_ids": ids, "top_logprobs": best}
        dims |= {"top_ids": ("row", "step", "k"), "top_logprobs": ("row", "step", "k")}
    return tensors, dims
