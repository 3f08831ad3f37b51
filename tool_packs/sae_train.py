"""Training of sparse autoencoders on states: TopK, BatchTopK and JumpReLU, with an auxiliary loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__: list[str] = []

KINDS = ("topk", "batchtopk", "jumprelu")
AUX = 1 / 32  # weight of the auxiliary loss (Gao et al. 2024)
DEAD_AFTER = 20  # steps without firing that make a feature dead, for the auxiliary loss
BANDWIDTH = 2.0  # of JumpReLU's straight-through kernel, in standard deviations of a state's entry
FASTER = 4.0  # learning rate of JumpReLU's thresholds over that of the other weights
SPARSITY = 1.0  # weight of (L0 / k - 1)^2, JumpReLU's sparsity loss


class _Jump(torch.autograd.Function):
    """x * (x > threshold), and a count of what passes; both with straight-through gradients.

    The kernel is a rectangle: a threshold feels the pre-activations within half a bandwidth of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, threshold)
        passed = (x > threshold).to(x.dtype)
        return x * passed, passed

    @staticmethod
    def backward(ctx: Any, g_value: Tensor, g_passed: Tensor) -> tuple[Tensor, Tensor]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < BANDWIDTH / 2).to(x.dtype) / BANDWIDTH
        g_threshold = -(near * (threshold * g_value + g_passed)).sum(0)
        return g_value * (x > threshold), g_threshold


def start(x: Tensor, features: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Parts before training, for states scaled to unit variance an entry, and that scale.

    Decoder rows are random unit vectors, the encoder is their transpose, b_dec the mean.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = x.mean(0)
    scale = (x - mean).pow(2).mean().sqrt().clamp(min=1e-12)
    W_dec = torch.randn(features, x.shape[1], generator=generator)
    W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True)
    parts = {
        "W_enc": W_dec.T.clone(),
        "b_enc": torch.zeros(features),
        "W_dec": W_dec,
        "b_dec": (mean / scale).cpu(),
    }
    return parts, scale


