"""What an SAE's features are: where they fire, how much of the model they keep, their names."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tool_packs import sae_train
from tool_packs.engine import FOREVER, Intervention, all_logits, editing, shown_batches
from tool_packs.errors import ModelError, TextError
from tool_packs.logit_lens import lens_vector
from tool_packs.prompts import Prompt, Text, read, token_strings
from tool_packs.result import Result, mean_sd, provenance, to_cpu
from tool_packs.sae_model import SAE, after_layer, check_fits, from_first, states_of

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["features", "label"]

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
    chosen = None if which is None else [feature_number(sae, j) for j in which]
    if examples < 1 or n < 1:
        raise TextError(f"n={n} and examples={examples}: both are at least 1")
    where = from_first(prompts, sae.first)
    x = states_of(m, sae, prompts, where).to(sae.W_enc.device)  # [T, d]
    entries = entries_of(sae, x, where)
    peak = torch.zeros(sae.n_features).scatter_reduce(
        0, entries["feature"], entries["activation"], "amax"
    )
    counts = entries["feature"].bincount(minlength=sae.n_features)
    sums = torch.zeros(sae.n_features).index_add(0, entries["feature"], entries["activation"])
    if chosen is None:
        chosen = [j for j in peak.topk(min(n, sae.n_features)).indices.tolist() if peak[j] > 0]
    rows = []
    for j in chosen:
        shown, found = examples_of(m, prompts, entries, j, examples)
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
    chosen = [feature_number(sae, j) for j in ([which] if isinstance(which, int) else which)]
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
        entries = entries_of(sae, states_of(m, sae, prompts, where).to(sae.W_enc.device), where)
    rows = []
    for i, j in enumerate(chosen):
        shown = examples_of(m, prompts, entries, j, examples)[0] if prompts else []
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


def feature_number(sae: SAE, j: Any) -> int:
    if isinstance(j, bool) or not isinstance(j, int) or not 0 <= j < sae.n_features:
        raise TextError(f"feature {j!r}: this SAE has features 0..{sae.n_features - 1}")
    return j


def entries_of(sae: SAE, x: Tensor, where: Sequence[Sequence[int]]) -> dict[str, Tensor]:
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


def examples_of(
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
    for batch in shown_batches(m, long, "features", rows=rows):
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
