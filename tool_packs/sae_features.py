"""What an SAE's features are: where they fire, how texts differ in them, what they do, their names."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs import sae_train
from tool_packs.engine import FOREVER, Intervention, all_logits, batches, editing
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import complete
from tool_packs.logit_lens import lens_vector
from tool_packs.prompts import Prompt, Text, as_chat, as_list, read, token_strings
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.sae_model import SAE, after_layer, check_fits, from_first, states_of
from tool_packs.steering import QUESTIONS
from tool_packs.steering import steer as steer_along

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["diff", "features", "label", "steer"]

AROUND = 8  # tokens shown on each side of an example's
LOGITS_AT_ONCE = 2**26  # numbers in the logits of one pass


def features(
    m: Model,
    sae: SAE,
    text: Text,
    *,
    which: Sequence[int] | None = None,
    n: int = 20,
    examples: int = 5,
    loss: bool = True,
) -> Result:
    """Which features fire on these texts, on which tokens, and how much of the model do they keep?

    The loss is that of the model's next tokens while the SAE's reconstruction stands in place of
    the states; recovered is 1 where it is as low as the model's own, 0 where it is as high as with
    the states ablated.

    Args:
        sae: from `train` or `load`.
        text: texts or chats.
        which: features to list; None: the n with the largest activations.
        n: features listed.
        examples: texts listed of each, those with the largest activations.
        loss: whether the loss is measured; it takes four forward passes.

    Returns:
        Result: the activations as sparse entries, prompt, position, feature and activation, each
        [entry]; frequency [feature] (share of tokens), peak [feature]; fvu and l0 []; with loss
        cross_entropy [arm] in nats a token (model, sae, zero, mean) and recovered [2] (against
        zero, against the mean). Rows: feature, frequency, peak, mean (where it fires), examples
        (the token in «» with its neighbours), prompts.

    Raises:
        ModelError: an SAE of another layer or width than this model has.
        TextError: no token to read, states that hold NaN, a feature that does not exist.

    Use when:
        First, on any SAE you were given: whether it fits the model, and what its features are.

    Not when:
        You compare two sets of texts: `diff`.

    Cost:
        one forward pass up to the layer; four whole ones for the loss.

    Controls:
        zero- and mean-ablation of the same states beside the loss with the SAE.

    Paper:
        arXiv 2406.04093, 2408.05147

    Example:
        from tool_packs import sae
        texts = [f"the {a} {b}" for a in ("cat", "dog") for b in ("sat on the mat", "is here")]
        s = sae.train(m, texts * 4, 0.5, latents=64, k=4, steps=20, batch=64)
        r = sae.features(m, s, texts)
        r.rows[0]["examples"], r["recovered"]
    """
    started = time.perf_counter()
    check_fits(m, sae)
    prompts = read(m, text)
    chosen = None if which is None else [_feature(sae, j) for j in which]
    if examples < 1 or n < 1:
        raise TextError(f"n={n} and examples={examples}: both are at least 1")
    where = from_first(prompts, sae.first)
    x = states_of(m, sae, prompts, where).to(sae.W_enc.device)  # [T, d]
    entries = _entries(sae, x, where)
    peak = torch.zeros(sae.n_features).scatter_reduce(
        0, entries["feature"], entries["activation"], "amax"
    )
    counts = entries["feature"].bincount(minlength=sae.n_features)
    sums = torch.zeros(sae.n_features).index_add(0, entries["feature"], entries["activation"])
    if chosen is None:
        chosen = [j for j in peak.topk(min(n, sae.n_features)).indices.tolist() if peak[j] > 0]
    rows = []
    for j in chosen:
        shown, found = _examples(m, prompts, entries, j, examples)
        rows.append(
            {
                "feature": j,
                "frequency": round(counts[j].item() / len(x), 5),
                "peak": round(peak[j].item(), 4),
                "mean": round((sums[j] / counts[j].clamp(min=1)).item(), 4),
                "examples": shown,
                "prompts": found,
            }
        )
    fvu = sae_train.unexplained(x, sae.reconstruct(x))
    l0 = len(entries["feature"]) / len(x)
    tensors = {
        **entries,
        "frequency": counts / len(x),
        "peak": peak,
        "fvu": torch.tensor(fvu),
        "l0": torch.tensor(l0),
    }
    dims: dict[str, tuple[str, ...]] = dict.fromkeys(entries, ("entry",))
    dims |= {"frequency": ("feature",), "peak": ("feature",), "fvu": (), "l0": ()}
    lines = [
        f"{sae.describe()}; {len(x)} tokens: FVU {fvu:.4f}, L0 {l0:.1f}, "
        f"{int((counts > 0).sum())} features fire"
    ]
    labels: dict[str, list[Any]] = {}
    if loss and sae.site in ("resid_post", "resid_pre"):
        ce = _losses(m, sae, prompts, x)  # [arm]: model, sae, zero, mean
        recovered = (ce[2:] - ce[1]) / (ce[2:] - ce[0])
        tensors |= {"cross_entropy": ce, "recovered": recovered}
        dims |= {"cross_entropy": ("arm",), "recovered": ("ablation",)}
        labels = {"arm": ["model", "sae", "zero", "mean"], "ablation": ["zero", "mean"]}
        lines.append(
            f"cross-entropy {ce[0]:.4f} nats, with the SAE in place {ce[1]:.4f}; controls, states "
            f"ablated to zero {ce[2]:.4f}, to their mean {ce[3]:.4f}: recovered "
            f"{recovered[0]:.3f} and {recovered[1]:.3f}"
        )
    elif loss:
        lines.append(f"the loss is not measured at {sae.site}: the stream alone can be replaced")
    lines += [
        f"feature {row['feature']}: {row['frequency']:.4f} of tokens, peak {row['peak']:.3g}: "
        + "; ".join(repr(e[:60]) for e in row["examples"][:2])
        for row in rows[:8]
    ]
    return Result(
        title=f"features of {sae.site} {sae.layer} on {len(prompts)} texts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels=labels,
        rows=rows,
        lines=lines,
        figure={"kind": "bars", "x": "feature", "y": "peak"} if rows else None,
        provenance=provenance(
            m,
            "sae.features",
            started,
            prompts=[p.ids for p in prompts],
            layer=sae.layer,
            site=sae.site,
            sae=sae.describe(),
        ),
    )


def diff(
    m: Model,
    sae: SAE,
    a: Text,
    *,
    b: Text | None = None,
    adapter: str | None = None,
    samples: int = 1,
    temperature: float = 1.0,
    max_new_tokens: int = 32,
    n: int = 15,
    n_permutations: int = 500,
    seed: int = 0,
) -> Result:
    """In which features do two sets of texts differ, or the answers of an adapter and its base?

    A text has a feature if it fires on any of its tokens; the shares of texts that have it are
    compared. With b= the texts are read by the model as it computes now. Without, `a` are
    conversations: base and adapter answer them, and the base reads both sets of answers, so that a
    difference is one of what is said, not of how it is read.

    Args:
        sae: from `train` or `load`.
        a: texts or chats; without b= the conversations to answer.
        b: the other texts.
        adapter: whose answers are compared with the base's; None: the active adapter.
        samples: answers to each conversation.
        temperature: of the answers.
        max_new_tokens: length of the answers.
        n: features listed.
        n_permutations: of the null.
        seed: of answers and null.

    Returns:
        Result: frequency_a, frequency_b and difference (b - a) [feature], shares of texts; p
        [feature] (one feature alone) and p_family [feature] (permutations whose largest difference
        of any feature is as large); null_max [permutation]; n_differing [] (features of p_family
        <= 0.05) and n_differing_null [permutation] (the same count in the null). Rows: feature,
        frequency_a, frequency_b, difference, p_family, tokens (which it promotes), example.

    Raises:
        ModelError: an SAE that does not fit; no b= and no adapter.
        TextError: fewer than 4 texts on a side.

    Use when:
        You have two piles of texts, or two models, and no hypothesis of how they differ.

    Not when:
        You have the hypothesis: count the words, or ask a probe.

    Cost:
        one forward pass over the texts, and the answers.

    Controls:
        labels permuted over the texts (within pairs of answers to one conversation), and the
        largest difference of all features in each permutation, so that many features are paid for.

    Paper:
        arXiv 2512.10092 (Jiang et al. 2025)

    Example:
        from tool_packs import sae
        one, two = [[f"the {x} {y}" for y in ("sat", "is", "on", "mat")] for x in ("cat", "dog")]
        s = sae.train(m, (one + two) * 2, 0.5, latents=64, k=4, steps=20, batch=64)
        r = sae.diff(m, s, one, b=two, n_permutations=50)
        r.rows[:1], r["n_differing"]
    """
    started = time.perf_counter()
    check_fits(m, sae)
    if n_permutations < 20 or samples < 1:
        raise TextError(
            f"n_permutations={n_permutations} is at least 20 and samples={samples} at least 1"
        )
    paired = b is None
    if paired:
        name = m.active_adapter if adapter is None else adapter
        if name is None:
            raise ModelError(
                "no texts to compare with and no adapter is active: give b= or adapter="
            )
        prompts, where, count = _answers(
            m, a, name, samples, temperature, max_new_tokens, seed, sae.first
        )
        what = (f"answers of the base and of {name}", "base", name)
    else:
        one, two = read(m, a), read(m, b)
        prompts, count = one + two, len(one)
        where = from_first(prompts, sae.first)
        what = ("two sets of texts", "a", "b")
    if min(count, len(prompts) - count) < 4:
        raise TextError(
            f"{count} and {len(prompts) - count} texts: give at least 4 a side, as fewer have too "
            "few permutations"
        )
    reader = m.base() if paired else contextlib.nullcontext()
    with reader:
        x = states_of(m, sae, prompts, where).to(sae.W_enc.device)
    entries = _entries(sae, x, where)
    alive = entries["feature"].unique()  # the others fire nowhere
    column = torch.zeros(sae.n_features, dtype=torch.long)
    column[alive] = torch.arange(len(alive))
    has = torch.zeros(len(prompts), len(alive))  # [N, alive]
    has[entries["prompt"], column[entries["feature"]]] = 1.0
    in_b = torch.arange(len(prompts)) >= count
    generator = torch.Generator().manual_seed(seed)
    difference = has[in_b].mean(0) - has[~in_b].mean(0)
    null = _permuted(has, count, paired, n_permutations, generator)  # [P, alive]
    null_max = null.abs().amax(1) if len(alive) else torch.zeros(n_permutations)
    near = 1e-6  # the same shares, summed in another order
    p = (1 + (null.abs() >= difference.abs() - near).sum(0)) / (1 + n_permutations)
    reached = (null_max[:, None] >= difference.abs() - near).sum(0)
    p_family = (1 + reached) / (1 + n_permutations)
    bar = null_max.quantile(0.95, interpolation="higher")
    differing = int((p_family <= 0.05).sum())
    differing_null = (null.abs() > bar + near).sum(1)

    def full(values: Tensor, fill: float) -> Tensor:
        return torch.full((sae.n_features,), fill).index_put((alive,), values)

    shares = has[~in_b].mean(0), has[in_b].mean(0)
    order = difference.abs().argsort(descending=True)[:n].tolist()
    tokens = _promoted(m, sae, alive[order])
    rows = []
    for i, words in zip(order, tokens, strict=True):
        j = int(alive[i])
        side = (difference[i] > 0).item()
        mine = {key: v[(entries["prompt"] >= count) == side] for key, v in entries.items()}
        rows.append(
            {
                "feature": j,
                "frequency_a": round(shares[0][i].item(), 4),
                "frequency_b": round(shares[1][i].item(), 4),
                "difference": round(difference[i].item(), 4),
                "p_family": round(p_family[i].item(), 4),
                "tokens": words,
                "example": "".join(_examples(m, prompts, mine, j, 1)[0]),
            }
        )
    lines = [
        f"{differing} of {len(alive)} features that fire differ (p <= 0.05 over all features); "
        f"control, labels permuted: {mean_sd(differing_null)} features",
        f"largest difference {difference.abs().max() if len(alive) else 0:.3f}; control, the "
        f"largest of any feature with labels permuted: {mean_sd(null_max)}, 95 % below {bar:.3f}",
    ]
    lines += [
        f"feature {row['feature']}: {what[1]} {row['frequency_a']:.2f}, {what[2]} "
        f"{row['frequency_b']:.2f}, p {row['p_family']:.3f}; promotes {row['tokens'][:4]}; "
        f"{row['example'][:70]!r}"
        for row in rows[:6]
    ]
    return Result(
        title=f"features of {sae.site} {sae.layer} in {what[0]}: {count} and "
        f"{len(prompts) - count}",
        tensors=to_cpu(
            {
                "frequency_a": full(shares[0], 0.0),
                "frequency_b": full(shares[1], 0.0),
                "difference": full(difference, 0.0),
                "p": full(p, 1.0),
                "p_family": full(p_family, 1.0),
                "null_max": null_max,
                "n_differing": torch.tensor(differing),
                "n_differing_null": differing_null,
            }
        ),
        dims={
            "frequency_a": ("feature",),
            "frequency_b": ("feature",),
            "difference": ("feature",),
            "p": ("feature",),
            "p_family": ("feature",),
            "null_max": ("permutation",),
            "n_differing": (),
            "n_differing_null": ("permutation",),
        },
        rows=rows,
        lines=lines,
        figure={"kind": "bars", "x": "feature", "y": "difference"} if rows else None,
        provenance=provenance(
            m,
            "sae.diff",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layer=sae.layer,
            site=sae.site,
            sae=sae.describe(),
            adapter=what[2] if paired else None,
            samples=samples,
            temperature=temperature,
            n_permutations=n_permutations,
        ),
    )


def steer(
    m: Model,
    sae: SAE,
    feature: int,
    *,
    activation: float | None = None,
    strengths: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    convs: Text = QUESTIONS,
    scorer: Callable[[str], float] | None = None,
    towards: Sequence[str] = (),
    away: Sequence[str] = (),
    n_features: int = 1,
    n_random: int = 2,
    max_new_tokens: int = 32,
    start: int | str = 0,
    seed: int = 0,
) -> Result:
    """Does the model say what this feature stands for, when more of the feature is added?

    The feature's decoder row is added as in `steering.steer`; strength 1 adds what the feature adds
    at `activation`.

    Args:
        sae: from `train` or `load`, of resid_post, resid_pre or mlp_out.
        feature: its number.
        activation: what strength 1 stands for; None: the largest activation in training.
        strengths: multiples of it; 0 is always added.
        convs: as in `steering.steer`.
        scorer: as in `steering.steer`.
        towards: as in `steering.steer`.
        away: as in `steering.steer`.
        n_features: other features that are steered alike, at the same norm.
        n_random: random vectors of the same norm.
        max_new_tokens: length of the answers.
        start: first position changed.
        seed: of the controls; answers are greedy.

    Returns:
        Result: as of `steering.steer`, and effect_feature and coherence_feature [strength, other]
        of the other features; rows have the arm "feature J" for those.

    Raises:
        ModelError: an SAE of a site that cannot be steered, or that does not fit this model.
        TextError: no such feature, no activation known, neither scorer nor towards.

    Use when:
        You have read a feature's examples and want causal evidence for its name.

    Not when:
        The feature only detects: what it fires on and what it does can be two things.

    Cost:
        strengths * (1 + n_features + n_random) * convs rows, decoded in 1 + n_features batches.

    Controls:
        other features at the same norm, random vectors of the same norm, coherence.

    Paper:
        arXiv 2308.10248, 2406.04093

    Example:
        from tool_packs import sae
        s = sae.train(m, ["the cat sat on the mat", "she is here"] * 6, 1, latents=64, k=4, steps=9)
        top = int(s.peak.argmax())
        r = sae.steer(m, s, top, strengths=[1], towards=["she"], max_new_tokens=4)
        r["effect"], r["effect_feature"], r["effect_random"]
    """
    started = time.perf_counter()
    check_fits(m, sae)
    j = _feature(sae, feature)
    layer = after_layer(sae, "steering")
    if activation is None:
        if sae.peak is None:
            raise TextError(
                "the largest activation of a loaded SAE is not known: give activation=, as "
                "features(m, sae, text)['peak'] tells"
            )
        activation = sae.peak[j].item()
    if not activation > 0:
        raise TextError(f"activation={activation:g} of feature {j}: give one above 0")
    rows_of = sae.W_dec.detach().cpu()
    vector = activation * rows_of[j]
    if not vector.norm() > 0:
        raise TextError(f"the decoder row of feature {j} is zero: it adds nothing")
    options: dict[str, Any] = {
        "strengths": strengths,
        "convs": convs,
        "scorer": scorer,
        "towards": towards,
        "away": away,
        "max_new_tokens": max_new_tokens,
        "start": start,
        "seed": seed,
    }
    r = steer_along(m, vector, layer, n_random=n_random, **options)
    generator = torch.Generator().manual_seed(seed)
    alive = sae.peak if sae.peak is not None else rows_of.norm(dim=-1)
    pool = [i for i in alive.nonzero()[:, 0].tolist() if i != j]
    pick = torch.randperm(len(pool), generator=generator)[:n_features].tolist()
    others = [pool[i] for i in pick]
    effects, coherences = [], []
    for other in others:
        control = rows_of[other] / rows_of[other].norm() * vector.norm()
        theirs = steer_along(m, control, layer, n_random=0, **options)
        effects.append(theirs["effect"])
        coherences.append(theirs["coherence"])
        r.rows += [row | {"arm": f"feature {other}"} for row in theirs.rows]
    levels = r.labels["strength"]
    if others:
        zero = levels.index(0.0)
        r.tensors |= {
            "effect_feature": torch.stack(effects, 1),
            "coherence_feature": torch.stack(coherences, 1),
        }
        r.dims |= dict.fromkeys(("effect_feature", "coherence_feature"), ("strength", "other"))
        r.labels["other"] = others
        change = r["effect_feature"] - r["effect_feature"][zero]
        shown = ", ".join(f"{s:+g}: {change[i].mean():+.3g}" for i, s in enumerate(levels) if s)
        r.lines.insert(1, f"control, {len(others)} other features at the same norm: {shown}")
    r.title = f"feature {j} of {sae.site} {sae.layer}, strength 1 is activation {activation:.3g}"
    r.provenance = provenance(
        m,
        "sae.steer",
        started,
        prompts=[p.ids for p in read(m, [as_chat(m, c) for c in as_list(convs)])],
        seed=seed,
        **r.provenance.arguments | {"feature": j, "activation": activation, "others": others},
    )
    return r


def label(
    m: Model,
    sae: SAE,
    which: Sequence[int] | int,
    *,
    text: Text | None = None,
    k: int = 10,
    examples: int = 5,
    labeller: Callable[[list[str], list[str]], str] | None = None,
    n_random: int = 200,
    seed: int = 0,
) -> Result:
    """What could this feature be called: which words does it promote, and on what does it fire?

    Args:
        sae: from `train` or `load`.
        which: features.
        text: texts on which examples are looked for; None: no examples.
        k: words at each end of the unembedding.
        examples: texts of each feature.
        labeller: words and examples -> a name, such as a question to another model.
        n_random: random directions whose words are read as well.
        seed: of the random directions.

    Returns:
        Result: top_logits and bottom_logits [feature, k], top_random [null] (the largest logit of a
        random direction), p [feature] (random directions that promote a word as strongly). Rows:
        feature, promotes, suppresses, p, examples, label (without a labeller the first word).

    Raises:
        ModelError: an SAE that does not fit; the model's logits are not unembed(norm(x)).
        TextError: a feature that does not exist.

    Use when:
        Features came out of `features` or `diff` as numbers.

    Not when:
        p is large: the words are what any direction of this layer gives; trust the examples alone.

    Cost:
        (features + n_random) * vocabulary * d; one forward pass over the texts.

    Controls:
        the largest logit of random directions.

    Paper:
        arXiv 2408.05147, 2512.10092

    Example:
        from tool_packs import sae
        texts = ["the cat sat on the mat", "she is here"] * 6
        s = sae.train(m, texts, 1, latents=64, k=4, steps=9)
        r = sae.label(m, s, [int(s.peak.argmax())], text=texts)
        r["promotes"], r["examples"]
    """
    started = time.perf_counter()
    check_fits(m, sae)
    chosen = [_feature(sae, j) for j in ([which] if isinstance(which, int) else which)]
    if not chosen:
        raise TextError("no feature to label: which is empty")
    if sae.site == "head":
        raise ModelError("an SAE of heads writes into the heads, not into the stream that is read")
    directions = sae.W_dec[chosen].detach().cpu()
    words = lens_vector(m, directions, k=k)
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(n_random, m.width, generator=generator)
    random = random * directions.norm(dim=-1).mean() / random.norm(dim=-1, keepdim=True)
    null = lens_vector(m, random, k=1)["top_logits"][:, 0]  # [null]
    top = words["top_logits"]
    p = (1 + (null >= top[:, :1]).sum(1)) / (1 + n_random)
    prompts: list[Prompt] = []
    entries: dict[str, Tensor] = {}
    if text is not None:
        prompts = read(m, text)
        where = from_first(prompts, sae.first)
        entries = _entries(sae, states_of(m, sae, prompts, where).to(sae.W_enc.device), where)
    rows = []
    for i, j in enumerate(chosen):
        shown = _examples(m, prompts, entries, j, examples)[0] if prompts else []
        promotes = words.rows[i]["top"]
        name = promotes[0].strip() if labeller is None else str(labeller(promotes, shown))
        rows.append(
            {
                "feature": j,
                "label": name,
                "promotes": promotes,
                "suppresses": words.rows[i]["bottom"],
                "p": round(p[i].item(), 4),
                "examples": shown,
            }
        )
    lines = [
        f"feature {row['feature']} ({row['label']!r}): promotes {row['promotes'][:5]}, p "
        f"{row['p']:.3f}; " + "; ".join(repr(e[:60]) for e in row["examples"][:2])
        for row in rows[:8]
    ]
    lines.append(f"control, the largest logit of random directions: {mean_sd(null)}")
    return Result(
        title=f"{len(rows)} features of {sae.site} {sae.layer}",
        tensors=to_cpu(
            {
                "top_logits": top,
                "bottom_logits": words["bottom_logits"],
                "top_random": null,
                "p": p,
            }
        ),
        dims={
            "top_logits": ("feature", "k"),
            "bottom_logits": ("feature", "k"),
            "top_random": ("null",),
            "p": ("feature",),
        },
        labels={"feature": chosen},
        rows=rows,
        lines=lines,
        provenance=provenance(
            m,
            "sae.label",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layer=sae.layer,
            site=sae.site,
            features=chosen,
            labelled=labeller is not None,
        ),
    )


# Features on texts


def _feature(sae: SAE, j: Any) -> int:
    if isinstance(j, bool) or not isinstance(j, int) or not 0 <= j < sae.n_features:
        raise TextError(f"feature {j!r}: this SAE has features 0..{sae.n_features - 1}")
    return j


def _entries(sae: SAE, x: Tensor, where: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """The sparse activations of x, whose rows are the positions `where`, prompt after prompt."""
    token, feature, value = sae.entries(x)
    prompt = torch.tensor([i for i, w in enumerate(where) for _ in w])
    position = torch.tensor([p for w in where for p in w])
    return {
        "prompt": prompt[token],
        "position": position[token],
        "feature": feature,
        "activation": value,
    }


def _examples(
    m: Model, prompts: Sequence[Prompt], entries: dict[str, Tensor], j: int, count: int
) -> tuple[list[str], list[int]]:
    """The texts in which feature j is largest, the token in «», and which prompts they are."""
    mine = (entries["feature"] == j).nonzero()[:, 0]
    order = mine[entries["activation"][mine].argsort(descending=True, stable=True)]
    shown: list[str] = []
    found: list[int] = []
    for e in order.tolist():
        i, at = int(entries["prompt"][e]), int(entries["position"][e])
        if i in found:
            continue
        ids = prompts[i].ids
        left = token_strings(m, ids[max(0, at - AROUND) : at])
        right = token_strings(m, ids[at + 1 : at + 1 + AROUND])
        shown.append("".join([*left, "«", *token_strings(m, [ids[at]]), "»", *right]))
        found.append(i)
        if len(found) == count:
            break
    return shown, found


def _promoted(m: Model, sae: SAE, which: Tensor) -> list[list[str]]:
    """The words that these features' decoder rows point to; none where they cannot be read."""
    if not len(which):
        return []
    if sae.site == "head" or not m.lens_exact:
        return [[] for _ in which]
    return [row["top"] for row in lens_vector(m, sae.W_dec[which].detach().cpu(), k=6).rows]


