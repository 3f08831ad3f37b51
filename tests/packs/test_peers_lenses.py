"""The logit lens, the Jacobian lens with its exchange, and DLA are those of TransformerLens 4.3."""

import json

import pytest
import torch

from benchmarks.peer_fixtures.transformer_lens_lenses import (
    CONFIGS,
    LONG,
    OUT,
    PROMPTS,
    SKIP,
    SWAP,
    WORDS,
    checksum,
    make_model,
    make_tokenizer,
)
from tool_packs.activations import capture
from tool_packs.dla import dla
from tool_packs.jacobian_lens import fit_jacobian_lens
from tool_packs.jacobian_swap import swap_intervention
from tool_packs.logit_lens import logit_lens
from tool_packs.models import Model

PEER = json.loads(OUT.read_text(encoding="utf-8"))


# TransformerLens leaves out the norms that Gemma 2 has after attention and MLP.
TAKEN_APART = [name for name in CONFIGS if "dla" in PEER[name]]


def built(name):
    """One of the peer's models built again, and what the peer said of it."""
    hf, theirs = make_model(name), PEER[name]
    assert checksum(hf) == pytest.approx(theirs["checksum"], rel=1e-9)
    return Model(hf, make_tokenizer(), name), theirs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logit_lens(name):
    m, theirs = built(name)
    lens = theirs["logit_lens"]
    for i, text in enumerate(PROMPTS):
        r = logit_lens(m, text, positions="last", k=m.vocab_size)
        at = (r["top_ids"][0, :, 0] == lens["targets"][i]).int().argmax(-1)  # [L]
        got = r["top_logprobs"][0, :, 0].gather(1, at[:, None])[:, 0]
        assert (got - torch.tensor(lens["logprob"][i])).abs().max() <= 1e-5
        assert (at + 1).tolist() == lens["rank"][i]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_jacobian_lens(name):
    m, theirs = built(name)
    lens = fit_jacobian_lens(m, LONG, skip=SKIP)
    want = torch.tensor(theirs["jacobian"]["matrices"])
    assert (lens["jacobian"] - want).abs().max() <= 1e-6
    assert (want - torch.eye(m.width)).abs().max() > 0.1
    change = swap_intervention(m, lens, SWAP, layers=1)
    for text, logits in zip(PROMPTS, theirs["jacobian"]["swap"], strict=True):
        h = capture(m, text, -1, steer=change)["resid_post"][0, 0]
        with torch.no_grad():
            got = m.unembed(m.norm(h))[0]
            plain = m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0, -1]
        assert (got - torch.tensor(logits)).abs().max() <= 1e-5
        assert (plain - torch.tensor(logits)).abs().max() > 1e-2


@pytest.mark.parametrize("name", TAKEN_APART)
def test_direct_logit_attribution(name):
    m, theirs = built(name)
    r = dla(m, PROMPTS, WORDS)
    names = {"embed": "embed", "pos_embed": "pos_embed"}
    for layer in range(m.n_layers):
        names |= {f"{layer}_{part}_out": f"L{layer} {part}" for part in ("attn", "mlp")}
    ours = [r.labels["component"].index(names[name]) for name in theirs["dla"]["components"]]
    assert len(ours) == len(r.labels["component"]) - 1  # all but the biases
    want = torch.tensor(theirs["dla"]["values"])
    assert (r["attribution"][:, ours] - want).abs().max() <= 1e-4
    heads = torch.tensor(theirs["dla"]["heads"]).unflatten(1, (m.n_layers, -1))
    assert (r["head"] - heads).abs().max() <= 1e-4
    assert heads.abs().max() > 0.1
