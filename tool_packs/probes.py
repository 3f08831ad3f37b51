"""Probes: is a property readable from the activations, and is the reading more than memory?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs.activations import Layers, collect_tokens
from tool_packs.errors import TextError
from tool_packs.prompts import Position, Prompt, Text, read, resolve, token_strings
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.separation import (
    FOLDS,
    Fit,
    as_groups,
    auroc_within,
    bootstrap,
    cross_fit,
    fit,
    folds,
    random_labels,
    shuffle,
)
from tool_packs.transfer import (
    check_fits,
    random_directions,
    targets,
    transfer_line,
    transferred,
    within,
)

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["probe", "probe_scores"]

KINDS = ("logistic", "mass-mean", "k-sparse", "attention")
SITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")
AT_LEAST = 8  # texts a side: two in each fold
N_BOOTSTRAP = 1000


def probe(
    m: Model,
    pos: Text,
    neg: Text,
    *,
    kind: str = "logistic",
    layers: Layers = "all",
    position: Position | None = None,
    site: str = "resid_post",
    groups: Sequence[Any] | None = None,
    transfer: str | Model | Sequence[str | Model] | None = None,
    unlabelled: Text | None = None,
    control_task: bool = True,
    k: int = 8,
    C: float = 1.0,
    n_null: int | None = None,
    seed: int = 0,
) -> Result:
    """Does the model know something: can a property be read from its activations on unseen texts?

    The texts are dealt into four folds, a group never in two. Each fold is tested once: by probes
    of every layer that learned from two others, at the layer that was best on the remaining one.
    Shuffled labels and the control task go through all of it, the choice of the layer included.

    Args:
        pos: texts or chats that have the property, at least 8.
        neg: texts or chats that lack it, at least 8.
        kind: "logistic" (L2), "mass-mean" (difference of means), "k-sparse" (logistic on the k
            dimensions with the most distant class means), "attention" (a learned query weighs
            the tokens, a value reads them).
        layers: as in `capture`.
        position: as in `capture`; several positions of one text are averaged. None: "last", for
            attention "all".
        site: "resid_post", "resid_pre", "attn_out" or "mlp_out", as in `capture`.
        groups: which texts belong together, a name for each, those of pos first. None: where there
            are as many in pos as in neg, text i of both; and texts that are the same.
        transfer: where else to score with the probes fitted here: the name of a loaded adapter,
            "base", another model of this width, or a list. A control adapter belongs in it.
        unlabelled: texts without a label, scored here and there; needs transfer.
        control_task: whether to fit random functions of a text's tokens too.
        k: dimensions of a k-sparse probe.
        C: inverse strength of the L2 penalty, on activations scaled to unit rms a layer.
        n_null: shuffles. None: 20, for attention 4.
        seed: of folds, shuffles, control tasks and the bootstrap.

    Returns:
        Result: weight [layer, d], bias [layer] (fitted on all texts; for attention also query
        [layer, d]), auroc [layer], auroc_ci [layer, bound] (95 %, groups drawn
        anew; nan where each fold is one group),
        auroc_validation [layer], auroc_shuffled [layer, null], auroc_control [layer, draw], scores
        [layer, text] (out of fold); chosen [statistic] (AUROC, low, high at layers chosen on
        validation), chosen_shuffled [null], chosen_control [draw]; with transfer=
        transfer_auroc and transfer_shift [model, layer] (of the mean score, in distances between
        the classes: from neg to pos is 1); with unlabelled= unlabelled_shift and
        unlabelled_auroc [model, layer] (how often a score there is above one here),
        unlabelled_random [model, null]; rows layer, auroc, low, high, validation, shuffled,
        control, selectivity, chosen. The chosen layer is provenance.arguments["layer"].

    Raises:
        TextError: fewer than 8 texts a side; fewer groups than folds, or a class in too few; a
        kind or site that does not exist; activations that are NaN or infinite; a model of another
        width.
        ModelError: an adapter that is not loaded.

    Use when:
        You suspect that the model knows something that it does not say.

    Not when:
        You want to know what the model uses: a probe reads, it does not act (`steer`, `patch`).

    Cost:
        one forward pass over all texts, one more for each transfer, and
        4 (1 + n_null) convex fits a layer (attention: 200 steps of Adam).

    Controls:
        shuffled labels, control task, groups, random directions for unlabelled texts; a control
        adapter in transfer=.

    Paper:
        arXiv 2310.06824 (mass-mean), 1909.03368 (control tasks), 2305.01610 (k-sparse), 2502.03407

    Example:
        from tool_packs.probes import probe
        words = ("cat", "dog", "nurse", "doctor", "house", "hill", "mat", "city")
        r = probe(m, [f"she is the {w}" for w in words], [f"he is the {w}" for w in words], n_null=4)
        r["chosen"], r.rows[0]
    """
    started = time.perf_counter()
    if position is None:
        position = "all" if kind == "attention" else "last"
    if n_null is None:
        n_null = 4 if kind == "attention" else 20
    _check(kind, site, k, C, n_null)
    one, two = read(m, pos), read(m, neg)
    if min(len(one), len(two)) < AT_LEAST:
        raise TextError(
            f"{len(one)} and {len(two)} texts are too few for a probe: give at least {AT_LEAST} a "
            f"side, two for each of {FOLDS} folds"
        )
    there = targets(m, transfer)
    if unlabelled is not None and not there:
        raise TextError("unlabelled texts are compared here and there: say where with transfer=")
    prompts = one + two
    y = torch.tensor([True] * len(one) + [False] * len(two))
    group = _groups(prompts, len(one), groups)
    generator = torch.Generator().manual_seed(seed)
    fold = folds(y, group, FOLDS, generator)
    _check_folds(y, group, fold)
    index = m.layer_indices(layers)

    def activations(model: Model, some: Sequence[Prompt]) -> Tensor:
        x = collect_tokens(model, some, index, position, site)  # [L, N, P, d]
        return x if kind == "attention" else x.nanmean(2)

    x = activations(m, prompts)
    shuffled = [shuffle(y, group, fold, generator) for _ in range(n_null)]
    control = random_labels([p.ids for p in prompts], fold, generator) if control_task else []
    labels = torch.stack([y, *shuffled, *control])  # [S, N]
    probes, scores, validation = cross_fit(kind, x, labels, fold, k=k, C=C)
    per_layer = auroc_within(scores, labels[:, None], fold)  # [S, L]
    picked = validation.argmax(1)  # [S, fold]: the layer for each fold, from another fold
    nested = scores.gather(1, picked[:, None, fold])[:, 0]  # [S, N]
    chosen = auroc_within(nested, labels, fold)  # [S]
    best = int(validation[0].mean(1).argmax())
    interval = bootstrap(
        torch.cat([scores[0], nested[:1]]), y, fold, group, N_BOOTSTRAP, generator
    )  # [L + 1, 2]
    null, task = slice(1, 1 + n_null), slice(1 + n_null, None)
    final = fit(kind, x, y[None], k=k, C=C)
    tensors = {
        "weight": final.weight[0],
        "bias": final.bias[0],
        "auroc": per_layer[0],
        "auroc_ci": interval[:-1],
        "auroc_validation": validation[0].mean(1),
        "auroc_shuffled": per_layer[null].T,
        "scores": scores[0],
        "chosen": torch.cat([chosen[:1], interval[-1]]),
        "chosen_shuffled": chosen[null],
        "fold": fold,
    }
    dims: dict[str, tuple[str, ...]] = {
        "weight": ("layer", "d"),
        "bias": ("layer",),
        "auroc": ("layer",),
        "auroc_ci": ("layer", "bound"),
        "auroc_validation": ("layer",),
        "auroc_shuffled": ("layer", "null"),
        "scores": ("layer", "text"),
        "chosen": ("statistic",),
        "chosen_shuffled": ("null",),
        "fold": ("text",),
    }
    if final.query is not None:
        tensors["query"], dims["query"] = final.query[0], ("layer", "d")
    if control:
        tensors |= {"auroc_control": per_layer[task].T, "chosen_control": chosen[task]}
        dims |= {"auroc_control": ("layer", "draw"), "chosen_control": ("draw",)}
    rows = _rows(index, per_layer, interval, validation[0].mean(1), null, task, best)
    lines = _lines(index, best, picked[0], chosen, interval[-1], null, task, len(group.unique()))
    labelled: dict[str, list[Any]] = {
        "layer": index,
        "statistic": ["auroc", "low", "high"],
        "bound": ["low", "high"],
    }
    if there:
        spare = None if unlabelled is None else read(m, unlabelled)
        here = None if spare is None else activations(m, spare)
        moved = []
        for name, target in there:
            with within(m, target, index) as other:
                texts = prompts if other is m else [*read(other, pos), *read(other, neg)]
                elsewhere = activations(other, texts)
                free = None
                if unlabelled is not None and spare is not None:
                    free = activations(other, spare if other is m else read(other, unlabelled))
            moved.append(transferred(probes, scores[0], y, fold, elsewhere, here, free))
            if here is not None and free is not None and kind != "attention":
                moved[-1]["unlabelled_random"] = random_directions(
                    here[best], free[best], generator
                )
            lines.append(transfer_line(name, moved[-1], best, per_layer[0, best].item(), index))
        for key in moved[0]:
            tensors[key] = torch.stack([entry[key] for entry in moved])
            dims[key] = ("model", "null" if key == "unlabelled_random" else "layer")
        labelled["model"] = [name for name, _ in there]
    bands = {"auroc_shuffled": "null"} | ({"auroc_control": "draw"} if control else {})
    return Result(
        title=f"{kind} probe of {len(one)} against {len(two)} texts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels=labelled,
        rows=rows,
        lines=lines,
        figure={"kind": "lines", "x": "layer", "lines": ["auroc", *bands], "bands": bands},
        provenance=provenance(
            m,
            "probe",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            kind=kind,
            layer=index[best],
            layers=index,
            position=_written(position),
            site=site,
            groups=len(group.unique()),
            transfer=[name for name, _ in there],
            k=k,
            C=C,
            n_null=n_null,
        ),
    )


def probe_scores(m: Model, result: Result, text: Text) -> Result:
    """Where in a text does a fitted probe see the property, token by token?

    The score of a text is what the probe was fitted to: at its position, or averaged over them.

    Args:
        result: what `probe` returned, on this model or on one with the same width.
        text: plain texts or chats, as in `capture`.

    Returns:
        Result: scores [prompt, layer, position] of every token (log odds for a logistic probe; for
        attention what the value reads), nan where a text is shorter; text_score [prompt, layer];
        for attention also attention [prompt, layer, position]; rows prompt, text, score (at the
        layer that was chosen), tokens.

    Raises:
        TextError: a result that is no probe's; a model with another width or fewer layers.

    Use when:
        You have a probe that passed its controls, and new texts.

    Not when:
        The probe was fitted at the last token of like texts: tokens elsewhere, the first above all,
        can lie far off and their scores mean little.

    Cost:
        one forward pass up to the deepest layer of the probe.

    Controls:
        None of its own: score the same texts with `m.base()` or a control adapter, and texts
        that lack the property.

    Paper:
        arXiv 2502.03407

    Example:
        from tool_packs.probes import probe, probe_scores
        words = ("cat", "dog", "nurse", "doctor", "house", "hill", "mat", "city")
        fitted = probe(m, [f"she is {w}" for w in words], [f"he is {w}" for w in words], n_null=2)
        r = probe_scores(m, fitted, ["she said that the cat is here", "he said that"])
        r["text_score"]
    """
    started = time.perf_counter()
    settings = result.provenance.arguments
    if result.provenance.technique != "probe":
        raise TextError(
            f"{result.title!r} is a result of {result.provenance.technique}: give one of probe"
        )
    index = settings["layers"]
    check_fits(m, result["weight"].shape[-1], index)
    query = result.tensors.get("query")
    fitted = Fit(
        result["weight"][None], result["bias"][None], None if query is None else query[None]
    )
    prompts = read(m, text)
    position = _position(settings["position"])
    where = [resolve(p, position) for p in prompts]
    x = collect_tokens(m, prompts, index, "all", settings["site"])  # [L, N, T, d]
    values = torch.einsum("lntd,ld->nlt", x, fitted.weight[0]) + fitted.bias[0][:, None]
    tensors, dims = {"scores": values}, {"scores": ("prompt", "layer", "position")}
    if query is None:
        text_score = torch.stack(
            [values[i][:, w].mean(1) for i, w in enumerate(where)]
        )  # [N, L]: the probe of a mean is the mean of its scores
    else:
        read_there = torch.full_like(x, float("nan"))
        for i, w in enumerate(where):
            read_there[:, i, w] = x[:, i, w]
        text_score = fitted.scores(read_there)[0].T
        weights = fitted.attention(read_there)[0].transpose(0, 1)  # [N, L, T]
        tensors["attention"], dims["attention"] = weights, ("prompt", "layer", "position")
    tensors["text_score"], dims["text_score"] = text_score, ("prompt", "layer")
    best = index.index(settings["layer"])
    tokens = [token_strings(m, p.ids) for p in prompts]
    rows = [
        {
            "prompt": i,
            "text": p.text if len(p.text) <= 200 else p.text[:200] + "…",
            "score": round(text_score[i, best].item(), 4),
            "tokens": strings,
        }
        for i, (p, strings) in enumerate(zip(prompts, tokens, strict=True))
    ]
    spread = text_score[:, best]
    test = result["chosen"]
    lines = [
        f"layer {index[best]}: mean score {mean_sd(spread)}, {int((spread > 0).sum())} of "
        f"{len(prompts)} above 0, the cut of the probe; where it was fitted its test AUROC was "
        f"{test[0]:.3f} (control, shuffled labels: {mean_sd(result['chosen_shuffled'])})",
        "control: none yet; score texts that lack the property, or the same ones on the base",
    ]
    return Result(
        title=f"{settings['kind']} probe on {len(prompts)} new texts",
        tensors=to_cpu(tensors),
        dims=dims,
        labels={"layer": index, "tokens": tokens},
        rows=rows,
        lines=lines,
        figure={"kind": "grid", "values": "scores", "ticks": "tokens", "label": "score"},
        provenance=provenance(
            m,
            "probe_scores",
            started,
            prompts=[p.ids for p in prompts],
            layer=settings["layer"],
            kind=settings["kind"],
            fitted_on=result.provenance.fingerprint,
        ),
    )


# What is checked


def _check(kind: str, site: str, k: int, C: float, n_null: int) -> None:
    if kind not in KINDS:
        raise TextError(f"no probe is of kind {kind!r}: {', '.join(KINDS)}")
    if site not in SITES:
        raise TextError(f"no probe reads site {site!r}: {', '.join(SITES)}")
    if k < 1:
        raise TextError(f"k={k}: a sparse probe reads at least 1 dimension")
    if C <= 0:
        raise TextError(f"C={C}: the inverse strength of the penalty is above 0")
    if n_null < 1:
        raise TextError(f"n_null={n_null}: an AUROC without one shuffle beside it says nothing")


def _groups(prompts: Sequence[Prompt], n_pos: int, groups: Sequence[Any] | None) -> Tensor:
    if groups is None:
        return as_groups([p.ids for p in prompts], n_pos)
    if len(groups) != len(prompts):
        raise TextError(
            f"groups has {len(groups)} names for {len(prompts)} texts: "
            "give one for each, those of pos first"
        )
    number = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    return torch.tensor([number[name] for name in groups])


def _check_folds(y: Tensor, group: Tensor, fold: Tensor) -> None:
    for f in range(FOLDS):
        mine = y[fold == f]
        if not mine.any() or mine.all():
            spread = [len(group[side].unique()) for side in (y, ~y)]
            raise TextError(
                f"{len(group.unique())} groups, {spread[0]} with texts of pos and {spread[1]} of "
                f"neg: each of {FOLDS} folds needs a group with either; give more, or groups="
            )


# What is told


def _rows(
    index: Sequence[int],
    per_layer: Tensor,
    interval: Tensor,
    validation: Tensor,
    null: slice,
    task: slice,
    best: int,
) -> list[dict[str, Any]]:
    rows = []
    for j, layer in enumerate(index):
        control = per_layer[task, j]
        row: dict[str, Any] = {
            "layer": layer,
            "auroc": round(per_layer[0, j].item(), 4),
            **_bounds(interval[j]),
            "validation": round(validation[j].item(), 4),
            "shuffled": round(per_layer[null, j].mean().item(), 4),
        }
        if len(control):
            row["control"] = round(control.mean().item(), 4)
            row["selectivity"] = round((per_layer[0, j] - control.mean()).item(), 4)
        rows.append(row | {"chosen": j == best})
    return rows


def _bounds(interval: Tensor) -> dict[str, float | None]:
    low, high = (None if b != b else round(b, 4) for b in interval.tolist())
    return {"low": low, "high": high}


def _lines(
    index: Sequence[int],
    best: int,
    picked: Tensor,
    chosen: Tensor,
    interval: Tensor,
    null: slice,
    task: slice,
    n_groups: int,
) -> list[str]:
    found, shuffled, control = chosen[0].item(), chosen[null], chosen[task]
    low, high = interval.tolist()
    used = ", ".join(str(index[j]) for j in sorted(set(picked.tolist())))
    width = f"95 % {low:.3f} to {high:.3f}"
    if low != low:
        width = f"no interval: {n_groups} groups are one a fold, give more"
    elif found == 1.0:
        width = f"no text out of order in {n_groups} groups, so the bootstrap has no width"
    p = (1 + (shuffled >= found - 1e-6).sum().item()) / (1 + len(shuffled))
    lines = [
        f"test AUROC {found:.3f} ({width}) at layers chosen on other folds (used: {used})",
        f"control, shuffled labels through the same choice: {mean_sd(shuffled)}; "
        f"p {p:.3f} over {len(shuffled)} shuffles",
    ]
    if len(control):
        lines.append(
            f"control task, random functions of the tokens: {mean_sd(control)}; "
            f"selectivity {found - control.mean().item():+.3f}"
        )
    if low <= 0.5:
        lines.append("this probe does not find the property: .5 lies within its interval")
    elif p > 0.05:
        lines.append("this probe is not told from shuffled labels")
    lines.append(f"layer {index[best]} for new texts, best on the choosing folds")
    return lines


def _written(position: Any) -> Any:
    """A position as JSON keeps it: a span and a list of two positions stay apart."""
    if isinstance(position, slice):
        return {"slice": [position.start, position.stop, position.step]}
    if isinstance(position, tuple) and len(position) == 2:
        return {"span": list(position)}
    return position


def _position(written: Any) -> Any:
    if isinstance(written, dict):
        return slice(*written["slice"]) if "slice" in written else tuple(written["span"])
    return written
