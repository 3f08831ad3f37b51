"""How well a direction separates two classes: fits, AUROC, halves, folds of groups, shuffles.

Every fit takes activations x [L, n, d] and S labellings y [S, n] at once, so that a probe and its
shuffled-label nulls go through one batched solve. A solution lies in the span of the texts, so
with fewer texts than dimensions it is found there: n by n instead of d by d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tool_packs.errors import TextError

__all__: list[str] = []

SHRINKAGE = 0.1  # of the within-class covariance towards a multiple of the identity, for lda
CELLS = 2**24  # of the Hessians that are held at once
ADAM_STEPS = 200
FOLDS = 4  # two to learn from, one to choose the layer on, one to test
N_CONTROL = 5  # control tasks


@dataclass(frozen=True)
class Fit:
    """Linear probes, one for each labelling and layer; with a query, attention probes."""

    weight: Tensor  # [S, L, d]
    bias: Tensor  # [S, L]
    query: Tensor | None = None  # [S, L, d]

    def scores(self, x: Tensor) -> Tensor:
        """Scores [S, L, N] of texts [L, N, d], or with a query of their tokens [L, N, P, d]."""
        if self.query is None:
            return torch.einsum("lnd,sld->sln", x, self.weight) + self.bias[..., None]
        values = torch.einsum("lnpd,sld->slnp", x.nan_to_num(), self.weight)
        return (self.attention(x) * values).sum(-1) + self.bias[..., None]

    def attention(self, x: Tensor) -> Tensor:
        """How much each token counts [S, L, N, P]; nan tokens, which are padding, do not."""
        assert self.query is not None
        return _attention(x.nan_to_num(), x[..., 0].isnan(), self.query)


def _attention(x: Tensor, padding: Tensor, query: Tensor) -> Tensor:
    logits = torch.einsum("lnpd,sld->slnp", x, query).masked_fill(padding, float("-inf"))
    return logits.softmax(-1)


# Scores


def auroc(scores: Tensor, y: Tensor) -> Tensor:
    """AUROC [...] of scores [..., N] under labels y [N] or [..., N]; a tie counts half.

    .5 where a class is absent.
    """
    y = y.expand(scores.shape)
    ordered = scores.sort(-1).values.contiguous()
    below = torch.searchsorted(ordered, scores.contiguous())
    upto = torch.searchsorted(ordered, scores.contiguous(), right=True)
    ranks = (below + upto + 1).double() / 2  # ties share their mean rank
    n_pos = y.sum(-1).double()
    n_neg = y.shape[-1] - n_pos
    wins = (ranks * y).sum(-1) - n_pos * (n_pos + 1) / 2
    value = wins / (n_pos * n_neg)
    return value.where(n_pos * n_neg > 0, torch.full_like(value, 0.5)).float()


def auroc_within(scores: Tensor, y: Tensor, fold: Tensor) -> Tensor:
    """AUROC [...] over the pairs of a positive and a negative of the same fold [N].

    Scores of different folds come from different probes and are never compared.
    """
    total, value = 0.0, torch.zeros(scores.shape[:-1])
    for f in fold.unique().tolist():
        mine = fold == f
        pairs = (y[..., mine].sum(-1) * (~y[..., mine]).sum(-1)).float()
        value = value + pairs * auroc(scores[..., mine], y[..., mine])
        total = total + pairs
    return value / total


def bootstrap(
    scores: Tensor, y: Tensor, fold: Tensor, groups: Tensor, n: int, generator: torch.Generator
) -> Tensor:
    """95 % interval [L, 2] of `auroc_within` for scores [L, N], over groups drawn anew.

    nan where every fold is one group: drawn anew, it is always the same.
    """
    if all(len(groups[fold == f].unique()) == 1 for f in fold.unique().tolist()):
        return torch.full((len(scores), 2), float("nan"))
    counts = torch.zeros(n, len(y))
    for f in fold.unique().tolist():
        members = groups[fold == f].unique()
        drawn = torch.randint(len(members), (n, len(members)), generator=generator)
        times = torch.zeros(n, len(members)).scatter_add_(1, drawn, torch.ones(drawn.shape))
        for g, group in enumerate(members.tolist()):
            counts[:, groups == group] = times[:, g, None]
    same = (fold[y][:, None] == fold[~y][None]).float()  # [P, Q]
    pairs = torch.einsum("bp,pq,bq->b", counts[:, y], same, counts[:, ~y])
    out = []
    for s in scores:
        gap = s[y][:, None] - s[~y][None]
        wins = ((gap > 0).float() + 0.5 * (gap == 0).float()) * same
        value = torch.einsum("bp,pq,bq->b", counts[:, y], wins, counts[:, ~y]) / pairs
        out.append(value.nanquantile(torch.tensor([0.025, 0.975])))
    return torch.stack(out)


# Splits and shuffles


def halves(y: Tensor, paired: bool, generator: torch.Generator) -> Tensor:
    """Half of each class, at random: a mask [N]. Pairs (i, i + N/2) stay in one half."""
    half = torch.zeros(len(y), dtype=torch.bool)
    if paired:
        pairs = len(y) // 2
        picked = torch.randperm(pairs, generator=generator)[: pairs // 2]
        half[picked] = half[picked + pairs] = True
        return half
    for label in (True, False):
        members = (y == label).nonzero()[:, 0]
        picked = members[torch.randperm(len(members), generator=generator)]
        half[picked[: len(members) // 2]] = True
    return half


def folds(y: Tensor, groups: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """A fold [N] for each text: a group stays in one fold, and the classes are spread evenly."""
    names = groups.unique()
    names = names[torch.randperm(len(names), generator=generator)]
    members = [groups == name for name in names.tolist()]
    members.sort(key=lambda mask: -int(mask.sum()))  # the large ones first; the sort is stable
    fold = torch.zeros(len(y), dtype=torch.long)
    held = torch.zeros(n, 2)  # texts of each class in each fold
    for mask in members:
        brought = torch.tensor([(mask & y).sum(), (mask & ~y).sum()], dtype=torch.float)
        crowd = (held * brought).sum(1) + 1e-3 * held.sum(1)
        f = int(crowd.argmin())
        fold[mask] = f
        held[f] += brought
    return fold


def shuffle(y: Tensor, groups: Tensor, part: Tensor, generator: torch.Generator) -> Tensor:
    """Labels at random that leave groups and parts of a split as they are.

    Pairs swap their labels; where each group is of one class, the groups of a part exchange theirs;
    else the texts of a part do.
    """
    names = groups.unique().tolist()
    members = [(groups == name).nonzero()[:, 0] for name in names]
    if all(len(i) == 2 and y[i].sum() == 1 for i in members):
        swap = torch.rand(len(names), generator=generator) < 0.5
        out = y.clone()
        for i, swapped in zip(members, swap.tolist(), strict=True):
            out[i] = y[i] ^ swapped
        return out
    pure = all(bool(y[i].all()) or not bool(y[i].any()) for i in members)
    units = members if pure else [torch.tensor([i]) for i in range(len(y))]
    out = y.clone()
    for f in part.unique().tolist():
        mine = [i for i in units if part[i[0]] == f]
        order = torch.randperm(len(mine), generator=generator).tolist()
        for i, j in zip(mine, order, strict=True):
            out[i] = y[mine[j][0]]
    return out


# Fits


def fit(method: str, x: Tensor, y: Tensor, *, C: float = 1.0, k: int = 8) -> Fit:
    """Probes of S labellings y [S, n] on texts x [L, n, d] (attention: tokens [L, n, P, d])."""
    if method == "attention":
        return _attention_probe(x, y)
    if method == "k-sparse":
        return _k_sparse(x, y, k, C)
    gap, middle = class_means(x, y)
    if method in ("mean", "mass-mean"):
        weight = gap
    elif method == "logistic":
        return _scaled_logistic(x, y, C)
    elif method == "lda":
        weight = _lda(x, y, gap)
    elif method in ("pca", "pca-centred"):
        unit = _pca(x, y, centred=method == "pca-centred")
        weight = unit * (unit * gap).sum(-1, keepdim=True)
    else:
        raise TextError(f"no method is called {method!r}")
    return Fit(weight, -(weight * middle).sum(-1))  # the cut is half way between the means


def class_means(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the positives minus mean of the negatives, and half their sum, each [S, L, d]."""
    pos = y.to(x.dtype) / y.sum(1, keepdim=True)
    neg = (~y).to(x.dtype) / (~y).sum(1, keepdim=True)
    one, two = (torch.einsum("sn,lnd->sld", share, x) for share in (pos, neg))
    return one - two, (one + two) / 2


