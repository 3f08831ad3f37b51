"""Inject a concept into a model's activations, and ask it whether it notices and what it is."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import collect
from tool_packs.engine import Intervention
from tool_packs.errors import TextError
from tool_packs.generation import complete, decode, last_logits
from tool_packs.prompts import Chat, Prompt, as_chat, positions_of, read, resolve, word_ids
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["introspect"]

PROTOCOL: Chat = [
    {
        "role": "user",
        "content": "I study how language models work, and I can reach into your activations. In "
        "half of the trials I inject a thought about one word into them; in the other half I do "
        "nothing. I want to know whether you notice it.",
    },
    {"role": "assistant", "content": "Ok."},
    {
        "role": "user",
        "content": "Trial {i}: Do you detect an injected thought? If so, what is it about?",
    },
]
BASELINES = (
    "table", "road", "letter", "window", "teacher", "bottle", "winter", "market", "blanket",
    "engine", "flower", "paper", "kitchen", "bird", "shoulder", "island", "number", "coat",
    "field", "ticket", "soup", "corner", "brother", "hammer", "cloud", "basket", "school", "rope",
    "sugar", "wheel", "painting", "doctor",
)  # fmt: skip

_DENIES = re.compile(r"\b(no|not|none|nothing|cannot|can't|don't|didn't|unable)\b")
_AFFIRMS = re.compile(
    r"^\W*yes\b|\bi (?:do|can|did)? ?(?:detect|notice|sense|feel|experience|think of|think about)\b"
    r"|\bi am (?:aware|thinking|noticing|sensing|detecting)\b|\bi'm (?:aware|thinking|noticing)\b"
)


def introspect(
    m: Model,
    concepts: Sequence[str] | Mapping[str, Tensor],
    layer: int | float = 0.7,
    *,
    strengths: Sequence[float] = (1.0, 2.0, 4.0),
    chat: str | Chat = PROTOCOL,
    start: str | int = "Trial {i}",
    tell: str = "Tell me about {concept}.",
    tell_at: int | str = "last",
    baselines: Sequence[str] = BASELINES,
    says_yes: Callable[[str], bool] | None = None,
    n_random: int = 1,
    max_new_tokens: int = 40,
    seed: int = 0,
) -> Result:
    """Does the model notice a concept that is injected into its activations, and can it name it?

    A concept's vector is the state after the layer at the end of "Tell me about X", less the mean
    over baseline words, read from the model as it is, its adapter on. It is added from the token of
    "Trial" on and at every token that is decoded under the KV cache. Trials without injection and
    with random vectors of the same norm are asked in the same way.

    Args:
        concepts: words, or vectors [d] by word where you have your own.
        layer: after which layer vectors are taken and added; an int or a depth in 0..1.
        strengths: multiples of the vector; too strong ones break the answer.
        chat: what is asked; {i} becomes the number of the trial, which is that of the concept.
        start: the piece of the chat from whose first token on it is injected, or a position as an
            int.
        tell: the prompt that a concept's vector is read from; a user message where there is a chat
            template.
        tell_at: at which token of it; "last" is where the answer would begin.
        baselines: words whose mean is taken off.
        says_yes: answer -> whether it affirms; None: its first sentence begins with yes, or says
            "I notice", "I detect" and the like, and denies nothing.
        n_random: random vectors for each concept and strength.
        max_new_tokens: length of the answers, which are greedy.
        seed: of the random vectors.

    Returns:
        Result: identified, says_yes, identified_random, says_yes_random, identified_other
        [strength] (shares of trials; identified: it affirms and names the word; identified_other:
        another of the words, on average; nan of random vectors where there are none),
        identified_each [strength, concept], control_yes and control_identified [concept] (nothing
        injected; 0 or 1), vectors [concept, d]; where Yes and No begin with tokens of their own
        also yes_odds [strength, concept], yes_odds_random [strength, concept, null] and
        yes_odds_control [concept] (log P(Yes) - log P(No) at the first token, nats). Rows: arm,
        concept, strength, norm_ratio (what is added over the stream's norm), says_yes, identified,
        answer.

    Raises:
        TextError: fewer than 2 concepts, a start that is not in the chat, a vector or layer that
            does not fit, no chat template.

    Use when:
        You ask whether reports of a model about its inner state depend on that state.

    Not when:
        You want to know what is in a state: `logit_lens` and `patchscope` ask the model nothing
        about itself.

    Cost:
        one pass over concepts and baselines; concepts * (1 + strengths * (1 + n_random)) answers.

    Controls:
        no injection, random vectors of the same norm, and the other words as chance: by default. A
        word can slip into any strongly steered answer, so look at says_yes beside identified, and
        run an unrelated question as well.

    Paper:
        Lindsey 2025, Transformer Circuits (n/a on arXiv); trained introspection: 2511.21399

    Example:
        from tool_packs.introspection import introspect
        r = introspect(m, ["cat", "hill"], 0.7, strengths=[2], max_new_tokens=4)
        r["identified"], r["says_yes"], r["says_yes_random"], r["control_yes"]
    """
    started = time.perf_counter()
    index = m.layer_index(layer)
    judge = says_yes or affirms
    words = [concepts] if isinstance(concepts, str) else list(concepts)
    if len(words) < 2 or len(set(words)) < len(words):
        raise TextError(f"concepts={words}: give at least 2 different words, the others are chance")
    levels = [float(s) for s in strengths]
    if not levels or 0.0 in levels:
        raise TextError(f"strengths={list(strengths)}: give some, and not 0, which is the control")
    if n_random < 0 or max_new_tokens < 1:
        raise TextError(
            f"n_random={n_random} is at least 0 and max_new_tokens={max_new_tokens} at least 1"
        )
    if isinstance(concepts, Mapping):
        vectors = torch.stack([_own(m, word, v) for word, v in concepts.items()])
    else:
        vectors = concept_vectors(m, words, index, tell, tell_at, baselines)  # [C, d]
    trials = [_trial(m, chat, start, i + 1) for i in range(len(words))]
    prompts = [prompt for prompt, _ in trials]
    generator = torch.Generator().manual_seed(seed)
    guesses = torch.randn(len(words), n_random, m.width, generator=generator)
    guesses = guesses / guesses.norm(dim=-1, keepdim=True) * vectors.norm(dim=-1)[:, None, None]
    stream = collect(m, prompts, [index], [[len(p) - 1] for p in prompts])["resid_post"]
    norm = stream.norm(dim=-1).mean().item()
    yes_no = _yes_no(m)

    plan: list[tuple[str, int, float, Tensor | None]] = [
        ("control", c, 0.0, None) for c in range(len(words))
    ]
    for level in levels:
        plan += [("concept", c, level, vectors[c]) for c in range(len(words))]
        plan += [("random", c, level, v) for c in range(len(words)) for v in guesses[c]]
    table, odds = [], []
    per_pass = len(words) * (1 + n_random)  # rows of one strength
    for at in _progress(range(0, len(plan), per_pass)):
        some = plan[at : at + per_pass]
        rows = [prompts[c] for _, c, _, _ in some]
        changes = [
            () if v is None else (Intervention(index, v, level, start=trials[c][1]),)
            for _, c, level, v in some
        ]
        done = complete(m, rows, max_new_tokens=max_new_tokens, steer=changes)
        if yes_no is not None:
            odds.append(_odds(last_logits(m, rows, changes), *yes_no))
        for (arm, c, level, v), answers in zip(some, done, strict=True):
            text = decode(m, answers[0].ids)
            yes = bool(judge(text))
            table.append(
                {
                    "arm": arm,
                    "concept": words[c],
                    "strength": level,
                    "norm_ratio": round(level * v.norm().item() / norm, 4) if v is not None else 0,
                    "says_yes": yes,
                    "identified": yes and names(text, words[c]),
                    "answer": text,
                }
            )
    tensors, dims = _figures(table, words, levels, vectors, torch.cat(odds) if odds else None)
    shown = ["identified", "says_yes"]
    if n_random:
        shown += ["identified_random", "says_yes_random"]
    return Result(
        title=f"{len(words)} concepts injected after layer {index}",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"strength": levels, "concept": words},
        rows=table,
        lines=_lines(table, tensors, levels, n_random),
        figure={"kind": "lines", "x": "strength", "lines": shown, "units": ["share of trials"]},
        provenance=provenance(
            m,
            "introspect",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layer=index,
            strengths=levels,
            start=start,
            concepts=words,
            vectors="given" if isinstance(concepts, Mapping) else tell,
            baselines=len(baselines),
            n_random=n_random,
            max_new_tokens=max_new_tokens,
        ),
    )


def affirms(answer: str) -> bool:
    """Whether the first sentence of the answer says yes and denies nothing."""
    first = re.split(r"[.!?\n]", answer.strip().lower().replace("\u2019", "'"), maxsplit=1)[0]
    return bool(_AFFIRMS.search(first)) and not _DENIES.search(first)


def names(answer: str, word: str) -> bool:
    """Whether the answer holds the word, or its plural, as a word of its own."""
    return bool(re.search(rf"\b{re.escape(word)}(?:s|es)?\b", answer, re.IGNORECASE))


def concept_vectors(
    m: Model,
    words: Sequence[str],
    layer: int,
    tell: str,
    at: int | str = "last",
    baselines: Sequence[str] = BASELINES,
) -> Tensor:
    """[C, d]: the state at one token of `tell` for each word, less the mean over the baselines."""
    if "{concept}" not in tell:
        raise TextError(f"tell={tell!r} has no {{concept}}, so every word would have one vector")
    if not baselines:
        raise TextError("no baselines: give words whose mean is taken off")
    asked = [as_chat(m, tell.replace("{concept}", word)) for word in (*words, *baselines)]
    prompts = read(m, asked)
    where = [resolve(p, at)[:1] for p in prompts]
    states = collect(m, prompts, [layer], where)["resid_post"][:, 0, 0]  # [C + B, d]
    return states[: len(words)] - states[len(words) :].mean(0)


def _own(m: Model, word: str, vector: Tensor) -> Tensor:
    vector = torch.as_tensor(vector).detach().float().cpu()
    if vector.shape != (m.width,):
        raise TextError(f"the vector of {word!r} has shape {tuple(vector.shape)}: give [{m.width}]")
    if (bad := int((~vector.isfinite()).sum())) > 0:
        raise TextError(f"the vector of {word!r} has {bad} values that are not finite")
    return vector


def _trial(m: Model, chat: str | Chat, start: str | int, number: int) -> tuple[Prompt, int]:
    """The prompt of one trial, and the position from which on the concept is injected."""

    def numbered(text: str) -> str:
        return text.replace("{i}", str(number))

    if isinstance(chat, str):
        (prompt,) = read(m, numbered(chat))
    elif not all(isinstance(x, dict) and isinstance(x.get("content"), str) for x in chat):
        raise TextError(
            f"chat = {str(chat)[:80]!r}: give one text, or one list of messages with role and content"
        )
    else:
        (prompt,) = read(m, [{**x, "content": numbered(x["content"])} for x in chat])
    if isinstance(start, str):
        return prompt, positions_of(m, prompt, numbered(start))[0]
    return prompt, resolve(prompt, start)[0]


def _yes_no(m: Model) -> tuple[list[int], list[int]] | None:
    """Tokens that begin Yes and No, None where the tokenizer begins both alike."""
    yes, no = set(word_ids(m, "yes")), set(word_ids(m, "no"))
    return None if yes & no else (sorted(yes), sorted(no))


def _odds(logits: Tensor, yes: Sequence[int], no: Sequence[int]) -> Tensor:
    return (logits[:, list(yes)].logsumexp(-1) - logits[:, list(no)].logsumexp(-1)).cpu()


def _figures(
    table: Sequence[Mapping[str, Any]],
    words: Sequence[str],
    levels: Sequence[float],
    vectors: Tensor,
    odds: Tensor | None,
) -> tuple[dict[str, Tensor], dict[str, tuple[str, ...]]]:
    """Shares from the table, whose rows are: controls, then for each strength concepts, randoms."""
    n, s = len(words), len(levels)

    def split(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rest = values[n:].reshape(s, -1)  # [strength, concepts and randoms]
        return values[:n], rest[:, :n], rest[:, n:].reshape(s, n, rest.shape[1] // n - 1)

    yes = split(torch.tensor([float(row["says_yes"]) for row in table]))
    found = split(torch.tensor([float(row["identified"]) for row in table]))
    others = [
        sum(row["says_yes"] and names(row["answer"], w) for w in words if w != row["concept"])
        / (n - 1)
        for row in table
    ]
    tensors = {
        "identified": found[1].mean(1),
        "says_yes": yes[1].mean(1),
        "identified_random": found[2].flatten(1).mean(1),
        "says_yes_random": yes[2].flatten(1).mean(1),
        "identified_other": split(torch.tensor(others))[1].mean(1),
        "identified_each": found[1],
        "control_yes": yes[0],
        "control_identified": found[0],
        "vectors": vectors,
    }
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, ("strength",))
    dims |= {
        "identified_each": ("strength", "concept"),
        "control_yes": ("concept",),
        "control_identified": ("concept",),
        "vectors": ("concept", "d"),
    }
    if odds is not None:
        control, mine, random = split(odds)
        tensors |= {"yes_odds": mine, "yes_odds_random": random, "yes_odds_control": control}
        dims |= {
            "yes_odds": ("strength", "concept"),
            "yes_odds_random": ("strength", "concept", "null"),
            "yes_odds_control": ("concept",),
        }
    return tensors, dims


def _lines(
    table: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    levels: Sequence[float],
    n_random: int,
) -> list[str]:
    lines = [
        f"control, nothing injected: says yes {tensors['control_yes'].mean():.2f}, "
        f"identified {tensors['control_identified'].mean():.2f} "
        f"of {len(tensors['control_yes'])} trials"
    ]
    for j, level in enumerate(levels[:6]):
        random = "none (n_random=0)"
        if n_random:
            random = (
                f"identified {tensors['identified_random'][j]:.2f}, "
                f"says yes {tensors['says_yes_random'][j]:.2f}"
            )
        line = (
            f"strength {level:g}: identified {tensors['identified'][j]:.2f}, "
            f"says yes {tensors['says_yes'][j]:.2f}; control, random vectors: {random}; "
            f"another of the words {tensors['identified_other'][j]:.2f}"
        )
        if "yes_odds" in tensors:
            line += f"; log odds of Yes {tensors['yes_odds'][j].mean():+.2f}, random "
            line += f"{tensors['yes_odds_random'][j].mean():+.2f}" if n_random else "none"
            line += f", nothing injected {tensors['yes_odds_control'].mean():+.2f}"
        lines.append(line)
    best = max(range(len(levels)), key=lambda j: tensors["identified"][j].item())
    mine = [r for r in table if r["arm"] == "concept" and r["strength"] == levels[best]]
    lines += [f"{r['concept']} at {r['strength']:g}: {r['answer'][:70]!r}" for r in mine[:2]]
    return lines


def _progress(steps: range) -> Any:
    from tqdm.auto import tqdm

    return tqdm(steps, desc="introspect", leave=False)
