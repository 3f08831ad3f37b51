"""Activations are those that plain hooks read, whatever the batch."""

import re
import time

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.activations import capture
from tool_packs.engine import Intervention
from tool_packs.errors import CaptureTooLarge, TextError
from tool_packs.generation import generate
from tool_packs.models import load_model

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
CHAT = [
    {"role": "user", "content": "the cat sat"},
    {"role": "assistant", "content": "on the mat"},
]


def hooked(m, text, layer):
    """resid_post [T, d] of one text alone, read with a hook written out by hand."""
    seen = {}

    def hook(module, args, output):
        seen["h"] = output[0] if isinstance(output, tuple) else output

    handle = m.layers[layer].register_forward_hook(hook)
    ids = m.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        m.hf(input_ids=ids)
    handle.remove()
    return seen["h"][0]


@pytest.mark.parametrize("name", EVERY)
def test_capture_in_a_batch_equals_plain_hooks_one_by_one(models, name):
    m = models[name]
    r = capture(m, TEXTS, layers="all", positions="all")
    for i, text in enumerate(TEXTS):
        for layer in range(m.n_layers):
            want = hooked(m, text, layer)
            got = r["resid_post"][i, layer, : len(want)]
            assert (got - want).abs().max() <= 1e-5
        assert r["mask"][i].sum() == len(want)


@pytest.mark.parametrize("name", EVERY)
def test_what_attention_and_mlp_add_sums_to_the_stream(models, name):
    r = capture(models[name], TEXTS[0], sites=["resid_pre", "attn_out", "mlp_out", "resid_post"])
    total = r["resid_pre"] + r["attn_out"] + r["mlp_out"]
    assert (total - r["resid_post"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_heads_mixed_give_the_attention_module_its_output(models, name):
    m = models[name]
    r = capture(m, TEXTS[1], layers=1, sites="head")
    s = m.structure
    assert r["head"].shape == (1, 1, 1, s.heads, s.head_dim)
    seen = {}
    handle = s.attention[1].register_forward_hook(lambda a, b, out: seen.update(out=out[0]))
    with torch.no_grad():
        m.hf(input_ids=m.tokenizer(TEXTS[1], return_tensors="pt")["input_ids"])
    handle.remove()
    with torch.no_grad():
        mixed = s.head_mix[1](r["head"].flatten(-2)[0, 0])
    assert (mixed - seen["out"][0, -1:]).abs().max() <= 1e-5


def test_early_exit_gives_the_same_values(models):
    for m in models.values():
        alone = capture(m, TEXTS, layers=[1])["resid_post"][:, 0]
        assert torch.equal(alone, capture(m, TEXTS, layers="all")["resid_post"][:, 1])


def test_early_exit_runs_no_later_layer_and_no_unembedding(llama):
    ran = []
    watched = [*llama.layers, llama.structure.unembedding]
    handles = [
        x.register_forward_hook(lambda *a, i=i: ran.append(i)) for i, x in enumerate(watched)
    ]
    capture(llama, TEXTS[0], layers=[0, 1])
    for handle in handles:
        handle.remove()
    assert ran == [0, 1]


def test_positions_by_name_number_span_and_list(llama):
    def at(positions, text=CHAT):
        return capture(llama, [text], 0, positions)["positions"][0].tolist()

    ids = capture(llama, [CHAT], 0, "all").rows[0]["tokens"]
    assert at("last") == [len(ids) - 1]
    assert ids[at("last_user")[0]] == "at"  # "sat" is s + at
    assert "".join(ids[at("assistant_start")[0] + 1 :]) == "on the mat"
    assert at((1, 3)) == at(slice(1, 3)) == at([1, 2])
    assert at([0, "last", -2]) == [0, len(ids) - 1, len(ids) - 2]
    open_turn = CHAT[:1]
    assert at("assistant_start", open_turn) == at("last", open_turn)


def test_wrong_positions_layers_and_sites_say_what_exists(llama):
    with pytest.raises(TextError, match="outside a prompt of"):
        capture(llama, "the", 0, 99)
    with pytest.raises(TextError, match="assistant_start"):
        capture(llama, "the", 0, "end")
    with pytest.raises(TextError, match="plain text"):
        capture(llama, "the", 0, "last_user")
    with pytest.raises(TextError, match=r"layers 0\.\.3"):
        capture(llama, "the", 4)
    with pytest.raises(TextError, match="resid_post"):
        capture(llama, "the", 0, sites="residual")
    with pytest.raises(TextError, match="none of the prompt"):
        capture(llama, "the", 0, (50, 60))
    with pytest.raises(CaptureTooLarge, match="fewer layers"):
        capture(llama, TEXTS, limit_gb=1e-6)


def test_depth_names_a_layer(llama):
    assert capture(llama, "the", [0, 0.5, 1.0, -1]).labels["layer"] == [0, 2, 3, 3]


def test_capture_can_be_steered(llama):
    change = Intervention(1, torch.ones(llama.width), 3.0)
    plain = capture(llama, TEXTS, 1)["resid_post"]
    steered = capture(llama, TEXTS, 1, steer=change)["resid_post"]
    assert torch.allclose(steered - plain, torch.full_like(plain, 3.0), atol=1e-5)


@pytest.mark.parametrize("ask", ["activations", "generate"])
def test_what_takes_long_shows_how_far_it_is(folders, capsys, ask):
    m = load_model(str(folders["llama"]))
    m.batch_tokens = 4  # one text a batch
    run = {
        "activations": lambda: capture(m, TEXTS * 2),
        "generate": lambda: generate(m, TEXTS * 2, max_new_tokens=1, raw=True),
    }[ask]
    capsys.readouterr()
    run()
    assert capsys.readouterr().err == ""
    m.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.35))
    run()
    assert re.search(rf"{ask}: +\d+%.* \d/8 ", capsys.readouterr().err)
