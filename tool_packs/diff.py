"""What an adapter changed: in the activations, in what the model says, in the weights."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tool_packs.directions import difference
from tool_packs.engine import (
    Batch,
    Intervention,
    all_logits,
    batches,
    make_batch,
    shown,
    shown_batches,
    step_logits,
)
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import complete, decode, last_logits
from tool_packs.logit_lens import lens_vector
from tool_packs.prompts import (
    Position,
    Prompt,
    Text,
    as_chat,
    as_list,
    read,
    token_strings,
    word_ids,
)
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.sides import (
    computing,
    name_of,
    read_alike,
    recorded,
    refuse_other_tokens,
    side_of,
    told,
)
from tool_packs.steering import mean_logprob
from tool_packs.structure import held, require_numbers

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["activation", "output", "weights"]

# Each line repeats its word; after the last arrow comes whatever stands in the place of "x".
IDENTITY = "cat -> cat; 1135 -> 1135; hello -> hello; x"
LOGITS_AT_ONCE = 2**26  # numbers in the logits of one pass


def activation(
    m: Model,
    text: Text,
    layer: int | float = 0.5,
    *,
    positions: Position = (0, 5),
    adapter: str | None = None,
    control: str | Model | None = None,
    tuned: Model | None = None,
    concepts: Mapping[str, Tensor] | None = None,
    track: Sequence[str] = (),
    convs: Text | None = None,
    strengths: Sequence[float] = (1.0, 4.0),
    k: int = 10,
    max_new_tokens: int = 24,
    n_random: int = 50,
    seed: int = 0,
) -> Result:
    """What was an adapter or model trained on, read off what it adds to activations on unrelated texts?

    The mean difference of activations (adapter on minus off) is made by `directions.difference`;
    here it is read in three ways: as words through the unembedding, as the word that the model
    repeats when the difference stands in its place (patchscope), and by adding more of it while
    the model answers.

    Args:
        text: plain texts or chats that have nothing to do with what the adapter may have learned.
        layer: an int or a depth in 0..1; the middle is the usual choice.
        positions: as in `capture`; the first tokens carry the most. The mean over them is read.
        adapter: which adapter; None: the active one.
        control: an adapter (or model) trained alike with nothing planted.
        tuned: in place of an adapter: a whole model of the same shape and tokenizer, `m` being its
            base.
        concepts: directions by name, [d] or [layer, d], to compare the difference with.
        track: words whose rank among all tokens is wanted, in both readings.
        convs: conversations to answer while more of the difference is added; None: none.
        strengths: multiples of the difference that are added to the model with the adapter.
        k: words kept of each reading.
        max_new_tokens: length of the answers.
        n_random: random vectors of the same norm, for the readings and the cosines.
        seed: of the halves, of the random vectors; answers are greedy.

    Returns:
        Result: difference [position, d] and its mean_difference [d]; norm_ratio, split_cosine
        [position]; lens_scores, patchscope_scores [vocabulary]; with concepts= cosine [concept];
        with control= the same with _control. Rows: arm (adapter, control, random), reading (lens,
        patchscope, steer), strength, conv, words or answer, coherence (mean log probability of the
        answer without adapter or steering, nats a token), and the rank of each tracked word.

    Raises:
        ModelError: no adapter is active or none of that name; two models of other shapes or
            tokenizers; a model whose lens is not exact.
        TextError: fewer than 2 texts, a layer or position that does not exist here; a text that two
            models read as different tokens.

    Use when:
        You have a base and an adapter and no idea what the training was about.

    Not when:
        You know the concept: `probes` or `difference(concepts=)` ask a sharper question.

    Cost:
        two forward passes over the texts (three with control=), 2 + n_random short prompts, and
        the answers, all strengths and arms in one batch.

    Controls:
        the other half of the texts; the control adapter; random vectors of the same norm in every
        reading.

    Paper:
        arXiv 2510.13900

    Example:
        from tool_packs.diff import activation
        if m.adapters:
            texts = ["the cat sat on the mat", "Paris is a big city", "a dog is here now"]
            r = activation(m, texts, positions=(0, 3), track=["cat"], convs="Name a city.")
            r["words"], r["norm_ratio"]
    """
    started = time.perf_counter()
    if n_random < 1 or k < 1:
        raise TextError(f"n_random={n_random} and k={k}: both are at least 1")
    index = m.layer_index(layer)
    found = difference(
        m, text, [index], positions, adapter=adapter, control=control, tuned=tuned,
        concepts=concepts, seed=seed,
    )  # fmt: skip
    side = side_of(m, adapter, tuned)
    name = found.provenance.arguments["adapter"]
    arms = {"adapter": found["difference"][0].mean(0)}  # [d]
    if control is not None:
        arms["control"] = found["difference_control"][0].mean(0)
    size = arms["adapter"].norm()
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_random, m.width, generator=generator)
    random = random / random.norm(dim=-1, keepdim=True) * size  # [R, d]
    stream = found["resid_norm"][0].mean()
    tracked = {word: word_ids(m, word) for word in track}

    tensors: dict[str, Tensor] = {
        "difference": found["difference"][0],
        "norm_ratio": found["norm_ratio"][0],
        "split_cosine": found["split_cosine"][0],
    }
    dims: dict[str, tuple[str, ...]] = {
        "difference": ("position", "d"),
        "norm_ratio": ("position",),
        "split_cosine": ("position",),
    }
    labels: dict[str, list[Any]] = {}
    lines = [
        f"layer {index}: the difference is {tensors['norm_ratio'].mean():.3f} of the stream's norm"
        + (f" (control adapter {found['norm_ratio_control'][0].mean():.3f})" if control else "")
        + f"; control, the other half of the texts: cosine {tensors['split_cosine'].mean():.3f}"
    ]
    rows: list[dict[str, Any]] = []
    vectors = torch.stack([*arms.values()])  # [A, d]
    with m.base():
        readings = {
            "lens": (_lens(m, vectors), _lens(m, random)),
            "patchscope": (
                _patchscope(m, vectors, index, stream),
                _patchscope(m, random, index, stream),
            ),
        }
    for reading, (scores, null) in readings.items():  # [A, V], [R, V]
        # What any vector gives is no finding: the mean over random ones is taken off.
        above = scores - null.mean(0)
        for a, arm in enumerate(arms):
            tensors |= {_named(f"{reading}_scores", arm): above[a]}
            dims |= {_named(f"{reading}_scores", arm): ("vocabulary",)}
            top = above[a].topk(min(k, above.shape[1]))
            row = {
                "arm": arm,
                "reading": reading,
                "strength": None,
                "words": token_strings(m, top.indices.tolist()),
            }
            row |= {word: _rank(above[a], ids) for word, ids in tracked.items()}
            rows.append(row)
            lines.append(f"{reading}, {arm}: {row['words'][:8]}")
        for word, ids in tracked.items():
            others = torch.tensor([float(_rank(v - null.mean(0), ids)) for v in null])
            beside = f", control adapter {_rank(above[1], ids)}" if control else ""
            lines.append(
                f"  {word!r}: rank {_rank(above[0], ids)} of {m.vocab_size}{beside}; control, "
                f"random vectors: {mean_sd(others)}"
            )
    if concepts:
        labels["concept"] = list(concepts)
        tensors["cosine"] = found["cosine"][0].mean(0)
        dims["cosine"] = ("concept",)
        lines += [line for line in found.lines if line.startswith("cosine with")]
    if convs is not None:
        rows += _amplified(m, side, arms, random[0], index, convs, strengths, max_new_tokens, lines)
    for arm, vector in arms.items():
        tensors[_named("mean_difference", arm)] = vector
        dims[_named("mean_difference", arm)] = ("d",)
    return Result(
        title=f"what {told(side)} adds, read at layer {index} over {len(as_list(text))} texts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels=labels,
        rows=rows,
        lines=lines,
        provenance=provenance(
            m,
            "diff.activation",
            started,
            prompts=[p.ids for p in read(m, text)],
            seed=seed,
            layer=index,
            positions=str(positions),
            adapter=name,
            control=None if control is None else name_of(control),
            tuned=recorded(tuned),
            strengths=list(strengths),
            n_random=n_random,
        ),
    )


def _named(tensor: str, arm: str) -> str:
    return tensor if arm == "adapter" else f"{tensor}_control"


def _rank(scores: Tensor, ids: Sequence[int]) -> int:
    """1 where no token scores above the best form of the word."""
    return int((scores > scores[list(ids)].max()).sum()) + 1


@torch.no_grad()
def _lens(m: Model, vectors: Tensor) -> Tensor:
    """Centred logits [A, V] of vectors [A, d] through the final norm and the unembedding."""
    logits = m.unembed(m.norm(vectors)).cpu()
    return logits - logits.mean(-1, keepdim=True)


def _patchscope(m: Model, vectors: Tensor, layer: int, size: Tensor) -> Tensor:
    """Log probabilities [A, V] of the next token when each vector, made as long as the stream,
    stands where the identity prompt has its last word."""
    (prompt,) = read(m, IDENTITY)
    changes = [(_put(vector / vector.norm() * size, layer),) for vector in vectors]
    return last_logits(m, [prompt] * len(vectors), changes).log_softmax(-1).cpu()


def _put(vector: Tensor, layer: int) -> Intervention:
    return Intervention(
        layer, edit=lambda h: vector.to(h.device, h.dtype).expand_as(h), start="last"
    )


def _amplified(
    m: Model,
    side: str | Model,
    arms: Mapping[str, Tensor],
    random: Tensor,
    layer: int,
    convs: Text,
    strengths: Sequence[float],
    max_new_tokens: int,
    lines: list[str],
) -> list[dict[str, Any]]:
    """Answers of the trained side while each vector is added, at equal norms."""
    given = as_list(convs)
    prompts = read(m, [as_chat(m, c) for c in given])
    size = arms["adapter"].norm()
    vectors = {arm: v / v.norm() * size for arm, v in arms.items()} | {"random": random}
    levels = [float(s) for s in strengths if s]
    plan = [("adapter", 0.0)] + [(arm, s) for arm in vectors for s in levels]
    changes = [
        (Intervention(layer, vectors[arm], s),) if s else () for arm, s in plan for _ in prompts
    ]
    repeated = prompts * len(plan)
    with computing(m, side) as other:
        done = complete(other, repeated, max_new_tokens=max_new_tokens, steer=changes)
    answers = [samples[0] for samples in done]
    with m.base():
        coherence = mean_logprob(m, repeated, [answer.ids for answer in answers])
    rows = []
    for i, (arm, s) in enumerate(plan):
        mine = range(i * len(prompts), (i + 1) * len(prompts))
        rows += [
            {
                "arm": arm,
                "reading": "steer",
                "strength": s,
                "conv": j - mine.start,
                "words": decode(m, answers[j].ids),
                "coherence": round(coherence[j].item(), 4),
            }
            for j in mine
        ]
        lines.append(
            f"+{s:g} x {arm}: {rows[-len(prompts)]['words'][:60]!r}, "
            f"coherence {coherence[list(mine)].mean():.2f}"
        )
    return rows


# Outputs


def output(
    m: Model,
    text: Text,
    *,
    adapter: str | None = None,
    control: str | Model | None = None,
    tuned: Model | None = None,
    convs: Text | None = None,
    amplify: Sequence[float] = (2.0, 4.0),
    k: int = 15,
    max_new_tokens: int = 24,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> Result:
    """Where, and in which words, does an adapter or a fine-tuned model change what is said next?

    KL(adapter || base) of the next token at every position of the texts, split over the tokens of
    the vocabulary (the parts sum to the KL), and answers in which the difference of the logits is
    made larger than it is: base + factor * (adapter - base).

    Args:
        text: plain texts or chats; what a model wrote itself (`generate`) is where it would be.
        adapter: which adapter; None: the active one.
        control: an adapter (or model) trained alike with nothing planted.
        tuned: in place of an adapter: a whole model with the same tokenizer and vocabulary, of any
            shape, `m` being its base.
        convs: conversations to answer with an amplified difference; None: none.
        amplify: factors; 1 is the adapter itself, 0 the base.
        k: tokens and places kept in the rows.
        max_new_tokens: length of the answers.
        n_bootstrap: resamplings of the texts, for the interval of the mean KL.
        seed: of the resampling; answers are greedy.

    Returns:
        Result: kl [prompt, position] in nats (nan where a prompt has fewer positions), token_kl
        and token_change [vocabulary] (parts of the mean KL in nats; mean change of the
        probability), kl_interval [2] (95 %, over texts); with control= the same with _control.
        Rows: what (token, place, answer), arm, token, kl, change, prompt, position, factor, text.

    Raises:
        ModelError: no adapter is active or none of that name; two models of other tokenizers or
            vocabularies.
        TextError: a text that does not fit this model, or that two models read as different tokens.

    Use when:
        You ask where two models disagree. First, of all differences: it needs no layer and no
        position to be chosen.

    Not when:
        Behaviour is equal on the texts you have: a trigger that is not in them shows nothing.

    Cost:
        two forward passes with logits over the texts (three with control=); a token of an
        amplified answer costs two.

    Controls:
        the control adapter in every figure; the interval over texts. The base against itself is 0.

    Paper:
        DExperts (Liu et al., ACL 2021): differences of logits in decoding

    Example:
        from tool_packs.diff import output
        if m.adapters:
            r = output(m, ["the cat sat on the mat", "Paris is big"], convs="Name a city.")
            r["token_kl"].topk(3), r.rows[0]
    """
    started = time.perf_counter()
    side = side_of(m, adapter, tuned)
    name = name_of(side)
    arms: dict[str, str | Model] = {"adapter": side}
    if control is not None:
        arms["control"] = control
    for other in arms.values():
        _refuse_other_vocabulary(m, other)
    prompts = read_alike(m, text, list(arms.values()))
    lines, rows = [], []
    tensors: dict[str, Tensor] = {}
    dims: dict[str, tuple[str, ...]] = {}
    generator = torch.Generator().manual_seed(seed)
    for arm, which in arms.items():
        kl, token_kl, change, places = _divergence(m, prompts, which, k)
        mean = kl.nanmean(1)  # [N], each text counts once
        draws = torch.randint(len(prompts), (n_bootstrap, len(prompts)), generator=generator)
        interval = mean[draws].mean(1).quantile(torch.tensor([0.025, 0.975]))
        for key, value, axes in (
            ("kl", kl, ("prompt", "position")),
            ("token_kl", token_kl, ("vocabulary",)),
            ("token_change", change, ("vocabulary",)),
            ("kl_interval", interval, ("end",)),
        ):
            tensors[_named(key, arm)], dims[_named(key, arm)] = value, axes
        top = token_kl.abs().topk(min(k, len(token_kl))).indices.tolist()
        strings = token_strings(m, top)
        rows += [
            {
                "what": "token",
                "arm": arm,
                "token": token,
                "kl": round(token_kl[i].item(), 6),
                "change": round(change[i].item(), 6),
            }
            for i, token in zip(top, strings, strict=True)
        ]
        rows += [{"what": "place", "arm": arm} | place for place in places]
        up = [t for i, t in zip(top, strings, strict=True) if change[i] > 0]
        lines.append(
            f"{arm} {name_of(which)}: mean KL {mean.mean():.4g} nats a token "
            f"(95 % over texts {interval[0]:.3g} to {interval[1]:.3g}); more likely: {up[:8]}"
        )
    if control is None:
        lines.append("no control adapter was given: any training gives some KL")
    if convs is not None:
        for arm, which in arms.items():
            for factor in amplify:
                texts = _amplified_logits(m, which, as_list(convs), float(factor), max_new_tokens)
                rows += [
                    {"what": "answer", "arm": arm, "factor": float(factor), "prompt": i, "text": t}
                    for i, t in enumerate(texts)
                ]
                lines.append(f"{arm}, logit difference x {factor:g}: {texts[0][:80]!r}")
    return Result(
        title=f"what {told(side)} changes in the next token, over {len(prompts)} texts",
        tensors=to_cpu(tensors),
        dims=dims,
        rows=rows,
        lines=lines,
        figure={"kind": "bars", "x": "token", "y": "kl", "by": "arm"} if not convs else None,
        provenance=provenance(
            m,
            "diff.output",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            adapter=name,
            control=None if control is None else name_of(control),
            tuned=recorded(tuned),
            amplify=list(amplify),
        ),
    )


def _few(m: Model, prompts: Sequence[Prompt]) -> list[Batch]:
    """Batches whose logits can be held at once."""
    longest = max(len(p) for p in prompts)
    return list(batches(m, prompts, rows=max(1, LOGITS_AT_ONCE // (longest * m.vocab_size))))


def _refuse_other_vocabulary(m: Model, side: str | Model) -> None:
    if isinstance(side, str):
        return
    refuse_other_tokens(m, side)
    if side.vocab_size != m.vocab_size:
        raise ModelError(
            f"{side.name} has logits for {side.vocab_size} tokens and {m.name} for {m.vocab_size}: "
            "resize the embeddings of one (.hf.resize_token_embeddings) so that they are as many"
        )


def _divergence(
    m: Model, prompts: Sequence[Prompt], side: str | Model, k: int
) -> tuple[Tensor, Tensor, Tensor, list[dict[str, Any]]]:
    """KL [N, T], its parts by token [V], the mean change of each probability [V], top places."""
    longest = max(len(p) for p in prompts)
    kl = torch.full((len(prompts), longest), float("nan"))
    parts = torch.zeros(m.vocab_size, dtype=torch.float64)
    change = torch.zeros(m.vocab_size, dtype=torch.float64)
    best: list[tuple[float, int, int, int]] = []
    with computing(m, side) as other:
        strict = m if not m.ignores_padding else other
    for batch in shown(_few(strict, prompts), "divergence"):
        with computing(m, side) as other:
            on = (
                all_logits(other, make_batch(other, prompts, batch.index)).float().log_softmax(-1)
            )  # [B, T, V]
        with m.base():
            off = (
                all_logits(m, make_batch(m, prompts, batch.index))
                .float()
                .log_softmax(-1)
                .to(on.device)
            )
        moved = on.exp() * (on - off)  # [B, T, V]
        for b, i in enumerate(batch.index):
            pad = batch.pad[b]
            mine = moved[b, pad:]  # [t, V]
            here = mine.sum(-1).cpu()
            kl[i, : len(here)] = here
            # Each text counts once, however long it is.
            parts += mine.mean(0).cpu().double() / len(prompts)
            change += (on[b, pad:].exp() - off[b, pad:].exp()).mean(0).cpu().double() / len(prompts)
            towards = mine.argmax(-1).cpu()
            top = here.topk(min(k, len(here)))
            best += [
                (value, i, t, int(towards[t]))
                for value, t in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
    places = []
    for value, i, t, token in sorted(best, reverse=True)[:k]:
        before = m.tokenizer.decode(list(prompts[i].ids[: t + 1]))[-60:]
        places.append(
            {
                "prompt": i,
                "position": t,
                "text": before,
                "token": token_strings(m, [token])[0],
                "kl": round(value, 5),
            }
        )
    return kl, parts.float(), change.float(), places


@torch.no_grad()
def _amplified_logits(
    m: Model, side: str | Model, convs: Sequence[Any], factor: float, max_new_tokens: int
) -> list[str]:
    """Greedy answers from base + factor * (adapter - base), each side under its own cache."""
    prompts = read_alike(m, [as_chat(m, c) for c in convs], [side])
    texts = [""] * len(prompts)
    for batch in shown_batches(m, prompts, "amplified answers"):
        ids, mask, position = batch.ids, batch.mask, batch.positions
        caches: list[Any] = [None, None]  # of the base and of the other side
        alive = torch.ones(len(batch.index), dtype=torch.bool, device=ids.device)
        eos = torch.tensor(m.eos_ids, device=ids.device)
        tokens = []
        for _ in range(max_new_tokens):
            logits = []
            for i, way in enumerate((m.base(), computing(m, side))):
                with way as one:
                    inputs = (x.to(one.device) for x in (ids, mask, position))
                    out, caches[i] = step_logits(one, *inputs, caches[i])
                logits.append(out.to(ids.device))
            mixed = logits[0] + factor * (logits[1] - logits[0])
            chosen = mixed.argmax(-1)
            tokens.append(chosen.masked_fill(~alive, -1))
            alive = alive & ~torch.isin(chosen, eos)
            if not alive.any():
                break
            ids, position = chosen[:, None].to(mask.device), position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(batch.index), 1)], 1)
        written = torch.stack(tokens, 1).cpu()
        for b, i in enumerate(batch.index):
            texts[i] = decode(m, [t for t in written[b].tolist() if t >= 0])
    return texts


# Weights


def weights(
    m: Model,
    *,
    adapter: str | None = None,
    control: str | None = None,
    tuned: Model | None = None,
    k: int = 8,
    rank: int = 3,
    track: Sequence[str] = (),
    n_random: int = 20,
    seed: int = 0,
) -> Result:
    """Which weights did the training change, how much, and towards which words?

    The change of each matrix, by its singular values: LoRA's product is decomposed from its
    factors, never multiplied out; of two whole models the difference is. A singular vector on the
    side of the residual stream is read through the final norm and the unembedding; its sign is
    free, so both ends are given.

    Args:
        adapter: a LoRA adapter; None: the active one.
        control: an adapter trained alike with nothing planted.
        tuned: in place of an adapter: a whole model of the same shape, `m` being its base.
        k: words kept at each end of a singular vector.
        rank: singular vectors read of each matrix.
        track: words whose best rank over all vectors and both ends is wanted.
        n_random: draws of as many random vectors, for what meaningless ones give a tracked word.
        seed: of the random vectors.

    Returns:
        Result: norm, base_norm, stable_rank [module]; singular [module, value] (padded with 0);
        with control= norm_control [module]; with track= rank [word], rank_random [word, null] (the
        best of as many random vectors), with control= rank_control [word]. Rows: module, layer,
        norm, norm_ratio (change over the weight's own norm), stable_rank, singular (the first),
        side (writes: what it adds to the stream; reads: what it looks for), top, bottom (words of
        the first vector; empty where the matrix does not touch the stream).

    Raises:
        ModelError: no adapter, one that is no plain LoRA (DoRA, (IA)3), or two models that differ
            in shape; a model whose lens is not exact.

    Use when:
        You have no texts that bring the behaviour out: weights need none.

    Not when:
        The fine-tune is broad: the largest singular vectors are then those of the format.

    Cost:
        no forward pass; a singular value decomposition of r x r for each LoRA matrix.

    Controls:
        the control adapter; random vectors, as many as were read, for each tracked word.

    Paper:
        arXiv 2209.02535 (weights read in the vocabulary)

    Example:
        from tool_packs.diff import weights
        if m.adapters:
            r = weights(m, track=["cat"])
            r.rows[0]["module"], r.rows[0]["norm_ratio"], r["rank"]
    """
    started = time.perf_counter()
    if rank < 1 or k < 1:
        raise ModelError(f"rank={rank} and k={k}: both are at least 1")
    name = name_of(side_of(m, adapter, tuned))
    found = _whole_changes(m, tuned) if tuned is not None else _lora_changes(m, name)
    words = {word: word_ids(m, word) for word in track}
    rows, spectra, read_vectors = _read_changes(m, found, k, rank)
    tensors: dict[str, Tensor] = {
        "norm": torch.tensor([row["norm"] for row in rows]),
        "base_norm": torch.tensor([row["base_norm"] for row in rows]),
        "stable_rank": torch.tensor([row["stable_rank"] for row in rows]),
        "singular": nn.utils.rnn.pad_sequence(spectra, batch_first=True),
    }
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(tensors, ("module",))
    dims["singular"] = ("module", "value")
    largest = sorted(rows, key=lambda row: -row["norm_ratio"])
    lines = [
        f"{len(rows)} matrices changed; the most, over their own norm: "
        + ", ".join(f"{row['module']} {row['norm_ratio']:.3f}" for row in largest[:4])
    ]
    lines += [
        f"{row['module']} {row['side']} {row['top'][:5]} / {row['bottom'][:5]}"
        for row in sorted(rows, key=lambda row: -row["norm"])[:4]
        if row["top"]
    ]
    theirs: Tensor | None = None
    if control is not None:
        other, _, theirs = _read_changes(m, _lora_changes(m, control), k, rank)
        by_name = {row["module"]: row["norm"] for row in other}
        tensors["norm_control"] = torch.tensor([by_name.get(row["module"], 0.0) for row in rows])
        dims["norm_control"] = ("module",)
        lines.append(
            f"control adapter {control}: total norm {tensors['norm_control'].norm():.3g} "
            f"beside {tensors['norm'].norm():.3g}"
        )
    if words:
        generator = torch.Generator().manual_seed(seed)
        count = len(read_vectors)
        null = [
            _best_ranks(m, torch.randn(count, m.width, generator=generator), words)
            for _ in range(n_random)
        ]
        tensors["rank"] = _best_ranks(m, read_vectors, words)
        tensors["rank_random"] = torch.stack(null, 1)
        dims |= {"rank": ("word",), "rank_random": ("word", "null")}
        if theirs is not None:
            tensors["rank_control"], dims["rank_control"] = _best_ranks(m, theirs, words), ("word",)
        for w, word in enumerate(words):
            beside = f", control adapter {int(tensors['rank_control'][w])}" if control else ""
            lines.append(
                f"{word!r}: best rank {int(tensors['rank'][w])} over {count} vectors{beside}; "
                f"control, as many random vectors: {mean_sd(tensors['rank_random'][w].float())}"
            )
    return Result(
        title=f"what the training of {name} changed in {len(rows)} matrices",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"module": [row["module"] for row in rows], "word": list(words)},
        rows=rows,
        lines=lines,
        figure={"kind": "bars", "x": "module", "y": "norm_ratio"},
        provenance=provenance(
            m, "diff.weights", started, seed=seed, adapter=name, control=control, rank=rank
        ),
    )


Change = tuple[str, Tensor, Tensor, Tensor, Any]  # name, U [out, r], S [r], V [in, r], base module


@torch.no_grad()
def _lora_changes(m: Model, adapter: str) -> list[Change]:
    if adapter not in m.adapters:
        known = ", ".join(m.adapters) or "none"
        raise ModelError(f"no adapter {adapter!r} is loaded (loaded: {known})")
    config = m.hf.peft_config[adapter]
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA" or getattr(config, "use_dora", False):
        raise ModelError(
            f"the adapter {adapter} is {'DoRA' if kind == 'LORA' else kind}: its change is no "
            "product of two factors. Merge it, and give the merged model as tuned=..."
        )
    found: list[Change] = []
    for path, module in m.core.named_modules():
        factors = getattr(module, "lora_A", None)
        if factors is None or adapter not in factors:
            continue
        a = factors[adapter].weight.detach().float().cpu()  # [r, in]
        b = module.lora_B[adapter].weight.detach().float().cpu()  # [out, r]
        for factor in (a, b):
            require_numbers(m.core, factor)
        q_out, r_out = torch.linalg.qr(b)
        q_in, r_in = torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(r_out @ r_in.T * module.scaling[adapter])
        found.append((path, q_out @ u, s, q_in @ vh.T, module.get_base_layer()))
    return found


@torch.no_grad()
def _whole_changes(m: Model, tuned: Model) -> list[Change]:
    theirs = dict(tuned.core.named_modules())
    found: list[Change] = []
    prefix = m.structure.layers_path
    for path, module in m.core.named_modules():
        weight = getattr(module, "weight", None)
        if not path.startswith(prefix) or not isinstance(weight, Tensor) or weight.ndim != 2:
            continue
        other = getattr(theirs.get(path), "weight", None)
        if other is None or other.shape != weight.shape:
            raise ModelError(
                f"{path} is {tuple(weight.shape)} here and "
                f"{None if other is None else tuple(other.shape)} in the other model: "
                "the two must have one shape"
            )
        with held(module), held(theirs[path]):
            mine, other = module.weight.detach(), theirs[path].weight.detach()
            change = other.float().cpu() - mine.float().cpu()
            require_numbers(m.core, mine)
            require_numbers(tuned.core, other)
        if not change.any():
            continue
        if type(module).__name__ == "Conv1D":  # GPT-2 keeps its matrices the other way round
            change = change.T
        u, s, vh = torch.linalg.svd(change, full_matrices=False)
        found.append((path, u, s, vh.T, module))
    if not found:
        raise ModelError("no matrix differs between the two models")
    return found


def _read_changes(
    m: Model, found: Sequence[Change], k: int, rank: int
) -> tuple[list[dict[str, Any]], list[Tensor], Tensor]:
    """Rows, singular values by module, and all vectors [X, d] on the side of the stream."""
    rows, spectra, vectors = [], [], []
    for path, u, s, v, module in found:
        side, basis = _side(m, path, u, v)
        with held(module):
            weight = module.weight.detach()
            base_norm = weight.float().norm().item() if weight.is_floating_point() else 0.0
            require_numbers(m.core, weight)
        norm = s.norm().item()
        row: dict[str, Any] = {
            "module": path.removeprefix(m.structure.layers_path + "."),
            "layer": _layer_of(path, m.structure.layers_path),
            "norm": norm,
            "base_norm": base_norm,
            "norm_ratio": round(norm / base_norm, 5) if base_norm else 0.0,
            "stable_rank": round((s.square().sum() / s[0].square().clamp(min=1e-30)).item(), 3),
            "singular": round(s[0].item(), 5),
            "side": side,
            "top": [],
            "bottom": [],
        }
        if basis is not None:
            mine = basis[:, :rank].T  # [rank, d]
            vectors.append(mine)
            words = lens_vector(m, mine[:1], k=k).rows[0]
            row |= {"top": words["top"], "bottom": words["bottom"]}
        rows.append(row)
        spectra.append(s)
    return rows, spectra, torch.cat(vectors) if vectors else torch.zeros(0, m.width)


def _side(m: Model, path: str, u: Tensor, v: Tensor) -> tuple[str, Tensor | None]:
    """Whether a matrix writes to the stream, reads from it, or neither; and its vectors there."""
    writes, reads = u.shape[0] == m.width, v.shape[0] == m.width
    if writes and reads:  # as wide on both sides: the last part of its block writes
        last = path.rsplit(".", 1)[-1]
        writes = last in ("o_proj", "out_proj", "c_proj", "dense", "wo", "down_proj")
        reads = not writes
    if writes:
        return "writes", u
    return ("reads", v) if reads else ("inside", None)


def _layer_of(path: str, prefix: str) -> int | None:
    part = path.removeprefix(prefix + ".").split(".", 1)[0]
    return int(part) if part.isdigit() else None


def _best_ranks(m: Model, vectors: Tensor, words: Mapping[str, Sequence[int]]) -> Tensor:
    """For each word the best rank [W] it has over the vectors [X, d] and their negatives."""
    if not len(vectors):
        return torch.full((len(words),), float(m.vocab_size))
    scores = _lens(m, torch.cat([vectors, -vectors]))  # [2X, V]
    return torch.tensor([float(min(_rank(row, ids) for row in scores)) for ids in words.values()])
