"""Capture, steering and patching are nnsight's to the last bit, on every family with and without LoRA."""

import pytest
import torch

from tests.packs.test_families import FAMILIES, make
from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.generation import next_token
from tool_packs.patching import patch
from tool_packs.replay import Change, record, replay
from tool_packs.steering import intervention
from tool_packs.structure import first_tensor

nnsight = pytest.importorskip("nnsight")

CLEAN, CORRUPT = "the cat sat on the mat", "the dog sat on the mat"


@pytest.fixture(scope="module")
def made():
    """Models by family and adapter, each made once."""
    found = {}

    def get(name, lora):
        if (name, lora) not in found:
            found[name, lora] = make(name, FAMILIES[name](), lora)
        return found[name, lora]

    return get


def ids_of(m, text):
    return m.tokenizer(text, return_tensors="pt")["input_ids"]


def traced(m, ids, layer=None, change=None):
    """Blocks' outputs [L, T, d] and the last token's logits [V], `change` made in place at a layer.

    Both unembed the last token alone: among others its logits are rounded otherwise.
    """
    layers = m.nnsight.base_model.model if m.adapters else m.nnsight
    for part in m.structure.layers_path.split("."):
        layers = getattr(layers, part)
    with torch.no_grad(), m.nnsight.trace({"input_ids": ids, "logits_to_keep": 1}):
        states = nnsight.save([])
        for i, block in enumerate(layers):
            h = first_tensor(block.output)
            if i == layer:
                change(h)
            states.append(h.clone().reshape(-1, m.width))
        logits = m.nnsight.output.logits[0, -1].save()
    return torch.stack(states), logits


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
class TestNnsight:
    def test_capture(self, made, name, lora):
        m = made(name, lora)
        want, logits = traced(m, ids_of(m, TEXTS[1]))
        assert torch.equal(capture(m, TEXTS[1], "all", "all")["resid_post"][0], want)
        top = next_token(m, TEXTS[1], k=5)
        assert torch.equal(top["top_logprobs"][0], logits.float().log_softmax(-1).topk(5).values)

    def test_steering(self, made, name, lora):
        m = made(name, lora)
        v = torch.randn(m.width, generator=torch.Generator().manual_seed(3))
        want, logits = traced(m, ids_of(m, TEXTS[1]), 1, lambda h: h.add_(2.0 * v))
        steer = intervention(m, v, 1, 2.0)
        assert torch.equal(capture(m, TEXTS[1], "all", "all", steer=steer)["resid_post"][0], want)
        top = next_token(m, TEXTS[1], k=5, steer=steer)
        assert torch.equal(top["top_logprobs"][0], logits.float().log_softmax(-1).topk(5).values)
        assert not torch.equal(want, traced(m, ids_of(m, TEXTS[1]))[0])

    def test_patching(self, made, name, lora):
        m = made(name, lora)
        clean, corrupt = ids_of(m, CLEAN), ids_of(m, CORRUPT)
        position = int((clean != corrupt)[0].nonzero()[0])
        theirs = traced(m, clean)[0][:, position]  # [L, d]
        one, two = (record(m, ids[0].tolist()) for ids in (clean, corrupt))
        right, wrong = ids_of(m, " he")[0, -1], ids_of(m, " she")[0, -1]
        r = patch(m, CLEAN, CORRUPT, answers=(int(right), int(wrong)), n_control=0)
        for layer in range(m.n_layers):
            source = one.at("resid_post", layer)[[position]]
            assert torch.equal(source[0], theirs[layer])
            put = theirs[layer]
            states, logits = traced(
                m, corrupt, layer, lambda h, put=put: h.view(-1, m.width)[position].copy_(put)
            )
            change = Change("resid_post", layer, [position], source)
            assert torch.equal(replay(two, [change])[0], states[-1, -1])
            # In the grid many cells are computed at once, which rounds otherwise.
            want = logits[right] - logits[wrong]
            assert abs(r["metric"][0, layer, position] - want) <= 1e-5 * max(1, abs(want))