# The model with the SAE in place


@torch.no_grad()
def _losses(m: Model, sae: SAE, prompts: Sequence[Prompt], x: Tensor) -> Tensor:
    """Cross-entropy [4] in nats of the next tokens: as it is, with the SAE, with zero, with mean.

    Only tokens that come after a changed state count.
    """
    layer = after_layer(sae, "the loss")
    long = [p for p in prompts if len(p) > sae.first + 1]
    if not long:
        raise TextError("no text has a token after the first that the SAE reads: give loss=False")
    mean = x.mean(0)
    edits: list[Callable[[Tensor], Tensor] | None] = [
        None,
        lambda h: sae.reconstruct(h).to(h.device, h.dtype),
        torch.zeros_like,
        lambda h: mean.to(h.device, h.dtype).expand_as(h),
    ]
    longest = max(len(p) for p in long)
    rows = max(1, LOGITS_AT_ONCE // (m.vocab_size * longest))
    out = torch.zeros(len(edits), dtype=torch.float64)
    count = 0
    for batch in batches(m, long, rows=rows):
        for arm, edit in enumerate(edits):
            change = () if edit is None else (Intervention(layer, edit=edit, start=sae.first),)
            with editing(m, [change], [[(sae.first, FOREVER)] * len(change)]):
                logits = all_logits(m, batch)  # [B, T, V]
            for b, pad in enumerate(batch.pad):
                steps = logits[b, pad + sae.first : -1].float().log_softmax(-1)
                wanted = batch.ids[b, pad + sae.first + 1 :].to(steps.device)
                out[arm] -= steps.gather(-1, wanted[:, None]).sum().double().cpu()
                count += len(wanted) if arm == 0 else 0
    return (out / count).float()


# Comparing


def _answers(
    m: Model,
    convs: Text,
    adapter: str,
    samples: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    first: int,
) -> tuple[list[Prompt], list[list[int]], int]:
    """The base's and then the adapter's answers as whole prompts, the answers' positions, a half."""
    asked = read(m, [as_chat(m, c) for c in as_list(convs)])
    joined: list[Prompt] = []
    where: list[list[int]] = []
    for name in (None, adapter):
        with m.adapter(name):
            done = complete(
                m,
                asked,
                n=samples,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
            )
        for prompt, answers in zip(asked, done, strict=True):
            for answer in answers:
                joined.append(Prompt((*prompt.ids, *answer.ids), prompt.text))
                where.append(list(range(max(first, len(prompt)), len(joined[-1]))))
    return joined, where, len(joined) // 2


def _permuted(has: Tensor, count: int, paired: bool, n: int, generator: torch.Generator) -> Tensor:
    """Differences [n, features] of the shares with labels permuted; has [N, features], a first.

    Pairs (text i of a, text i of b) swap their labels or keep them; else all labels are shuffled.
    """
    total = len(has)
    if paired:
        signs = torch.randint(2, (n, count), generator=generator).float() * 2 - 1
        return signs @ (has[count:] - has[:count]) / count
    weights = torch.full((n, total), 1.0 / (total - count))
    for row in weights:
        row[torch.randperm(total, generator=generator)[:count]] = -1.0 / count
    return weights @ has