def _span(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Coordinates [L, n, r] in float64 of x [L, n, d] in the span of its rows, and its basis."""
    if x.shape[1] >= x.shape[2]:
        return x.double(), None
    basis, coordinates = torch.linalg.qr(x.transpose(1, 2).double())  # [L, d, n], [L, n, n]
    return coordinates.transpose(1, 2), basis


def _lift(weight: Tensor, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    if basis is not None:
        weight = torch.einsum("ldr,slr->sld", basis, weight)
    return weight.to(dtype)


def _lda(x: Tensor, y: Tensor, gap: Tensor) -> Tensor:
    """Within-class covariance, shrunk, inverted on the gap of the means: [S, L, d]."""
    d = x.shape[-1]
    c, basis = _span(x)
    total = c.transpose(1, 2) @ c  # [L, r, r]
    weights = []
    for labels in y:  # a covariance for each labelling
        cov = total.clone()
        for side in (labels, ~labels):
            mean = c[:, side].mean(1)  # [L, r]
            cov -= side.sum() * mean[:, :, None] * mean[:, None]
        cov = cov / len(labels)
        spread = cov.diagonal(dim1=1, dim2=2).sum(1) / d  # mean variance of a dimension
        eye = torch.eye(cov.shape[-1], dtype=cov.dtype)
        shrunk = (1 - SHRINKAGE) * cov + (SHRINKAGE * spread + 1e-12)[:, None, None] * eye
        between = c[:, labels].mean(1) - c[:, ~labels].mean(1)
        weights.append(torch.linalg.solve(shrunk, between))
    return _lift(torch.stack(weights), basis, gap.dtype)


def _pca(x: Tensor, y: Tensor, *, centred: bool) -> Tensor:
    """First principal component [S, L, d], of norm 1, of the differences of pairs (i, i + n/2).

    Not centred, the differences count from zero, and what all pairs share is found. Centred, their
    mean, which is what all pairs share, is taken away first.
    """
    pairs = x.shape[1] // 2
    change = (x[:, :pairs] - x[:, pairs:])[None].double()  # [1, L, pairs, d]
    if centred:
        sign = torch.where(y[:, :pairs], 1.0, -1.0).double()
        change = change * sign[:, None, :, None]  # [S, L, pairs, d]
        change = change - change.mean(2, keepdim=True)
    # The sign of a pair is nothing to an uncentred component: one for all labellings.
    if pairs < x.shape[2]:
        vectors = torch.linalg.eigh(change @ change.transpose(2, 3)).eigenvectors[..., -1]
        unit = torch.einsum("slp,slpd->sld", vectors, change)
    else:
        unit = torch.linalg.eigh(change.transpose(2, 3) @ change).eigenvectors[..., -1]
    unit = torch.nn.functional.normalize(unit, dim=-1)
    return unit.expand(len(y), -1, -1).to(x.dtype)


def _scaled_logistic(x: Tensor, y: Tensor, C: float) -> Fit:
    """Logistic regression on x centred and divided by one number a layer, its rms deviation.

    One number, so that C means the same at every layer and no rotation of the stream matters.
    """
    mean = x.mean(1, keepdim=True)  # [L, 1, d]
    centred = x - mean
    scale = centred.square().mean((1, 2)).sqrt().clamp_min(1e-12)  # [L]
    c, basis = _span(centred / scale[:, None, None])
    weight, bias = logistic(c[None], y, C)
    weight = _lift(weight, basis, x.dtype) / scale[:, None]
    return Fit(weight, bias.to(x.dtype) - (weight * mean[:, 0]).sum(-1))


def _k_sparse(x: Tensor, y: Tensor, k: int, C: float) -> Fit:
    """Logistic regression on the k dimensions whose class means lie furthest apart, in sds."""
    k = min(k, x.shape[-1])
    gap, _ = class_means(x, y)
    mean, sd = x.mean(1), x.std(1, unbiased=False).clamp_min(1e-12)  # [L, d]
    chosen = (gap / sd).abs().topk(k, dim=-1).indices  # [S, L, k]
    standard = (x - mean[:, None]) / sd[:, None]  # [L, n, d]
    index = chosen[:, :, None].expand(-1, -1, x.shape[1], -1)
    picked = standard[None].expand(len(y), -1, -1, -1).gather(3, index)  # [S, L, n, k]
    small, bias = logistic(picked.double(), y, C)
    weight = torch.zeros_like(gap).scatter_(2, chosen, small.to(x.dtype)) / sd
    return Fit(weight, bias.to(x.dtype) - (weight * mean).sum(-1))


def logistic(x: Tensor, y: Tensor, C: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weights [S, L, r] and intercepts [S, L] of C * sum of log losses + |w|^2 / 2, by Newton.

    x [S or 1, L, n, r] in float64, y [S, n]. The intercept is not penalised. This is what
    scikit-learn's LogisticRegression(C=C) minimises.
    """
    size = x.shape[1] * (x.shape[3] + 1) ** 2
    chunk = max(1, CELLS // size)
    parts = [
        _newton(x if len(x) == 1 else x[s : s + chunk], y[s : s + chunk], C)
        for s in range(0, len(y), chunk)
    ]
    w = torch.cat(parts)  # [S, L, r + 1]
    return w[..., :-1], w[..., -1]


def _newton(x: Tensor, y: Tensor, C: float) -> Tensor:
    x = torch.cat([x, torch.ones(*x.shape[:3], 1, dtype=x.dtype)], -1)  # [S or 1, L, n, r + 1]
    target = y.to(x.dtype)[:, None].expand(len(y), x.shape[1], -1)  # [S, L, n]
    penalty = torch.ones(x.shape[-1], dtype=x.dtype)
    penalty[-1] = 0.0

    def loss(w: Tensor) -> Tensor:  # [S, L]
        eta = (x @ w[..., None])[..., 0]
        softplus = torch.nn.functional.softplus(eta) - target * eta
        return C * softplus.sum(-1) + (penalty * w.square()).sum(-1) / 2

    w = torch.zeros(len(y), x.shape[1], x.shape[3], dtype=x.dtype)
    now = loss(w)
    for _ in range(100):
        p = (x @ w[..., None])[..., 0].sigmoid()
        gradient = C * ((p - target)[..., None] * x).sum(2) + penalty * w
        if gradient.abs().max() <= 1e-9 * C * x.shape[2]:
            break
        curved = x * (C * p * (1 - p))[..., None]
        hessian = curved.transpose(2, 3) @ x + torch.diag(penalty + 1e-12)
        step = -torch.linalg.solve(hessian, gradient)
        slope = (gradient * step).sum(-1)
        length = torch.ones_like(now)
        for _ in range(30):  # halve the steps that overshoot
            then = loss(w + length[..., None] * step)
            over = then > now + 1e-4 * length * slope + 1e-12 * now.abs()
            if not over.any():
                break
            length = torch.where(over, length / 2, length)
        w, now = w + length[..., None] * step, then
    return w


def _attention_probe(x: Tensor, y: Tensor) -> Fit:
    """A query that weighs the tokens and a value that reads them, by Adam from zero.

    From zero every token counts alike: the fit begins as a probe of the mean over tokens.
    """
    padding = x[..., 0].isnan()  # [L, n, P]
    tokens = x.flatten(1, 2)
    mean = tokens.nanmean(1)  # [L, d]
    centred = (x - mean[:, None, None]).nan_to_num()
    kept = (~padding).sum((1, 2))  # [L]
    scale = (centred.square().sum((1, 2, 3)) / (kept * x.shape[-1])).sqrt().clamp_min(1e-12)
    centred = centred / scale[:, None, None, None]
    shape = (len(y), x.shape[0], x.shape[-1])
    target = y.to(x.dtype)[:, None].expand(len(y), x.shape[0], -1)
    n = x.shape[1]
    with torch.enable_grad():
        query = torch.zeros(shape, requires_grad=True)
        value = torch.zeros(shape, requires_grad=True)
        bias = torch.zeros(shape[:2], requires_grad=True)
        adam = torch.optim.Adam([query, value, bias], lr=0.03)
        for _ in _progress(ADAM_STEPS, "attention probe"):
            weights = _attention(centred, padding, query)  # [S, L, n, P]
            read = torch.einsum("lnpd,sld->slnp", centred, value)
            logits = (weights * read).sum(-1) + bias[..., None]
            losses = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, target, reduction="none"
            )
            penalty = (value.square().sum() + query.square().sum()) / (2 * n)
            adam.zero_grad()
            (losses.mean(-1).sum() + penalty).backward()
            adam.step()
    weight = value.detach() / scale[:, None]
    return Fit(weight, bias.detach() - (weight * mean).sum(-1), query.detach() / scale[:, None])


def _progress(steps: int, told: str) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(steps), desc=told, leave=False)


