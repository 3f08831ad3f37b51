"""Input that does not fit: one sentence that names the value and what is valid."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tool_packs
from seer_mcp.packs import read_packs
from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.directions import direction
from tool_packs.engine import all_logits, batches
from tool_packs.errors import MemoryFull, ModelError, PackError, TextError
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model
from tool_packs.patching import patch
from tool_packs.prompts import read
from tool_packs.steering import intervention, steer

CHAT = [{"role": "user", "content": "Who are you?"}]
LONG = "the cat " * 400
FOLDER = Path(tool_packs.__file__).parent

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


# Every technique that the catalogue lists, those of packs to come too: its own example, with one
# argument replaced by what does not fit.

TECHNIQUES = {
    t.full_name: t
    for _, t in read_packs([FOLDER]).techniques()
    if t.example and t.full_name != "models.load_model"  # which takes a name; see test_loading
}
LAYERS = {"layer", "layers", "into"}
POSITIONS = {"position", "positions", "start"}
# No pass is made with the model's weights.
NO_NUMBERS = {
    *("anatomy.anatomy", "anatomy.tokenize", "sae.load", "jacobian_swap.swap_intervention"),
    "attention.attention_patterns",  # its example reads two layers that come before the broken one
    *("neuronpedia.feature", "neuronpedia.search", "neuronpedia.activations"),
}
# Needs another argument beside it, which the example does not give; takes one chat and no list of texts.
DEPENDENT = {("probes.probe", "unlabelled"), ("introspection.introspect", "chat")}


def parameters(name):
    """The parameters of a technique by kind: those that are texts, layers, positions."""
    module, function = name.split(".")
    found = inspect.signature(getattr(importlib.import_module(f"tool_packs.{module}"), function))
    kinds = {"text": [], "layer": [], "position": []}
    for key, parameter in found.parameters.items():
        words = set(re.findall(r"\w+", str(parameter.annotation)))
        if {"Text", "Chat", "Fact"} & words:
            kinds["text"].append(key)
        elif key in LAYERS:
            kinds["layer"].append(key)
        elif key in POSITIONS and "Tensor" not in words:
            kinds["position"].append(key)
    return list(found.parameters), kinds


def cases(kind):
    return [
        pytest.param(name, key, id=f"{name}-{key}")
        for name in TECHNIQUES
        for key in parameters(name)[1][kind]
        if (name, key) not in DEPENDENT
    ]


def example_with(name, key, value):
    """The code of a technique's example, its own call of the technique given `key=value`."""
    names, _ = parameters(name)
    tree = ast.parse(TECHNIQUES[name].example)
    calls = [
        node
        for node in ast.walk(tree)
        # By its name, or as that of the pack that offers it (sae.diff is sae_diff.diff).
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] == name.split(".")[1]
    ]
    assert calls, f"the example of {name} does not call it"
    for call in calls:
        call.args, bound = [], dict(zip(names, call.args, strict=False))
        bound |= {word.arg: word.value for word in call.keywords}
        bound[key] = ast.Name("bad", ast.Load())
        call.keywords = [ast.keyword(word, given) for word, given in bound.items()]
    ast.fix_missing_locations(tree)
    return compile(tree, name, "exec"), {"bad": value, "torch": torch}


def refusal(m, name, key, value):
    code, scope = example_with(name, key, value)
    return sentence(lambda: exec(code, {**scope, "m": m}))


@pytest.mark.parametrize(("name", "key"), cases("text"))
@pytest.mark.parametrize("many", [False, True])
def test_an_empty_text_to_any_technique(models, name, key, many):
    said = refusal(models["llama-lora"], name, key, ["", ""] if many else "")
    assert "empty" in said or "''" in said


@pytest.mark.parametrize(("name", "key"), cases("text"))
def test_a_text_beyond_the_context_to_any_technique(models, name, key):
    said = refusal(models["llama-lora"], name, key, [LONG] * 4)
    assert re.search(r"\d{3,} tokens", said)
    assert "256" in said


@pytest.mark.parametrize(("name", "key"), cases("layer"))
@pytest.mark.parametrize("layer", [99, -5, 1.5])
def test_a_layer_out_of_range_to_any_technique(models, name, key, layer):
    said = refusal(models["llama-lora"], name, key, layer)
    assert str(layer) in said