def in_units_of_states(parts: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    """The same SAE for states that are not scaled; decoder rows keep their norm of 1.

    All three activations give s * f for s * (pre-activation, threshold), so only these grow.
    """
    grow = ("b_enc", "b_dec", "threshold")
    return {n: (t * scale.to(t.device) if n in grow else t).detach() for n, t in parts.items()}


def fit(
    x: Tensor,
    kind: str,
    features: int,
    k: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    progress: Callable[[int], Any],
) -> tuple[dict[str, Tensor], Tensor]:
    """The parts of an SAE trained on states x [T, d], and the loss of each step.

    x lies where the training runs. The loss is the variance that stays unexplained, plus AUX times
    what the dead features leave of the residual (they learn to explain it, and come alive).
    """
    begun, scale = start(x, features, seed)
    parts = {name: t.to(x.device).requires_grad_() for name, t in begun.items()}
    generator = torch.Generator().manual_seed(seed + 1)
    mean = x.mean(0)
    total = (x - mean).pow(2).sum(-1).mean() / scale**2  # variance of a scaled state
    if kind == "jumprelu":
        with torch.no_grad():
            sample = x[torch.randint(len(x), (min(len(x), 4096),), generator=generator)] / scale
            pre = (sample - parts["b_dec"]) @ parts["W_enc"]
            # One level for all, at which as many pass as shall in the end.
            keep = min(len(sample) * k, pre.numel())
            level = pre.flatten().topk(keep).values[-1].clamp(min=1e-3)
        parts["log_threshold"] = level.log().expand(features).clone().requires_grad_()
    groups = [{"params": [t for n, t in parts.items() if n != "log_threshold"], "times": 1.0}]
    if kind == "jumprelu":  # the thresholds follow the encoder, and must be faster than it
        groups.append({"params": [parts["log_threshold"]], "times": FASTER})
    optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.999))
    silent = torch.zeros(features, dtype=torch.long, device=x.device)  # steps since it fired
    level = torch.zeros((), device=x.device)  # BatchTopK's threshold
    losses = []
    for step in progress(steps):
        for group in optimizer.param_groups:
            level_now = min(1.0, (step + 1) / 20, 2.5 * (steps - step) / steps)
            group["lr"] = lr * group["times"] * level_now
        drawn = torch.randint(len(x), (batch,), generator=generator).to(x.device)
        states = x[drawn] / scale
        pre = (states - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]
        extra = torch.zeros((), device=x.device)
        if kind == "topk":
            values, index = pre.topk(k, dim=-1)
            values = values.relu()
            fired = torch.zeros(features, dtype=torch.bool, device=x.device)
            fired[index[values > 0]] = True
            out = _sum_of_rows(index, values, parts["W_dec"])
        else:
            if kind == "batchtopk":
                f, smallest = _batch_topk(pre, k)
                level = smallest if step == 0 else 0.98 * level + 0.02 * smallest
            else:
                f, passed = _Jump.apply(pre.relu(), parts["log_threshold"].exp())
                extra = SPARSITY * (passed.sum(-1).mean() / k - 1).pow(2)
            fired = (f > 0).any(0)
            out = f @ parts["W_dec"]
        rest = states - parts["b_dec"] - out
        loss = rest.pow(2).sum(-1).mean() / total + extra
        silent = torch.where(fired, 0, silent + 1)
        dead = silent >= DEAD_AFTER
        if dead.any():
            loss = loss + AUX * _left_by_the_dead(pre, dead, parts["W_dec"], rest.detach()) / total
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        with torch.no_grad():
            # What would only lengthen a decoder row is taken off: its length is set to 1 below.
            grad, rows = parts["W_dec"].grad, parts["W_dec"]
            grad -= (grad * rows).sum(-1, keepdim=True) * rows
            optimizer.step()
            rows /= rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        losses.append(loss.detach())
    done = {name: t.detach() for name, t in parts.items() if name != "log_threshold"}
    if kind == "batchtopk":
        done["threshold"] = level.detach().expand(features).clone()
    if kind == "jumprelu":
        done["threshold"] = parts["log_threshold"].detach().exp()
    return in_units_of_states(done, scale), torch.stack(losses).cpu()


def _sum_of_rows(index: Tensor, values: Tensor, W_dec: Tensor) -> Tensor:
    """sum_j values[b, j] * W_dec[index[b, j]]: the decoder without the zeros of f."""
    return F.embedding_bag(index, W_dec, mode="sum", per_sample_weights=values)


def _batch_topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k * B largest activations of the batch, and the smallest of them that is above 0."""
    f = pre.relu()
    flat = f.flatten()
    top = flat.topk(k * len(pre), sorted=False)
    kept = torch.zeros_like(flat).scatter(0, top.indices, top.values).view_as(f)
    positive = top.values.detach()
    positive = positive[positive > 0]
    return kept, positive.min() if len(positive) else positive.new_zeros(())


def _left_by_the_dead(pre: Tensor, dead: Tensor, W_dec: Tensor, rest: Tensor) -> Tensor:
    """How far the most active dead features are from explaining what the others left."""
    which = dead.nonzero()[:, 0]
    count = min(len(which), rest.shape[1] // 2 or 1)
    values, index = pre[:, which].topk(count, dim=-1)
    guess = _sum_of_rows(index, values.relu(), W_dec[which])
    return (guess - rest).pow(2).sum(-1).mean()


def unexplained(x: Tensor, y: Tensor) -> float:
    """FVU: what y leaves of the variance of x, both [T, d]."""
    total = (x - x.mean(0)).pow(2).sum()
    return ((x - y).pow(2).sum() / total.clamp(min=1e-30)).item()


def pca(x: Tensor, y: Tensor, k: int) -> Tensor:
    """y [T, d] through the k first principal components of x: what k dense numbers keep."""
    mean = x.mean(0)
    _, vectors = torch.linalg.eigh((x - mean).T @ (x - mean))
    kept = vectors[:, -k:]
    return (y - mean) @ kept @ kept.T + mean