# Fits on some folds, scores on others


def cross_fit(
    kind: str, x: Tensor, labels: Tensor, fold: Tensor, *, k: int, C: float
) -> tuple[list[Fit], Tensor, Tensor]:
    """The probes of the true labels for each fold, scores [S, L, N] out of fold, and AUROC
    [S, L, fold] on the fold that chooses the layer, which is neither learned from nor tested."""
    scores = torch.zeros(len(labels), x.shape[0], len(fold))
    validation, probes = [], []
    for f in _progress(FOLDS, "folds of the probe"):
        test, choose = fold == f, fold == (f + 1) % FOLDS
        train = ~(test | choose)
        fitted = fit(kind, x[:, train], labels[:, train], k=k, C=C)
        out = fitted.scores(x)  # [S, L, N]
        scores[..., test] = out[..., test]
        seen, y = out[..., choose], labels[:, None, choose]
        # Of layers that rank alike, the one that holds the classes further apart is chosen.
        apart = _means(seen, y, True) - _means(seen, y, False)
        margin = (apart / seen.std(-1).clamp_min(1e-12)).nan_to_num().clamp(-9, 9)
        validation.append(auroc(seen, y).double() + 1e-9 * margin.double())
        query = None if fitted.query is None else fitted.query[:1]
        probes.append(Fit(fitted.weight[:1], fitted.bias[:1], query))
    return probes, scores, torch.stack(validation, -1)


