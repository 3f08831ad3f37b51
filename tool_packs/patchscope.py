"""Put a hidden state into another prompt, and let the model say in words what it holds."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect
from tool_packs.engine import Intervention
from tool_packs.errors import TextError
from tool_packs.generation import complete, decode, last_logits
from tool_packs.prompts import (
    Chat,
    Position,
    Prompt,
    Text,
    positions_of,
    read,
    resolve,
    token_strings,
    word_ids,
)
from tool_packs.result import Result, provenance, to_cpu

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["patchscope"]

Target = tuple[str | Chat, str | int]  # a prompt and where in it the state is put

IDENTITY: Target = ("cat -> cat; 1135 -> 1135; hello -> hello; x", "x")
DESCRIPTION: Target = (
    "Syria: a country in the Middle East. Leonardo DiCaprio: an American actor. "
    "Samsung: a South Korean maker of electronics. x",
    "x",
)
SELFIE: Target = (
    [
        {"role": "user", "content": "_ _ _ _ _"},
        {"role": "assistant", "content": "Sure, I will say what your message is about: it"},
    ],
    "_ _ _ _ _",
)
UNRELATED = "The train was late again, so we waited on the platform."
ROWS = 64  # whose next-token logits are held at a time


def patchscope(
    m: Model,
    text: Text | None,
    layers: Layers = "all",
    *,
    position: Position = "last",
    vector: Tensor | None = None,
    target: Target = IDENTITY,
    into: str | int | float = "same",
    track: Sequence[str] | Mapping[str, Sequence[str]] = (),
    unrelated: str | Chat = UNRELATED,
    n_random: int = 1,
    max_new_tokens: int = 16,
    seed: int = 0,
) -> Result:
    """What does the model itself say that this hidden state holds, layer by layer?

    The state after a layer at one place of the source takes the place of the state at a placeholder
    of the target prompt, which the model then continues. All layers, sources and controls are rows
    of one batch. With a target that is another text of the same kind this is a transplant of
    activations; a state put back into its own place changes nothing.

    Args:
        text: the sources: a str (plain text), a chat, or a list of either; None with vector=.
        layers: whose states; as in `capture`. With vector=, after which layers it is put.
        position: of the state in the source; as in `capture`. Several positions: each is a source.
        vector: [d] or [source, d], put in as it is, in place of states of a text. Give it the norm
            of the stream there: a direction of another norm is no state.
        target: (prompt, placeholder): a str or chat, and a piece of it (its last occurrence; all
            tokens that hold it are replaced) or a position as an int. `IDENTITY` repeats a token,
            `DESCRIPTION` describes an entity, `SELFIE` asks a chat model about its message.
        into: after which layer of the target; "same": the layer that the state is from.
        track: words (or groups by name) whose log probability as the next token is wanted.
        unrelated: a source without the property; the state of its last token is a control.
        n_random: random vectors of the state's norm, for each source and layer.
        max_new_tokens: length of the answers, which are greedy.
        seed: of the random vectors.

    Returns:
        Result: vectors [source, layer, d]; moved [source, layer] (KL(target as it is, patched) of
        the next token, in nats), moved_random [source, layer, null], moved_unrelated [layer]; with
        track= logprob [source, layer, word], logprob_random [source, layer, null, word],
        logprob_unrelated [layer, word], logprob_nothing [word] (nats). Rows: source, position,
        token, layer, into, text, random, unrelated (what is said for each), moved, and the log
        probability of each word. `r.labels["nothing"]` is the target's own continuation.

    Raises:
        TextError: a placeholder that is not in the target; text and vector together, or neither; a
            vector of another shape or not finite; a layer or position that does not exist here.

    Use when:
        You want content in words that a lens over single tokens cannot give: an entity, a plan.

    Not when:
        The next token is what you ask about: `logit_lens` is exact and costs one pass.

    Cost:
        one pass over the sources; sources * layers * (1 + n_random) + layers + 1 rows decoded.

    Controls:
        random vectors of the same norm, an unrelated source, and the target alone: by default. A
        text that a control gives as well was not read from the state.

    Paper:
        arXiv 2401.06102 (Patchscopes), 2403.10949 (SelfIE)

    Example:
        from tool_packs.patchscope import patchscope
        r = patchscope(m, "the cat sat on the mat", [1, 2], track=["mat"], max_new_tokens=4)
        r["text"], r["random"], r["unrelated"]
        patchscope(m, None, 1, vector=r["vectors"][0, 0] * 2, max_new_tokens=4).rows[0]
    """
    started = time.perf_counter()
    index = m.layer_indices(layers)
    place = None if into == "same" else m.layer_index(into)  # type: ignore[arg-type]
    frame, start, stop = _target(m, target)
    groups = _groups(m, track)
    prompts, where, states = _sources(m, text, vector, index, position, place)
    control_prompt = read(m, unrelated)[:1]
    control = collect(m, control_prompt, index, [[len(control_prompt[0]) - 1]])["resid_post"]
    generator = torch.Generator().manual_seed(seed)
    n_sources = len(states)
    norms = states.norm(dim=-1, keepdim=True)[:, :, None]  # [S, L, 1, 1]
    guesses = torch.randn(n_sources, len(index), n_random, m.width, generator=generator)
    guesses = guesses / guesses.norm(dim=-1, keepdim=True) * norms
    # What is put in [arm, d] and after which layer, in one list: nothing, unrelated, then by source.
    put: list[tuple[Tensor, int] | None] = [None]
    put += [(control[0, j, 0], _into(place, layer)) for j, layer in enumerate(index)]
    for s in range(n_sources):
        for j, layer in enumerate(index):
            put.append((states[s, j], _into(place, layer)))
            put += [(guess, _into(place, layer)) for guess in guesses[s, j]]
    changes = [() if p is None else (_replacement(*p, start, stop),) for p in put]
    rows = [frame] * len(put)
    done = complete(m, rows, max_new_tokens=max_new_tokens, steer=changes)
    texts = [decode(m, answers[0].ids) for answers in done]
    moved, logprob = _next(m, rows, changes, groups)  # [arms], [arms, words]
    first = 1 + len(index)
    shape = (n_sources, len(index), 1 + n_random)
    by_source = moved[first:].reshape(shape)
    said = [texts[first + i : first + i + 1 + n_random]
            for i in range(0, len(texts) - first, 1 + n_random)]  # fmt: skip
    tensors = {
        "vectors": states,
        "moved": by_source[..., 0],
        "moved_random": by_source[..., 1:],
        "moved_unrelated": moved[1:first],
    }
    dims: dict[str, tuple[str, ...]] = {
        "vectors": ("source", "layer", "d"),
        "moved": ("source", "layer"),
        "moved_random": ("source", "layer", "null"),
        "moved_unrelated": ("layer",),
    }
    if groups:
        words = logprob[first:].reshape(*shape, len(groups))
        tensors |= {
            "logprob": words[:, :, 0],
            "logprob_random": words[:, :, 1:],
            "logprob_unrelated": logprob[1:first],
            "logprob_nothing": logprob[0],
        }
        dims |= {
            "logprob": ("source", "layer", "word"),
            "logprob_random": ("source", "layer", "null", "word"),
            "logprob_unrelated": ("layer", "word"),
            "logprob_nothing": ("word",),
        }
    table = []
    for s in range(n_sources):
        i, t = where[s]
        token = "" if t is None else token_strings(m, [prompts[i].ids[t]])[0]
        for j, layer in enumerate(index):
            answers = said[s * len(index) + j]
            table.append(
                {
                    "source": i,
                    "position": t,
                    "token": token,
                    "layer": layer,
                    "into": _into(place, layer),
                    "text": answers[0],
                    "random": answers[1] if n_random else "",
                    "unrelated": texts[1 + j],
                    "moved": round(tensors["moved"][s, j].item(), 4),
                    **{
                        word: round(tensors["logprob"][s, j, w].item(), 4)
                        for w, word in enumerate(groups)
                    },
                }
            )
    return Result(
        title=f"{n_sources} sources at {len(index)} layers, said in words",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"layer": index, "word": list(groups), "nothing": [texts[0]]},
        rows=table,
        lines=_lines(table, tensors, index, list(groups), texts[0], n_random),
        figure=_figure(bool(groups), n_random),
        provenance=provenance(
            m,
            "patchscope",
            started,
            prompts=[p.ids for p in (*prompts, frame)],
            seed=seed,
            layers=index,
            position=str(position) if vector is None else None,
            into=into,
            target=str(target),
            unrelated=str(unrelated),
            track={name: token_strings(m, ids) for name, ids in groups.items()},
            n_random=n_random,
            max_new_tokens=max_new_tokens,
        ),
    )


def _into(place: int | None, layer: int) -> int:
    return layer if place is None else place


def _target(m: Model, target: Target) -> tuple[Prompt, int, int]:
    """The target prompt and the span [start, stop) of its placeholder."""
    if not isinstance(target, (tuple, list)) or len(target) != 2 or isinstance(target[0], dict):
        raise TextError(
            f"target={target!r:.80}: give (prompt, placeholder), as in ('a: a; b: b; x', 'x')"
        )
    (prompt,) = read(m, target[0])[:1]
    find = positions_of if isinstance(target[1], str) else lambda m, p, at: resolve(p, at)
    held = find(m, prompt, target[1])
    if held != list(range(held[0], held[-1] + 1)):
        raise TextError(f"the placeholder {target[1]!r} is not one span of tokens: {held}")
    return prompt, held[0], held[-1] + 1


def _sources(
    m: Model,
    text: Text | None,
    vector: Tensor | None,
    index: Sequence[int],
    position: Position,
    place: int | None,
) -> tuple[list[Prompt], list[tuple[int, int | None]], Tensor]:
    """The sources' prompts, (prompt, position) of each, and what is put in [source, layer, d]."""
    if (text is None) == (vector is None):
        raise TextError("give a text, or text=None with vector=, and not both")
    if text is not None:
        prompts = read(m, text)
        at = [resolve(p, position) for p in prompts]
        states = collect(m, prompts, index, at)["resid_post"]  # [N, L, P, d]
        where: list[tuple[int, int | None]] = [(i, t) for i, w in enumerate(at) for t in w]
        kept = [states[i, :, k] for i, w in enumerate(at) for k in range(len(w))]
        return prompts, where, torch.stack(kept)
    rows = torch.as_tensor(vector).detach().float().cpu()
    rows = rows[None] if rows.ndim == 1 else rows
    if rows.ndim != 2 or rows.shape[1] != m.width or not len(rows):
        raise TextError(
            f"vector has shape {tuple(torch.as_tensor(vector).shape)}: give [{m.width}] or [source, {m.width}]"
        )
    if (bad := int((~rows.isfinite()).sum())) > 0:
        raise TextError(f"vector has {bad} values that are not finite")
    if place is not None:
        raise TextError("with vector= the layers are where it is put: leave out into=")
    return [], [(i, None) for i in range(len(rows))], rows[:, None].expand(-1, len(index), -1)