@pytest.mark.parametrize(("name", "key"), cases("position"))
def test_a_position_out_of_range_to_any_technique(models, name, key):
    said = refusal(models["llama-lora"], name, key, -9999)
    assert "-9999" in said


@pytest.fixture(scope="module")
def broken(folders):
    """A model with NaN among the weights of a layer in the middle and of the final norm."""
    m = load_model(str(folders["llama-lora"]))
    with torch.no_grad():
        for key, weight in m.hf.named_parameters():
            if ("layers.2." in key and "down_proj.base" in key) or key.endswith(
                "model.norm.weight"
            ):
                weight.view(-1)[5] = float("nan")
    return m


@pytest.mark.parametrize("name", sorted(TECHNIQUES.keys() - NO_NUMBERS))
def test_a_model_with_nan_among_its_weights_to_any_technique(broken, name):
    code = compile(TECHNIQUES[name].example, name, "exec")
    said = sentence(lambda: exec(code, {"m": broken, "torch": torch}))
    assert "NaN" in said or "not finite" in said


def test_weights_that_hold_nan_are_named(broken):
    said = sentence(capture, broken, TEXTS)
    assert "layers.2.mlp.down_proj" in said
    assert "model.norm.weight" in said


def test_a_model_whose_weights_hold_nan_is_not_loaded(folders, tmp_path):
    hf = AutoModelForCausalLM.from_pretrained(folders["llama"])
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    hf.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folders["llama"]).save_pretrained(tmp_path)
    assert "layers.1.mlp.up_proj.weight" in sentence(load_model, str(tmp_path))


def test_nan_that_no_weight_holds_is_told_apart(llama):
    def to_nan(h):
        return h * float("nan")

    said = sentence(lambda: generate(llama, "the", steer=intervention(llama, None, 1, edit=to_nan)))
    assert "no weight is NaN" in said
    assert "float32" in said


@pytest.mark.parametrize("ask", ["capture", "generate", "logits"])
def test_a_pass_that_finds_no_memory_says_what_to_reduce(llama, ask):
    def full(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    asks = {
        "capture": lambda: capture(llama, ["the cat sat"]),
        "generate": lambda: generate(llama, "the cat", max_new_tokens=2),
        "logits": lambda: [all_logits(llama, b) for b in batches(llama, read(llama, "the cat"))],
    }
    handle = llama.layers[1].register_forward_pre_hook(full, with_kwargs=True)
    try:
        with pytest.raises(
            MemoryFull, match=r"no memory on cpu for a pass of 1 x \d+ tokens"
        ) as told:
            asks[ask]()
    finally:
        handle.remove()
    assert f"m.batch_tokens (now {llama.batch_tokens})" in str(told.value)
    asks[ask]()  # and it goes on afterwards


@pytest.mark.parametrize("passes", [0, 2])  # before the recording; in the cells
def test_patching_that_finds_no_memory_says_what_to_reduce(llama, passes):
    pair = ("the cat sat on the mat", "the dog sat on the mat")

    def ask():
        return patch(llama, *pair, answers=("he", "she"), n_control=0)

    ask()  # from here on the model is known to restart
    seen = []

    def full(module, args, kwargs):
        seen.append(module)
        if len(seen) > passes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    handle = llama.layers[1].register_forward_pre_hook(full, with_kwargs=True)
    try:
        said = sentence(ask)
    finally:
        handle.remove()
    assert re.search(r"no memory on cpu for a pass of \d+ x \d+ tokens", said)
    assert f"m.batch_tokens (now {llama.batch_tokens})" in said
    assert "effect" in ask().tensors  # and it goes on afterwards


def test_a_vector_that_is_no_numbers_is_refused(llama):
    with pytest.raises(TextError, match="vec = 'abc': give numbers"):
        intervention(llama, "abc", 1)


def test_a_device_that_is_not_there_is_said(folders):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ModelError, match=r"device_map='cuda'.* this machine has: cpu"):
        load_model(str(folders["llama"]), device_map="cuda")