def _means(scores: Tensor, y: Tensor, side: bool) -> Tensor:
    chosen = (y if side else ~y).to(scores.dtype)
    return (scores * chosen).sum(-1) / chosen.sum(-1)


def _mixed(y: Tensor) -> bool:
    return bool(y.any()) and not bool(y.all())


def random_labels(
    ids: Sequence[Sequence[int]], fold: Tensor, generator: torch.Generator
) -> list[Tensor]:
    """Random functions of the tokens: every token type has a random value, and a text is positive
    where the mean value of its tokens is above the median of the texts.

    Hewitt and Liang give each word type a random label, so that only a probe with room to
    memorise words can do the task; this is the same for whole texts. None where texts do not
    differ enough.
    """
    kinds = sorted({token for text in ids for token in text})
    column = {token: c for c, token in enumerate(kinds)}
    counts = torch.zeros(len(ids), len(kinds))
    for row, text in zip(counts, ids, strict=True):
        for token in text:
            row[column[token]] += 1 / len(text)
    drawn: list[Tensor] = []
    for _ in range(10 * N_CONTROL):
        value = counts @ torch.randn(len(kinds), generator=generator)
        y = value > value.median()
        learned = [y[(fold != f) & (fold != (f + 1) % FOLDS)] for f in range(FOLDS)]
        tested = [y[fold == f] for f in range(FOLDS)]  # a fold of one class tests nothing
        if all(map(_mixed, learned)) and any(map(_mixed, tested)):
            drawn.append(y)
        if len(drawn) == N_CONTROL:
            break
    return drawn


def as_groups(ids: Sequence[Sequence[int]], n_pos: int) -> Tensor:
    """Which texts belong together where nobody says: partners, and texts that are the same."""
    parent = list(range(len(ids)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[tuple[int, ...], int] = {}
    for i, text in enumerate(ids):
        parent[root(i)] = root(first.setdefault(tuple(text), i))
    if 2 * n_pos == len(ids):
        for i in range(n_pos):
            parent[root(i + n_pos)] = root(i)
    return torch.tensor([root(i) for i in range(len(ids))])
