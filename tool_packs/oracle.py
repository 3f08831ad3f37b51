"""An oracle: an adapter that is trained to read another model's activations and answer questions."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tool_packs.activations import collect
from tool_packs.engine import Intervention, batches, editing, fitting, spans_of, sparing
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import complete, decode
from tool_packs.prompts import Position, Prompt, Text, read, resolve
from tool_packs.result import Result, mean_sd, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["Oracle", "ask", "load", "train"]

MARK = "\u2402"  # where the activations stand in the chat, until it is cut there
OWN_PROMPT = "{places} {question}"
PUBLISHED_PROMPT = "Layer: {layer}\n{places} \n{question}"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
Example = tuple["str | list[dict[str, Any]]", str, str]  # text, question, answer


@dataclass
class Oracle:
    """A trained oracle: the name of its adapter on `m`, and how activations are put into it.

    `result` holds what it scored on the texts it was not trained on, where it was trained here.
    `save(folder)` writes the adapter, which `load` reads, and that result.
    """

    name: str
    layers: list[int]  # whose activations it was trained on
    into: int  # after which layer they are added
    positions: Position
    slots: int | None  # activations of one question; None: any number
    questions: list[str]  # that it was trained on, as far as they are known
    result: Result | None = field(default=None, repr=False)
    prompt: str = OWN_PROMPT  # how it is asked
    place: str = "?"  # what stands for one activation, a token

    def save(self, m: Model, folder: str | Path) -> Path:
        """Writes the adapter and the held-out scores into `folder`."""
        folder = Path(folder)
        m.hf.save_pretrained(folder, selected_adapters=[self.name])
        if self.result is not None:
            self.result.save(folder / "held_out")
        return folder

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        if self.result is None:
            return {"text/plain": repr(self)}
        return self.result._repr_mimebundle_(include, exclude)


def train(
    m: Model,
    examples: Sequence[Example],
    layers: str | int | float | Sequence[int | float] = 0.5,
    *,
    positions: Position = "last",
    into: int = 0,
    name: str = "oracle",
    rank: int = 8,
    steps: int = 150,
    batch: int = 32,
    lr: float = 3e-3,
    held_out: float = 0.25,
    seed: int = 0,
) -> Oracle:
    """Can a model be taught to say in words what another model's activations hold?

    A fresh LoRA on the same weights learns to answer questions about activations of the base: they
    are added to the stream of the oracle's own prompt, after an early layer, each made as long as
    the state it is added to (norm-matched). The texts are never shown to it.

    Args:
        examples: (text or chat, question, answer); one text may have several questions. Give each
            question with all of its answers in balance, or the oracle learns the common answer.
        layers: whose activations; with several each example has one of them at random.
        positions: of the text, as in `capture`; the same number in every text.
        into: after which layer of the oracle they are added.
        name: of the new adapter.
        rank: of the LoRA.
        steps: of training.
        batch: examples a step.
        lr: peak learning rate; it falls to nothing.
        held_out: share of the texts that are kept for the score.
        seed: of weights, order, halves and controls.

    Returns:
        Oracle: for `ask`; `.result` has accuracy, accuracy_random and accuracy_foreign (answers
        that fit the text when a random vector, or another text's activation, is read instead),
        accuracy_foreign_source (answers that fit that other text), loss [step]; rows question,
        n, accuracy, random, foreign, commonest (the share of the commonest answer).

    Raises:
        TextError: fewer than 8 texts, a position that some text lacks, an answer without tokens.
        ModelError: the name is taken, or nothing in this model is called as LoRA's targets are.

    Use when:
        You have texts whose hidden property you know, and activations whose you do not.

    Not when:
        One property and two answers: a probe costs a hundredth and says the same.

    Cost:
        one forward pass over the texts, and steps * batch rows forward and backward.

    Controls:
        held-out texts; random vectors of the same norm; activations of other texts. An answer that
        the controls give as well was never read.

    Paper:
        arXiv 2412.08686 (LatentQA), 2512.15674 (activation oracles)

    Example:
        from tool_packs.oracle import train, ask
        q = "cat or dog?"
        data = [(f"the {a} sat {w}", q, a) for a in ("cat", "dog") for w in "on mat hill is".split()]
        o = train(m, data, name=f"oracle {len(m.adapters)}", steps=4, batch=4)
        r = ask(m, o, "the cat sat here", q, choices=["cat", "dog"])
    """
    started = time.perf_counter()
    index = m.layer_indices(layers)
    into = m.layer_index(into)
    if steps < 1 or batch < 1 or not 0 < held_out < 1:
        raise TextError(
            f"steps={steps} and batch={batch} are at least 1, held_out={held_out} lies in (0, 1)"
        )
    for example in examples:
        if len(example) != 3 or not isinstance(example[1], str) or not isinstance(example[2], str):
            raise TextError(f"{example!r:.80} is no (text, question, answer)")
    texts, which = _distinct([text for text, _, _ in examples])
    if len(texts) < 8:
        raise TextError(f"{len(texts)} different texts: give at least 8, a quarter is held out")
    prompts = read(m, texts)
    states, slots = _states(m, prompts, index, positions)  # [text, L, slots, d]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator).tolist()
    kept = set(order[: max(2, round(held_out * len(texts)))])
    mine = [i for i in range(len(examples)) if which[i] not in kept]
    theirs = [i for i in range(len(examples)) if which[i] in kept]
    asked = list(dict.fromkeys(question for _, question, _ in examples))
    oracle = Oracle(name, index, into, positions, slots, asked)
    questions = {q: _prompt(m, oracle, q, slots, index[0]) for q in asked}  # names no layer
    answers = [_answer_ids(m, answer) for _, _, answer in examples]
    before = m.active_adapter
    _add_lora(m, name, rank, seed)
    try:
        losses = []
        with _training(m, name) as parameters:
            optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
            for step in _progress(steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * min(1, (step + 1) / 10, 1.25 * (steps - step) / steps)
                drawn = torch.randint(len(mine), (min(batch, len(mine)),), generator=generator)
                chosen = [mine[i] for i in drawn]
                rows = [states[which[i]] for i in chosen]
                at = torch.randint(len(index), (len(chosen),), generator=generator).tolist()
                loss = _loss(
                    m,
                    oracle,
                    [questions[examples[i][1]] for i in chosen],
                    [row[j] for row, j in zip(rows, at, strict=True)],
                    [answers[i] for i in chosen],
                )
                optimizer.zero_grad(set_to_none=True)
                what = f"the gradients of {len(chosen)} examples"
                with sparing(m.device, what, f"lower batch (now {batch})"):
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(loss.item())
        oracle.result = _score(
            m, oracle, examples, which, theirs, states, questions, losses, started, seed
        )
    except BaseException:  # an interrupted oracle is none
        _back(m, before)
        m.hf.delete_adapter(name)
        raise
    _back(m, before)
    return oracle


def load(
    m: Model,
    adapter: str,
    layers: str | int | float | Sequence[int | float] = 0.5,
    *,
    positions: Position = "last",
    into: int = 1,
    prompt: str = PUBLISHED_PROMPT,
    place: str = " ?",
) -> Oracle:
    """What does an oracle that somebody has published say of these activations?

    Defaults are those of the activation oracles of arXiv 2512.15674: the layer is named in the
    prompt, " ?" stands for each activation, and it is added after layer 1. One that was trained
    here and saved takes into=0, prompt="{places} {question}", place="?".

    Args:
        adapter: the name of an adapter that is on `m`, or a folder or hub id to load one from.
        layers: whose activations are read; those it was trained on (paper: 0.25, 0.5, 0.75).
        positions: of the texts, as in `capture`; any number.
        into: after which layer activations are added.
        prompt: how it is asked, with {places} and {question}, and {layer} if it is told the layer.
        place: the text of one token that stands for an activation.

    Returns:
        Oracle: for `ask`, without a result of its own.

    Raises:
        TextError: a prompt without {places} or {question}, a place of several tokens, a layer that
            does not exist.
        ModelError: an adapter that cannot be loaded onto this model.

    Use when:
        An oracle was published for this very model.

    Not when:
        There is none: `train` one on texts whose hidden property you know.

    Cost:
        reading the adapter.

    Controls:
        None of its own: ask it about texts whose answer you know, and read `ask`'s controls.

    Paper:
        arXiv 2512.15674

    Example:
        from tool_packs.oracle import train, load, ask
        q = "cat or dog?"
        data = [(f"the {a} sat {w}", q, a) for a in ("cat", "dog") for w in "on mat hill is".split()]
        o = train(m, data, name=f"oracle {len(m.adapters)}", steps=4, batch=4)
        again = load(m, o.name, o.layers, into=0, prompt="{places} {question}", place="?")
        r = ask(m, again, "the cat sat here", q, choices=["cat", "dog"])
    """
    if missing := [part for part in ("{places}", "{question}") if part not in prompt]:
        raise TextError(
            f"prompt={prompt!r} has no {' and no '.join(missing)}: say where they stand"
        )
    if (count := len(m.tokenizer(place, add_special_tokens=False)["input_ids"])) != 1:
        raise TextError(
            f"place={place!r} is {count} tokens of this model: give the text of one token"
        )
    name = adapter if adapter in m.adapters else m.add_adapter(adapter)
    index, into = m.layer_indices(layers), m.layer_index(into)
    return Oracle(name, index, into, positions, None, [], prompt=prompt, place=place)


def ask(
    m: Model,
    oracle: Oracle,
    text: Text,
    question: str | None = None,
    *,
    choices: Sequence[str] | None = None,
    layers: str | int | float | Sequence[int | float] | None = None,
    positions: Position | None = None,
    adapter: str | None = None,
    foreign: Text | None = None,
    n_random: int = 32,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> Result:
    """What does the oracle say that these activations hold, beyond what it says of anything?

    The activations are those of `m` as it computes now, or with `adapter`; the oracle's own adapter
    is on only while it answers.

    Args:
        oracle: from `train` or `load`.
        text: texts or chats whose activations are read; the oracle does not see the texts.
        question: one that the oracle was trained on, or near to one; None: its first.
        choices: answers to choose from; each is scored by its mean log probability a token.
        layers: whose activations; None: those the oracle was trained on.
        positions: None: those the oracle was trained on; as many as it was trained on.
        adapter: which adapter the activations are read with; None: the one that is active.
        foreign: texts of unrelated content for the second control; None: each text's neighbour.
        n_random: random vectors of the same norm.
        max_new_tokens: length of the free answer.
        seed: of the random vectors; answers are greedy.

    Returns:
        Result: with choices= logprobs [text, layer, choice] (nats, normalised over the choices),
        logprobs_random [null, choice], logprobs_foreign [text, layer, choice] and lift [text,
        layer, choice] (above the mean of the random vectors). Rows: text, layer, answer (free),
        choice, p, p_random, p_foreign, lift of that choice.

    Raises:
        TextError: another number of positions than the oracle was trained on, no choices' tokens.
        ModelError: the oracle's adapter is not on this model.

    Use when:
        You want a first guess in words at what a model represents and does not say.

    Not when:
        lift is near 0: the oracle says this of random vectors too, and nothing was read.

    Cost:
        one forward pass over the texts; (texts * layers * 2 + n_random) * choices short rows.

    Controls:
        random vectors of the same norm and activations of unrelated texts, both on by default.

    Paper:
        arXiv 2412.08686, 2512.15674

    Example:
        from tool_packs.oracle import train, ask
        q = "cat or dog?"
        data = [(f"the {a} sat {w}", q, a) for a in ("cat", "dog") for w in "on mat hill is".split()]
        o = train(m, data, name=f"oracle {len(m.adapters)}", steps=4, batch=4)
        r = ask(m, o, "the cat sat here", q, choices=["cat", "dog"])
    """
    started = time.perf_counter()
    if oracle.name not in m.adapters:
        raise ModelError(
            f"the oracle's adapter {oracle.name!r} is not on this model "
            f"(loaded: {', '.join(m.adapters) or 'none'}): m.add_adapter(folder)"
        )
    if choices is not None and len(choices) < 2:
        raise TextError(f"choices={list(choices)}: give at least two")
    if n_random < 1:
        raise TextError("n_random=0: an oracle's answer means nothing without random vectors")
    if question is None:
        if not oracle.questions:
            raise TextError(
                "no question: nobody knows what this oracle was trained on, so give one"
            )
        question = oracle.questions[0]
    index = oracle.layers if layers is None else m.layer_indices(layers)
    where = oracle.positions if positions is None else positions
    target = m.active_adapter if adapter is None else adapter
    if target == oracle.name:
        raise ModelError("the oracle's own adapter is active: name the one to read with adapter=")
    prompts = read(m, text)
    with m.adapter(target):
        states, slots = _states(m, prompts, index, where)  # [N, L, slots, d]
        if oracle.slots is not None and slots != oracle.slots:
            raise TextError(f"{slots} positions: this oracle was trained on {oracle.slots}")
        if foreign is not None:
            other, there = _states(m, read(m, foreign), index, where)
            if there != slots:
                raise TextError(f"foreign texts have {there} positions and the others {slots}")
            others = other[torch.arange(len(prompts)) % len(other)]
        else:
            others = states.roll(1, 0) if len(prompts) > 1 else None
    generator = torch.Generator().manual_seed(seed)
    norm = states.norm(dim=-1).mean()
    random = torch.randn(n_random, slots, m.width, generator=generator)
    random = random / random.norm(dim=-1, keepdim=True) * norm
    by_layer = [_prompt(m, oracle, question, slots, layer) for layer in index]
    prompt = by_layer[len(index) // 2]  # random vectors are of no layer
    asked = by_layer * len(prompts)
    flat = states.flatten(0, 1)  # [N * L, slots, d]
    shape = (len(prompts), len(index))
    with m.adapter(oracle.name):
        free = _answers(m, oracle, asked, flat, max_new_tokens)
        tensors: dict[str, Tensor] = {}
        dims: dict[str, tuple[str, ...]] = {}
        if choices is not None:
            scores = _choose(m, oracle, asked, flat, choices).unflatten(0, shape)
            null = _choose(m, oracle, [prompt] * n_random, random, choices)  # [R, C]
            tensors = {"logprobs": scores, "logprobs_random": null}
            tensors["lift"] = scores - null.exp().mean(0).log()
            dims = {
                "logprobs": ("text", "layer", "choice"),
                "logprobs_random": ("null", "choice"),
                "lift": ("text", "layer", "choice"),
            }
            if others is not None:
                away = _choose(m, oracle, asked, others.flatten(0, 1), choices)
                tensors["logprobs_foreign"] = away.unflatten(0, shape)
                dims["logprobs_foreign"] = ("text", "layer", "choice")
        some = random[:4]
        random_free = _answers(m, oracle, [prompt] * len(some), some, max_new_tokens)
    rows, lines = [], []
    for i, p in enumerate(prompts):
        for j, layer in enumerate(index):
            row: dict[str, Any] = {
                "text": p.text[-80:],
                "layer": layer,
                "answer": free[i * len(index) + j],
            }
            if choices is not None:
                best = int(tensors["logprobs"][i, j].argmax())
                row |= {
                    "choice": choices[best],
                    "p": round(tensors["logprobs"][i, j, best].exp().item(), 4),
                    "p_random": round(tensors["logprobs_random"][:, best].exp().mean().item(), 4),
                    "lift": round(tensors["lift"][i, j, best].item(), 4),
                }
                if "logprobs_foreign" in tensors:
                    away = tensors["logprobs_foreign"][i, j, best].exp().item()
                    row["p_foreign"] = round(away, 4)
            rows.append(row)
    for row in rows[:6]:
        line = f"…{row['text'][-40:]!r}, layer {row['layer']}: {row['answer'][:60]!r}"
        if choices is not None:
            beside = f", another text {row['p_foreign']:.2f}" if "p_foreign" in row else ""
            line += (
                f"; {row['choice']!r} p {row['p']:.2f}; control, random vectors "
                f"{row['p_random']:.2f}{beside}"
            )
        lines.append(line)
    lines.append(f"control, free answers to random vectors: {random_free}")
    return Result(
        title=f"what the oracle {oracle.name} says of {len(prompts)} texts: {question!r}",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"layer": index, "choice": list(choices or [])},
        rows=rows,
        lines=lines,
        provenance=provenance(
            m,
            "oracle.ask",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            question=question,
            oracle=oracle.name,
            read_with=target,
            layers=index,
            n_random=n_random,
        ),
    )


# The oracle's own prompt


def _prompt(m: Model, oracle: Oracle, question: str, slots: int, layer: int) -> tuple[Prompt, int]:
    """The oracle's prompt, and where its `slots` places for activations begin."""
    if not question.strip():
        raise TextError("an empty question: say what to ask of the activations")
    marked = oracle.prompt.replace("{places}", MARK).replace("{layer}", str(layer))
    marked = marked.replace("{question}", question)
    if m.has_chat_template:
        (prompt,) = read(m, [{"role": "user", "content": marked}])
    else:
        (prompt,) = read(m, f"{marked}\n")
    before, _, after = prompt.text.partition(MARK)
    tokenize = m.tokenizer
    head = list(tokenize(before, add_special_tokens=not m.has_chat_template)["input_ids"])
    tail = list(tokenize(after, add_special_tokens=False)["input_ids"])
    place = tokenize(oracle.place, add_special_tokens=False)["input_ids"][:1]
    ids = (*head, *(place * slots), *tail)
    return Prompt(ids, prompt.text, assistant_start=len(ids) - 1), len(head)


def _answer_ids(m: Model, answer: str) -> list[int]:
    lead = "" if m.has_chat_template else " "
    ids = list(m.tokenizer(f"{lead}{answer}", add_special_tokens=False)["input_ids"])
    if not ids:
        raise TextError(f"the answer {answer!r} has no tokens")
    return ids + m.eos_ids[:1]


def _put(vectors: Tensor, into: int, start: int) -> Intervention:
    """Adds activations [slots, d] to the states of the places, each as long as the state."""
    length = vectors.norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def edit(h: Tensor) -> Tensor:  # [slots, d]
        unit = (vectors / length).to(h.device, h.dtype)
        return h + unit * h.norm(dim=-1, keepdim=True)

    return Intervention(into, edit=edit, start=start, stop=start + len(vectors))


def _states(
    m: Model, prompts: Sequence[Prompt], index: Sequence[int], positions: Position
) -> tuple[Tensor, int]:
    """Activations [N, L, slots, d] and the number of slots, which is the same in every text."""
    where = [resolve(p, positions) for p in prompts]
    slots = len(where[0])
    if any(len(w) != slots for w in where):
        raise TextError(
            f"positions={positions!r} holds {sorted({len(w) for w in where})} tokens of the texts: "
            "choose as many in every one"
        )
    states = collect(m, prompts, index, where)["resid_post"]
    if not states.isfinite().all():
        raise TextError("the activations hold NaN or inf: is the model in half precision?")
    return states, slots


def _distinct(texts: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """Each text once, and for each example which it is."""
    seen: dict[str, int] = {}
    which = [seen.setdefault(repr(text), len(seen)) for text in texts]
    first = dict(zip(reversed(which), reversed(list(texts)), strict=True))
    return [first[i] for i in range(len(seen))], which


# Training


def _add_lora(m: Model, name: str, rank: int, seed: int) -> None:
    """A fresh adapter on the same weights; what was active stays."""
    from peft import LoraConfig, get_peft_model

    from tool_packs.loading import quiet_peft
    from tool_packs.structure import find_structure

    if name in m.adapters:
        raise ModelError(f"an adapter {name!r} is on this model already: give another name")
    if "." in name or not name:
        raise ModelError(f"adapter name {name!r}: PEFT allows no dots in it")
    present = {path.rsplit(".", 1)[-1] for path, _ in m.core.named_modules()}
    targets = [part for part in MODULES if part in present]
    fan = False
    if not targets:
        targets = [p for p in ("c_attn", "c_proj", "query_key_value", "dense") if p in present]
        fan = "c_attn" in targets
    if not targets:
        raise ModelError(
            f"{type(m.core).__name__} has none of {', '.join(MODULES)}: no LoRA can be put on it"
        )
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=targets,
        fan_in_fan_out=fan,
        task_type="CAUSAL_LM",
    )
    was = m.active_adapter
    with torch.random.fork_rng(devices=[]), quiet_peft():
        torch.manual_seed(seed)
        if m.adapters:
            m.hf.add_adapter(name, config)
        else:
            m.hf = get_peft_model(m.core, config, adapter_name=name)
    m.hf.eval()
    m.core = m.hf.get_base_model()
    with fitting(m, 1, 4):
        m.structure = find_structure(m.core, layers=m._layers, norm=m._norm)
    m._nnsight = None
    _back(m, was)


def _back(m: Model, adapter: str | None) -> None:
    """What computed before computes again."""
    if adapter is None:
        m._set_enabled(False)
    else:
        m._set_enabled(True)
        m.hf.set_adapter(adapter)


@contextlib.contextmanager
def _training(m: Model, name: str) -> Iterator[list[Tensor]]:
    """The parameters of this adapter with gradients, every other weight without; then as before."""
    wanted = {n: p.requires_grad for n, p in m.hf.named_parameters()}
    try:
        with m.adapter(name):
            chosen = []
            for path, parameter in m.hf.named_parameters():
                mine = f".{name}." in path
                parameter.requires_grad_(mine)
                if mine:
                    chosen.append(parameter)
            yield chosen
    finally:
        for path, parameter in m.hf.named_parameters():
            parameter.requires_grad_(wanted.get(path, False))
            if f".{name}." in path:
                parameter.grad = None  # as large as the adapter itself


def _loss(
    m: Model,
    oracle: Oracle,
    asked: Sequence[tuple[Prompt, int]],
    vectors: Sequence[Tensor],
    answers: Sequence[Sequence[int]],
) -> Tensor:
    """Mean cross-entropy of the answers' tokens, each prompt with its activations put in."""
    joined, changes = _joined(oracle, asked, vectors, answers)
    total, count = torch.zeros(()), 0
    for batch in batches(m, joined):
        mine = [changes[i] for i in batch.index]
        spans = spans_of([joined[i] for i in batch.index], mine)
        with fitting(m, *batch.ids.shape), editing(m, mine, spans):
            logits = m.core(**batch.keywords(), use_cache=False).logits
        for b, i in enumerate(batch.index):
            n = len(answers[i])
            wanted = torch.tensor(list(answers[i]), device=logits.device)
            loss = F.cross_entropy(logits[b, -n - 1 : -1].float(), wanted, reduction="sum")
            total = total.to(loss.device) + loss
            count += n
    return total / count


def _joined(
    oracle: Oracle,
    asked: Sequence[tuple[Prompt, int]],
    vectors: Sequence[Tensor],
    answers: Sequence[Sequence[int]],
) -> tuple[list[Prompt], list[tuple[Intervention, ...]]]:
    joined = [
        Prompt((*p.ids, *answer), p.text) for (p, _), answer in zip(asked, answers, strict=True)
    ]
    changes = [
        (_put(vector, oracle.into, start),)
        for (_, start), vector in zip(asked, vectors, strict=True)
    ]
    return joined, changes


def _progress(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(steps), desc="oracle", leave=False)


# Asking


def _answers(
    m: Model,
    oracle: Oracle,
    asked: Sequence[tuple[Prompt, int]],
    vectors: Tensor,
    max_new_tokens: int,
) -> list[str]:
    changes = [(_put(v, oracle.into, start),) for (_, start), v in zip(asked, vectors, strict=True)]
    prompts = [prompt for prompt, _ in asked]
    done = complete(m, prompts, max_new_tokens=max_new_tokens, steer=changes)
    return [decode(m, answers[0].ids).strip() for answers in done]


@torch.no_grad()
def _choose(
    m: Model,
    oracle: Oracle,
    asked: Sequence[tuple[Prompt, int]],
    vectors: Tensor,
    choices: Sequence[str],
) -> Tensor:
    """Log probability [X, C] of each choice given vectors [X, slots, d], normalised over them."""
    ids = [_answer_ids(m, choice) for choice in choices]
    plan = [(x, c) for x in range(len(vectors)) for c in range(len(choices))]
    joined, changes = _joined(
        oracle,
        [asked[x] for x, _ in plan],
        [vectors[x] for x, _ in plan],
        [ids[c] for _, c in plan],
    )
    out = torch.zeros(len(plan))
    for batch in batches(m, joined):
        mine = [changes[i] for i in batch.index]
        spans = spans_of([joined[i] for i in batch.index], mine)
        with fitting(m, *batch.ids.shape), editing(m, mine, spans):
            logits = m.core(**batch.keywords(), use_cache=False).logits
        for b, i in enumerate(batch.index):
            answer = torch.tensor(ids[plan[i][1]], device=logits.device)
            steps = logits[b, -len(answer) - 1 : -1].float().log_softmax(-1)
            out[i] = steps.gather(-1, answer[:, None]).mean().cpu()
    return out.reshape(len(vectors), len(choices)).log_softmax(-1)


def _score(
    m: Model,
    oracle: Oracle,
    examples: Sequence[Example],
    which: Sequence[int],
    theirs: Sequence[int],
    states: Tensor,
    questions: dict[str, tuple[Prompt, int]],
    losses: list[float],
    started: float,
    seed: int,
) -> Result:
    """Accuracy on held-out texts, of the true activation, a random one, and another text's."""
    generator = torch.Generator().manual_seed(seed + 1)
    middle = states.shape[1] // 2
    norm = states.norm(dim=-1).mean()
    rows = []
    with m.adapter(oracle.name):
        for question, asked in questions.items():
            mine = [i for i in theirs if examples[i][1] == question]
            if not mine:
                continue
            truth = [examples[i][2] for i in mine]
            real = torch.stack([states[which[i], middle] for i in mine])
            noise = torch.randn(real.shape, generator=generator)
            noise = noise / noise.norm(dim=-1, keepdim=True) * norm
            # The text in the place of this one has another answer, where there is one.
            partner = [
                next((j for j in (*range(n + 1, len(mine)), *range(n)) if truth[j] != truth[n]), n)
                for n in range(len(mine))
            ]
            length = 2 + max(len(_answer_ids(m, a)) for a in truth)
            said = [
                _answers(m, oracle, [asked] * len(mine), v, length)
                for v in (real, noise, real[partner])
            ]
            fits = [[a == t for a, t in zip(s, truth, strict=True)] for s in said]
            source = [a == truth[p] for a, p in zip(said[2], partner, strict=True)]
            common = max(truth.count(a) for a in set(truth)) / len(truth)
            means = [sum(f) / len(f) for f in (*fits, source)]
            rows.append(
                {
                    "question": question,
                    "n": len(mine),
                    "accuracy": round(means[0], 4),
                    "random": round(means[1], 4),
                    "foreign": round(means[2], 4),
                    "foreign_source": round(means[3], 4),
                    "commonest": round(common, 4),
                }
            )
    weight = torch.tensor([float(row["n"]) for row in rows])
    names = ("accuracy", "random", "foreign", "foreign_source")
    mean = {
        k: (torch.tensor([row[k] for row in rows]) * weight).sum() / weight.sum() for k in names
    }
    tensors = {
        "accuracy": mean["accuracy"],
        "accuracy_random": mean["random"],
        "accuracy_foreign": mean["foreign"],
        "accuracy_foreign_source": mean["foreign_source"],
        "loss": torch.tensor(losses),
    }
    lines = [
        f"held-out texts: accuracy {mean['accuracy']:.3f}; control, random vectors: "
        f"{mean['random']:.3f}; control, another text's activations: {mean['foreign']:.3f} "
        f"(and {mean['foreign_source']:.3f} fit that other text)",
        f"loss {losses[0]:.3g} -> {mean_sd(torch.tensor(losses[-10:]))}",
        *(
            f"{row['question'][:60]!r}: {row['accuracy']:.3f} of {row['n']}, random "
            f"{row['random']:.3f}, foreign {row['foreign']:.3f}, commonest answer "
            f"{row['commonest']:.3f}"
            for row in rows[:6]
        ),
    ]
    return Result(
        title=f"oracle {oracle.name}: layers {oracle.layers}, {len(examples) - len(theirs)} examples",
        tensors=to_cpu(tensors),
        dims={**dict.fromkeys(tensors, ()), "loss": ("step",)},
        rows=rows,
        lines=lines,
        labels={"step": list(range(len(losses)))},
        figure={"kind": "lines", "x": "step", "lines": ["loss"], "units": ["loss (nats a token)"]},
        provenance=provenance(
            m,
            "oracle.train",
            started,
            prompts=[questions[q][0].ids for q in questions],
            seed=seed,
            layers=oracle.layers,
            into=oracle.into,
            steps=len(losses),
            examples=len(examples),
        ),
    )
