"""Input that does not fit: one sentence that names the value and what is valid."""

import pytest
import torch

from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.directions import direction
from tool_packs.errors import PackError
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model
from tool_packs.steering import intervention, steer

CHAT = [{"role": "user", "content": "Who are you?"}]
LONG = "the cat " * 400

# Each technique as a call on one text, and on the parameters that it takes.
ON_TEXT = {
    "capture": lambda m, text: capture(m, text),
    "generate": lambda m, text: generate(m, text, max_new_tokens=2, raw=isinstance(text, str)),
    "next_token": lambda m, text: next_token(m, text),
    "logit_lens": lambda m, text: logit_lens(m, text),
}
ON_LAYER = {
    "capture": lambda m, layer: capture(m, TEXTS, layer),
    "logit_lens": lambda m, layer: logit_lens(m, TEXTS, layers=layer),
    "direction": lambda m, layer: direction(m, TEXTS, TEXTS, layers=layer),
    "intervention": lambda m, layer: intervention(m, torch.ones(m.width), layer),
    "steer": lambda m, layer: steer(m, torch.ones(m.width), layer, scorer=len, max_new_tokens=1),
}
ON_POSITION = {
    "capture": lambda m, where: capture(m, TEXTS[2], 0, where),
    "logit_lens": lambda m, where: logit_lens(m, TEXTS[2], positions=where),
    "direction": lambda m, where: direction(m, TEXTS, TEXTS, position=where),
}
ON_VECTOR = {
    "intervention": lambda m, v: generate(m, "the", max_new_tokens=1, steer=intervention(m, v, 1)),
    "steer": lambda m, v: steer(m, v, 1, scorer=len, max_new_tokens=1),
}


def sentence(call, *args):
    """What the call says when it refuses; anything but a PackError fails the test."""
    with pytest.raises(PackError) as caught:
        call(*args)
    said = str(caught.value)
    assert said
    assert "\n" not in said
    return said


@pytest.mark.parametrize("name", ON_TEXT)
class TestText:
    def test_longer_than_the_context(self, llama, name):
        said = sentence(ON_TEXT[name], llama, LONG)
        count = len(llama.tokenizer(LONG)["input_ids"])
        assert f"{count} tokens" in said
        assert "256" in said

    @pytest.mark.parametrize(("text", "shown"), [(7, "7"), ([], "[]"), ([7], "7"), (None, "None")])
    def test_no_text(self, llama, name, text, shown):
        said = sentence(ON_TEXT[name], llama, text)
        assert shown in said
        assert "chat" in said

    def test_empty(self, folders, name):
        m = load_model(str(folders["llama"]))
        m.tokenizer.backend_tokenizer.post_processor = None  # without a BOS nothing is left
        m.tokenizer._add_bos_token = False
        assert "empty" in sentence(ON_TEXT[name], m, "")

    def test_chat_without_a_template(self, folders, name):
        m = load_model(str(folders["llama"]))
        m.tokenizer.chat_template = None
        said = sentence(ON_TEXT[name], m, CHAT)
        assert "no chat template" in said
        assert "m.tokenizer.chat_template" in said


@pytest.mark.parametrize("name", ON_LAYER)
@pytest.mark.parametrize(("layer", "shown"), [(4, "4"), (-5, "-5"), (1.5, "1.5"), ("x", "'x'")])
def test_layer(llama, name, layer, shown):
    said = sentence(ON_LAYER[name], llama, layer)
    assert shown in said
    assert "0.." in said or "'all'" in said


@pytest.mark.parametrize("name", ON_POSITION)
@pytest.mark.parametrize("where", [99, "nowhere", (50, 60)])
def test_position(llama, name, where):
    assert str(where if isinstance(where, (int, str)) else where[0]) in sentence(
        ON_POSITION[name], llama, where
    )


@pytest.mark.parametrize("site", ["nose", "resid_mid"])
def test_site(llama, site):
    said = sentence(lambda: capture(llama, TEXTS, 0, sites=site))
    assert repr(site) in said
    assert "resid_post" in said


@pytest.mark.parametrize("name", ON_VECTOR)
@pytest.mark.parametrize("shape", [(31,), (2, 32), ()])
def test_shape_of_a_vector(llama, name, shape):
    said = sentence(ON_VECTOR[name], llama, torch.ones(shape))
    assert str(tuple(shape)) in said
    assert "32" in said


@pytest.mark.parametrize("name", ON_VECTOR)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_vector_that_is_not_finite(llama, name, value):
    v = torch.ones(llama.width)
    v[3] = value
    assert "finite" in sentence(ON_VECTOR[name], llama, v)
