"""What happens when more of one feature of an SAE is added."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tool_packs.errors import TextError
from tool_packs.prompts import Text, as_chat, as_list, read
from tool_packs.result import Result, provenance
from tool_packs.sae_features import feature_number
from tool_packs.sae_model import SAE, after_layer, check_fits
from tool_packs.steering import QUESTIONS
from tool_packs.steering import steer as steer_along

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["steer"]


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
    j = feature_number(sae, feature)
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
