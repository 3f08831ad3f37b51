"""Activations are those that plain hooks read, whatever the batch."""

import re
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.activations import capture
from tool_packs.engine import Intervention
from tool_packs.errors import CaptureTooLarge, ResultError, TextError
from tool_packs.generation import generate
from tool_packs.models import load_model
from tool_packs.result import Result

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


@pytest.mark.parametrize("batch_tokens", [4, 16_384])
@pytest.mark.parametrize("name", ["llama", "gpt2-lora"])
def test_what_goes_to_a_folder_is_what_would_stay_in_memory(
    models, tmp_path, monkeypatch, name, batch_tokens
):
    m = models[name]
    monkeypatch.setattr(m, "batch_tokens", batch_tokens)
    ask = {
        "layers": [0, 2],
        "positions": "all",
        "sites": ["resid_post", "head", "mlp_out"],
        "steer": Intervention(1, torch.ones(m.width), 2.0),
    }
    want = capture(m, TEXTS, **ask)
    got = capture(m, TEXTS, **ask, to=tmp_path / "run")
    again = Result.load(tmp_path / "run")
    assert got.tensors.keys() == want.tensors.keys() == again.tensors.keys()
    for key, tensor in want.tensors.items():
        for other in (got, again):
            assert other[key].dtype == tensor.dtype
            assert torch.equal(other[key].nan_to_num(), tensor.nan_to_num())
            assert torch.equal(other[key].isnan(), tensor.isnan())
    assert got.rows == want.rows == again.rows
    assert got.lines == want.lines == again.lines
    assert got.plot().png
    assert got.save(tmp_path / "copy") and Result.load(tmp_path / "copy")["mask"].any()


def test_a_folder_is_used_again_and_an_interrupted_one_holds_no_result(llama, tmp_path):
    first = capture(llama, TEXTS, to=tmp_path)
    kept = first["resid_post"].clone()
    second = capture(llama, TEXTS[:2], to=tmp_path)
    assert torch.equal(first["resid_post"], kept)  # read from the file that was
    assert len(second["resid_post"]) == len(Result.load(tmp_path)["resid_post"]) == 2

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = llama.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        capture(llama, TEXTS, to=tmp_path)
    handle.remove()
    with pytest.raises(ResultError, match=r"no result\.json"):
        Result.load(tmp_path)


def test_a_folder_that_cannot_hold_it_is_refused(llama, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("here")
    with pytest.raises(TextError, match="is a file: give a folder"):
        capture(llama, TEXTS, to=tmp_path / "taken")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(CaptureTooLarge, match=r"do not fit on the disk .* 0\.0 GB left"):
        capture(llama, TEXTS, to=tmp_path / "full")


PEAK = """
import sys
from pathlib import Path

import torch
from tool_packs.activations import capture
from tool_packs.models import load_model


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 2**10


torch.set_num_threads(1)
m = load_model(sys.argv[1])
m.batch_tokens = 2048
texts = ["the cat sat on the mat and the dog said that she is here " * 8] * 300
ask = {"positions": "all", "sites": ["resid_post", "resid_pre", "attn_out", "mlp_out", "head"]}
capture(m, texts[:20], **ask)
for target in (sys.argv[2], None):
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    r = capture(m, texts, **ask, to=target)
    print(sum(r[site].nbytes for site in ask["sites"]) // 2**20, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
def test_memory_is_bounded_by_a_pass_and_not_by_the_result(folders, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folders["llama"]), str(tmp_path / "run")],
        capture_output=True, text=True, check=True, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    (size, grown), (_, grown_in_memory) = (
        map(int, line.split()) for line in done.stdout.splitlines()
    )
    assert size > 100  # MiB
    assert grown < size / 4
    assert grown_in_memory > size * 0.9  # the wrong answer