def _replacement(vector: Tensor, layer: int, start: int, stop: int) -> Intervention:
    """The states at [start, stop) after the layer become this vector."""

    def edit(h: Tensor) -> Tensor:  # [n, d]
        return vector.to(h.device, h.dtype).expand_as(h)

    return Intervention(layer, edit=edit, start=start, stop=stop)


def _groups(m: Model, track: Sequence[str] | Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    if isinstance(track, Mapping):
        return {name: sorted({i for w in ws for i in word_ids(m, w)}) for name, ws in track.items()}
    return {word: word_ids(m, word) for word in ([track] if isinstance(track, str) else track)}


def _next(
    m: Model,
    rows: Sequence[Prompt],
    changes: Sequence[tuple[Intervention, ...]],
    groups: Mapping[str, Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """KL(row 0, row) [R] and the words' log probabilities [R, words] at the next token."""
    moved, words = [], []
    plain = torch.empty(0)
    for at in range(0, len(rows), ROWS):
        logits = last_logits(m, rows[at : at + ROWS], changes[at : at + ROWS])
        logprobs = logits.log_softmax(-1)  # [r, V]
        plain = logprobs[:1] if at == 0 else plain
        moved.append((plain.exp() * (plain - logprobs)).sum(-1).cpu())
        scores = [logprobs[:, sorted(set(ids))].logsumexp(-1).cpu() for ids in groups.values()]
        words.append(torch.stack(scores, 1) if scores else torch.zeros(len(logits), 0))
    return torch.cat(moved), torch.cat(words)


def _lines(
    table: Sequence[Mapping[str, Any]],
    tensors: Mapping[str, Tensor],
    index: Sequence[int],
    words: Sequence[str],
    nothing: str,
    n_random: int,
) -> list[str]:
    lines = []
    for w, word in enumerate(words):
        mine = tensors["logprob"][..., w]  # [S, L]
        s, j = divmod(int(mine.argmax()), len(index))
        null = tensors["logprob_random"][s, j, :, w]
        random = f"{null.mean():.2f}" if n_random else "none (n_random=0)"
        lines.append(
            f"{word!r}: log probability {mine[s, j]:.2f} at layer {index[j]}, the best of "
            f"{mine.numel()} cells; control, random vectors there: {random}; unrelated source: "
            f"{tensors['logprob_unrelated'][j, w]:.2f}, its best layer "
            f"{tensors['logprob_unrelated'][:, w].max():.2f}; target alone: "
            f"{tensors['logprob_nothing'][w]:.2f}"
        )
    lines.append(f"target alone: {nothing[:60]!r}")
    last = len(index) - 1
    for j in sorted({0, last // 3, 2 * last // 3, last}):
        row = table[j]
        random = f"{row['random'][:40]!r}" if n_random else "none"
        lines.append(
            f"layer {row['layer']}: {row['text'][:60]!r}; control, random: {random}, "
            f"unrelated: {row['unrelated'][:40]!r}"
        )
    return lines


def _figure(words: bool, n_random: int) -> dict[str, Any]:
    panel = ["moved", "moved_unrelated", *(["moved_random"] if n_random else [])]
    panels, units = [panel], ["KL of the next token (nats)"]
    if words:
        panels.append(["logprob", "logprob_unrelated"])
        units.append("log probability (nats)")
    bands = {"moved_random": "null"} if n_random else {}
    each = {"logprob": "word", "logprob_unrelated": "word"} if words else {}
    return {
        "kind": "lines",
        "x": "layer",
        "panels": panels,
        "units": units,
        "bands": bands,
        "each": each,
    }
