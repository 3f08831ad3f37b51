"""In which features of an SAE two sets of texts differ, or the answers of two models."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tool_packs.errors import ModelError, TextError
from tool_packs.generation import complete
from tool_packs.logit_lens import lens_vector
from tool_packs.prompts import Prompt, Text, as_chat, as_list, read
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.sae_features import entries_of, examples_of
from tool_packs.sae_model import SAE, check_fits, from_first, states_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["diff"]


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
        You have the hypothesis: count the words, or ask a probe. With hundreds of answers every
        training shows in some features, its manner if not its matter: call it for a control
        adapter as well, and compare.

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
    entries = entries_of(sae, x, where)
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
                "example": "".join(examples_of(m, prompts, mine, j, 1)[0]),
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


def _promoted(m: Model, sae: SAE, which: Tensor) -> list[list[str]]:
    """The words that these features' decoder rows point to; none where they cannot be read."""
    if not len(which):
        return []
    if sae.site == "head" or not m.lens_exact:
        return [[] for _ in which]
    return [row["top"] for row in lens_vector(m, sae.W_dec[which].detach().cpu(), k=6).rows]


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
