"""Exchange two concepts in a layer's state along the directions of a Jacobian lens."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect
from tool_packs.engine import Intervention
from tool_packs.errors import TextError
from tool_packs.jacobian_lens import is_all, matrices_of, matrix_at, progress
from tool_packs.logit_lens import divergence, origin
from tool_packs.prompts import Prompt, Text, read, token_strings, word_ids
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.structure import held, weight_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["jacobian_swap", "swap_intervention"]

Word = str | int


def swap_intervention(
    m: Model,
    lens: Result,
    words: tuple[Word, Word],
    *,
    layers: Layers = "all",
    strength: float = 1.0,
    start: int | str = 0,
    stop: int | str | None = None,
) -> tuple[Intervention, ...]:
    """What if the model had this concept in mind where it has that one?

    A word's direction at a layer is its row of the unembedding times the Jacobian. The states'
    coordinates along the directions of the two words (by the pseudoinverse) change places; what is
    orthogonal to both stays. The outcome is what `generate`, `capture`, `next_token` and
    `logit_lens` take as `steer`.

    Args:
        lens: what `fit_jacobian_lens` returned.
        words: the two, as words (the best single token is taken) or token ids.
        layers: where the coordinates are exchanged; of those that were fitted. An exchange at two
            layers in a row largely undoes itself: prefer one layer, or few that lie apart.
        strength: 1 exchanges the coordinates, 2 is the paper's double strength, 0 does nothing.
        start: first position changed, as in `intervention`.
        stop: first position no longer changed, as in `intervention`.

    Returns:
        a tuple of Intervention, one a layer: steer=swap_intervention(...).

    Raises:
        TextError: a layer that was not fitted, two words that are one token.
        ModelError: a lens of a model of another width.

    Use when:
        You want to generate, or read, under the exchange.

    Not when:
        You want its effect with controls: `jacobian_swap`.

    Cost:
        none until it is used; then two dot products a state.

    Controls:
        None of its own: `jacobian_swap` has them.

    Paper:
        Gurnee et al. 2026 (Transformer Circuits, n/a on arXiv)

    Example:
        from tool_packs.jacobian_swap import swap_intervention
        from tool_packs.jacobian_lens import fit_jacobian_lens
        from tool_packs.generation import generate
        lens = fit_jacobian_lens(m, "the cat sat on the mat and the dog", skip=2)
        x = swap_intervention(m, lens, ("cat", "dog"), layers=1)
        generate(m, "Name a cat.", steer=x, max_new_tokens=4)["text"]
    """
    matrices = matrices_of(m, lens)
    chosen = sorted(matrices) if is_all(layers) else m.layer_indices(layers)
    pair = _pair(m, words)
    return tuple(
        _exchange(m, matrix_at(m, matrices, layer), pair, layer, strength, start, stop)
        for layer in chosen
    )


def jacobian_swap(
    m: Model,
    lens: Result,
    text: Text,
    *,
    words: tuple[Word, Word] | None = None,
    track: tuple[Word, Word] | None = None,
    layers: Layers = "all",
    strength: float = 1.0,
    start: int | str = 0,
    n_random: int = 16,
    seed: int = 0,
) -> Result:
    """Does exchanging two concepts in a layer's state exchange what the model says?

    One layer at a time the coordinates of two words are exchanged (see `swap_intervention`), and
    the logit difference of two tracked words at the last token is compared with the run left alone.

    Args:
        lens: what `fit_jacobian_lens` returned.
        text: as in `logit_lens`.
        words: the two concepts exchanged, as words or token ids; None: the model's two likeliest
            tokens after the first text.
        track: the two answers whose logit difference is measured, first less second; None: words.
        layers: each alone; of those that were fitted.
        strength: 1 exchanges, 2 is the paper's double strength.
        start: first position changed, as in `intervention`.
        n_random: pairs of random tokens exchanged as the control.
        seed: of the random tokens.

    Returns:
        Result: effect [layer, prompt], the change of the logit difference; effect_logit
        [layer, prompt], of an exchange along the plain unembedding rows; effect_random
        [layer, prompt, null], of random tokens; kl [layer, prompt], nats from the untouched
        prediction; before [prompt], the logit difference untouched. Rows: layer, effect, controls.

    Raises:
        TextError: a layer that was not fitted, two words that are one token.
        ModelError: a lens of a model of another width.

    Use when:
        A word is read in the middle layers and you ask whether the model uses it.

    Not when:
        The word is the answer itself and the layer late: any direction to it will do.

    Cost:
        one forward pass over (2 + n_random) rows for each prompt and layer.

    Controls:
        pairs of random tokens and the same pair in the logit lens' basis, on by default.

    Paper:
        Gurnee et al. 2026 (Transformer Circuits, n/a on arXiv)

    Example:
        from tool_packs.jacobian_swap import jacobian_swap
        from tool_packs.jacobian_lens import fit_jacobian_lens
        lens = fit_jacobian_lens(m, "the cat sat on the mat and the dog", skip=2)
        r = jacobian_swap(m, lens, "the cat sat on the", words=("cat", "dog"), n_random=4)
        r["effect"][:, 0]
    """
    started = time.perf_counter()
    matrices = matrices_of(m, lens)
    chosen = sorted(matrices) if is_all(layers) else m.layer_indices(layers)
    prompts = read(m, text)
    ends = [len(p) - 1 for p in prompts]
    plain = _last_states(m, prompts, ends, [()] * len(prompts))  # [N, d]
    logits = _unembedded(m, plain)  # [N, V]
    if words is None:
        first, second = logits[0].topk(2).indices.tolist()
        words = (first, second)
    pair = _pair(m, words)
    asked = pair if track is None else _pair(m, track)
    before = logits[:, asked[0]] - logits[:, asked[1]]  # [N]
    generator = torch.Generator().manual_seed(seed)
    others = [_random_pair(m, generator) for _ in range(n_random)]
    identity = torch.eye(m.width)
    effects, divergences = [], []  # [layer][N, 2 + null], [layer][N]
    for layer in progress(chosen):
        matrix = matrix_at(m, matrices, layer)
        changes = [
            _exchange(m, a, b, layer, strength, start, None)
            for a, b in [(matrix, pair), (identity, pair), *((matrix, p) for p in others)]
        ]
        rows_of = [p for p in prompts for _ in changes]
        h = _last_states(
            m,
            rows_of,
            [len(p) - 1 for p in rows_of],
            [(change,) for _ in prompts for change in changes],
        )
        after = _unembedded(m, h)
        difference = (after[:, asked[0]] - after[:, asked[1]]).unflatten(0, (len(prompts), -1))
        effects.append(difference - before[:, None])
        divergences.append(divergence(m, plain, h.unflatten(0, (len(prompts), -1))[:, 0]))
    effect = torch.stack(effects)  # [L, N, 2 + null]
    tensors = {
        "effect": effect[..., 0],
        "effect_logit": effect[..., 1],
        "effect_random": effect[..., 2:],
        "kl": torch.stack(divergences),
        "before": before,
    }
    names = token_strings(m, pair)
    answers = token_strings(m, asked)
    table = []
    for j, layer in enumerate(chosen):
        null = effect[j, :, 2:].mean(0)
        table.append(
            {
                "layer": layer,
                "effect": round(effect[j, :, 0].mean().item(), 4),
                "effect_logit": round(effect[j, :, 1].mean().item(), 4),
                "effect_random": mean_sd(null) if n_random else "not run",
                "kl": round(tensors["kl"][j].mean().item(), 4),
            }
        )
    best = max(range(len(chosen)), key=lambda j: abs(table[j]["effect"]))
    lines = [
        f"exchanged {names[0]!r} and {names[1]!r}; logit difference of {answers[0]!r} less "
        f"{answers[1]!r}, {before.mean():.3g} untouched",
        f"largest of {len(chosen)} layers, layer {chosen[best]}: {table[best]['effect']:+.3g}; "
        f"control, {n_random} random pairs: {table[best]['effect_random']}; the same pair along "
        f"the plain unembedding rows: {table[best]['effect_logit']:+.3g}",
    ]
    return Result(
        title=f"exchange of two words in J-space at {len(chosen)} layers",
        tensors=to_cpu(tensors),
        dims={
            "effect": ("layer", "prompt"),
            "effect_logit": ("layer", "prompt"),
            "effect_random": ("layer", "prompt", "null"),
            "kl": ("layer", "prompt"),
            "before": ("prompt",),
        },
        labels={"layer": chosen, "word": names, "tracked": answers},
        rows=table,
        lines=lines,
        figure={
            "kind": "lines",
            "x": "layer",
            "lines": ["effect", "effect_logit", *(["effect_random"] if n_random else [])],
            "bands": {"effect_random": "null"},
            "units": ["change of the logit difference"],
        },
        provenance=provenance(
            m,
            "jacobian_swap",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            words=list(pair),
            track=list(asked),
            layers=chosen,
            strength=strength,
            start=str(start),
            n_random=n_random,
            lens=origin(lens),
        ),
    )


def _pair(m: Model, words: tuple[Word, Word]) -> tuple[int, int]:
    if isinstance(words, str) or len(words) != 2:
        raise TextError(f"words={words!r:.60}: give two, as in ('France', 'China')")
    first, second = (_token(m, word) for word in words)
    if first == second:
        raise TextError(f"{words[0]!r} and {words[1]!r} are the same token ({first})")
    return first, second


def _token(m: Model, word: Word) -> int:
    if isinstance(word, str):
        return word_ids(m, word)[0]
    if not 0 <= word < m.vocab_size:
        raise TextError(f"token {word} is outside the vocabulary of {m.vocab_size}")
    return int(word)


def _random_pair(m: Model, generator: torch.Generator) -> tuple[int, int]:
    first, second = torch.randperm(m.vocab_size, generator=generator)[:2].tolist()
    return first, second


def _exchange(
    m: Model,
    matrix: Tensor,
    pair: tuple[int, int],
    layer: int,
    strength: float,
    start: int | str,
    stop: int | str | None,
) -> Intervention:
    with held(m.structure.unembedding):
        rows = weight_of(m.structure.unembedding)[list(pair)].detach().float().cpu()  # [2, d]
    basis = rows @ matrix  # [2, d]: the words' directions in this layer's coordinates
    inverse = torch.linalg.pinv(basis)  # [d, 2]

    def edit(h: Tensor) -> Tensor:  # [n, d]
        a, b = basis.to(h.device), inverse.to(h.device)
        coordinates = h.float() @ b  # [n, 2]
        return h.float() + strength * ((coordinates.flip(-1) - coordinates) @ a)

    return Intervention(layer, None, 1.0, edit, start, stop)


def _last_states(
    m: Model, prompts: Sequence[Prompt], ends: Sequence[int], steer: Sequence[Any]
) -> Tensor:
    where = [[end] for end in ends]
    return collect(m, prompts, [m.n_layers - 1], where, steer=list(steer))["resid_post"][:, 0, 0]


@torch.no_grad()
def _unembedded(m: Model, h: Tensor) -> Tensor:
    return m.unembed(m.norm(h)).cpu()
