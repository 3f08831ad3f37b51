"""Sparse autoencoders: load a published one, or train one on the states of a layer."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs import sae_formats, sae_train
from tool_packs.engine import site_name, sparing
from tool_packs.errors import TextError
from tool_packs.prompts import Text, read
from tool_packs.result import Result, provenance, to_cpu

# What is done with an SAE is called as sae.features(...) and so on as well.
from tool_packs.sae_diff import diff as diff
from tool_packs.sae_features import features as features
from tool_packs.sae_features import label as label
from tool_packs.sae_model import SAE, check_fits, from_first, read_states
from tool_packs.sae_steering import steer as steer

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["load", "train"]


def load(
    m: Model,
    path: str,
    *,
    layer: int | None = None,
    site: str | None = None,
    revision: str | None = None,
) -> SAE:
    """Which features has somebody published for this layer of this model?

    Reads sae-lens folders (cfg.json, sae_weights.safetensors), Gemma Scope (params.npz, or
    params.safetensors), sparsify folders (cfg.json, sae.safetensors) and Goodfire's .pt or .pth.
    Layer and site come from the files or from their path; what they say is checked against `m`.

    Args:
        path: a local file or folder, or "owner/repo/folder" on the hub.
        layer: where the files do not tell it.
        site: where the files do not tell it: "resid_post", "resid_pre", "mlp_out", "attn_out",
            "head".
        revision: branch, tag or commit on the hub.

    Returns:
        SAE: W_enc [d, feature], b_enc [feature], W_dec [feature, d], b_dec [d], `encode`, `decode`,
        `save(folder)` (in sae-lens's format), layer and site.

    Raises:
        ModelNotFound: nothing there, or no format that is known here.
        ModelError: tensors, layer or width that do not fit together or do not fit `m`.

    Use when:
        Somebody has trained an SAE on this very model, or on the base of its adapter.

    Not when:
        It was made for another model: widths may agree and every feature be nonsense; look at
        `features(...)`, whose FVU and recovered loss tell.

    Cost:
        reading the weights.

    Controls:
        None of its own: `features` measures how much of the model's loss the SAE keeps.

    Paper:
        arXiv 2408.05147 (Gemma Scope)

    Example:
        import tempfile
        from tool_packs import sae
        mine = sae.train(m, ["the cat sat on the mat"] * 8, 1, latents=64, k=4, steps=5, batch=32)
        again = sae.load(m, str(mine.save(tempfile.mkdtemp())))
        again.layer, again.site, again.n_features
    """
    site = None if site is None else site_name(site)
    layer = None if layer is None else m.layer_index(layer)
    loaded = sae_formats.open_sae(sae_formats.find(path, revision), layer, site)
    check_fits(m, loaded)
    return loaded.to(m.device)


def train(
    m: Model,
    text: Text,
    layer: int | float = 0.5,
    *,
    site: str = "resid_post",
    kind: str = "topk",
    latents: int = 1024,
    k: int = 16,
    steps: int = 400,
    batch: int = 1024,
    lr: float = 5e-3,
    first: int = 1,
    held_out: float = 0.1,
    seed: int = 0,
) -> SAE:
    """Which sparse features are the states of this layer made of?

    Args:
        text: many texts or chats, like those that the features shall be read on; 30,000 tokens are
            enough for a thousand features of a small model.
        layer: an int or a depth in 0..1.
        site: "resid_post", "resid_pre", "mlp_out", "attn_out" or "head" (heads side by side).
        kind: "topk" (the k largest of each token), "batchtopk" (k a token on average over a batch;
            afterwards a threshold) or "jumprelu" (a learned threshold for each feature, k a token
            on average).
        latents: number of features.
        k: features active on a token.
        steps: of training.
        batch: tokens a step.
        lr: peak learning rate; it falls to nothing.
        first: first position that is read; the first token's state is often a hundred times as
            long as the others, and left out.
        held_out: share of the texts on which everything is measured.
        seed: of weights, order and held-out texts.

    Returns:
        SAE: with `.result`: rows arm (trained, untrained, pca), fvu (unexplained share of the
        variance), l0 (active features a token), dead (share of the features that fire on no token
        of any text); tensors loss [step], frequency [feature] (share of tokens) and peak [feature]
        (largest activation), both over all texts. Decoder rows have norm 1.

    Raises:
        TextError: too few tokens or texts, an unknown kind, k above the number of features, states
            that hold NaN.

    Use when:
        No SAE is published for this model, or your texts are unlike those it was trained on.

    Not when:
        You know the concept: a direction or a probe costs a thousandth and is sharper.

    Cost:
        one forward pass up to the layer, and 3 products of batch * d * latents a step.

    Controls:
        held-out texts; the same SAE before training; as many principal components as features are
        active (dense, so better for what is not sparse).

    Paper:
        arXiv 2406.04093 (TopK), 2412.06410 (BatchTopK), 2407.14435 (JumpReLU)

    Example:
        from tool_packs import sae
        texts = [f"the {a} {b}" for a in ("cat", "dog") for b in ("sat on the mat", "is here")]
        s = sae.train(m, texts * 4, 0.5, latents=64, k=4, steps=20, batch=64)
        r = s.result
        r["fvu"], r["dead"]
    """
    started = time.perf_counter()
    index, site = m.layer_index(layer), site_name(site)
    if kind not in sae_train.KINDS:
        raise TextError(f"kind={kind!r}: {', '.join(sae_train.KINDS)}")
    if not 1 <= k <= latents:
        raise TextError(f"k={k} of latents={latents}: k lies in 1..latents")
    if steps < 1 or batch < 1 or first < 0 or not 0 < held_out < 1:
        raise TextError(
            f"steps={steps} and batch={batch} are at least 1, first={first} at least 0, "
            f"held_out={held_out} in (0, 1)"
        )
    prompts = read(m, text)
    if len(prompts) < 2:
        raise TextError("1 text: give many, a part of them is held out")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    count = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
    halves = []
    for part in (order[count:], order[:count]):
        mine = [prompts[i] for i in part]
        halves.append(read_states(m, mine, from_first(mine, first), index, site).to(m.device))
    x, y = halves  # [T, d] each
    if len(x) < k:
        raise TextError(f"{len(x)} tokens to train on: give at least k={k}, thousands are usual")
    fixed: dict[str, Any] = {
        "activation": "topk" if kind == "topk" else "jumprelu",
        "layer": index,
        "site": site,
        "k": k if kind == "topk" else None,
        "first": first,
        "name": m.name,
    }
    what = f"the training on {len(x)} tokens"
    with sparing(x.device, what, f"lower batch (now {batch}) or latents (now {latents})"):
        parts, loss = sae_train.fit(
            x, kind, latents, k, steps=steps, batch=batch, lr=lr, seed=seed, progress=_progress
        )
    trained = SAE(**parts, **fixed)
    begun, scale = sae_train.start(x, latents, seed)
    begun = {n: t.to(x.device) for n, t in sae_train.in_units_of_states(begun, scale).items()}
    # Before training there are no thresholds yet: its k largest are what it would let pass.
    untrained = SAE(**begun, **fixed | {"activation": "topk", "k": k})
    rows, seen = [], torch.zeros(latents)
    for arm, one in (("trained", trained), ("untrained", untrained)):
        active, peak, fired = _usage(one, y)
        _, higher, also = _usage(one, x)
        rows.append(
            {
                "arm": arm,
                "fvu": round(sae_train.unexplained(y, one.reconstruct(y)), 5),
                "l0": round(active / len(y), 2),
                "dead": round(((fired + also) == 0).float().mean().item(), 4),
            }
        )
        if arm == "trained":
            trained.peak, seen = torch.maximum(peak, higher), fired + also
    dense = sae_train.unexplained(y, sae_train.pca(x, y, min(k, x.shape[1])))
    rows.append({"arm": "pca", "fvu": round(dense, 5), "l0": float(k), "dead": None})
    told, before = rows[0], rows[1]
    trained.result = Result(
        title=f"{kind} SAE of {site} {index}: {latents} features, {k} active, {len(x)} tokens",
        tensors=to_cpu({"loss": loss, "frequency": seen / (len(x) + len(y)), "peak": trained.peak}),
        dims={"loss": ("step",), "frequency": ("feature",), "peak": ("feature",)},
        rows=rows,
        lines=[
            f"held-out texts ({len(y)} tokens): FVU {told['fvu']:.4f} at L0 {told['l0']:.1f}; "
            f"control, untrained: {before['fvu']:.4f}; control, {k} principal components: "
            f"{dense:.4f}",
            f"dead features {told['dead']:.3f} (untrained {before['dead']:.3f})",
            f"loss {loss[0]:.3f} -> {loss[-1]:.4f}; features(m, sae, text) tells the recovered "
            "loss of the model",
        ],
        figure={"kind": "lines", "x": "step", "lines": ["loss"]},
        provenance=provenance(
            m,
            "sae.train",
            started,
            prompts=[p.ids for p in prompts],
            seed=seed,
            layer=index,
            site=site,
            kind=kind,
            latents=latents,
            k=k,
            steps=steps,
            batch=batch,
            lr=lr,
            first=first,
        ),
    )
    return trained


def _usage(sae: SAE, x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Activations above 0 on x, and of each feature the largest and on how many tokens it fires."""
    _, feature, value = sae.entries(x)
    peak = torch.zeros(sae.n_features).scatter_reduce(0, feature, value, "amax")
    return len(value), peak, feature.bincount(minlength=sae.n_features)


def _progress(steps: int) -> Any:
    from tqdm.auto import tqdm

    return tqdm(range(steps), desc="sae", leave=False)
