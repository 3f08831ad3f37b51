"""A result names its axes, is read back as it was, and fits into what an agent can look at."""

import json

import pytest
import torch

from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.anatomy import anatomy, tokenize
from tool_packs.directions import direction
from tool_packs.errors import ResultError
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import lens_vector, logit_lens
from tool_packs.result import Provenance, Result
from tool_packs.steering import steer

LONG = "the cat sat on the mat and the dog said that she is here " * 6


def several(m):
    v = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
    yield capture(m, TEXTS, positions="all")
    yield direction(m, TEXTS, TEXTS[::-1], n_null=5)
    yield logit_lens(m, [LONG, *TEXTS], track=["she", "significant"])
    yield lens_vector(m, v, track=["she"])
    yield steer(m, v, 1, towards=["she"], max_new_tokens=3)
    yield generate(m, [*TEXTS, LONG], max_new_tokens=40)
    yield next_token(m, [LONG] * 9, ["he", "she"])
    yield tokenize(m, LONG)
    yield anatomy(m)


def test_what_is_saved_is_read_back(models, tmp_path):
    for i, r in enumerate(several(models["gpt2-lora"])):
        again = Result.load(r.save(tmp_path / str(i)))
        assert again.provenance == r.provenance
        assert again.summary() == r.summary()
        assert again.rows == json.loads(json.dumps(r.rows))
        assert again.tensors.keys() == r.tensors.keys()
        for key, tensor in r.tensors.items():
            assert torch.equal(again[key].nan_to_num(), tensor.nan_to_num())
            assert len(again.dims[key]) == tensor.ndim
        if r.figure is not None:
            assert again.plot().png == r.plot().png


def test_summaries_are_short_and_figures_are_small(llama):
    for r in several(llama):
        assert len(r.summary()) <= 1500
        bundle = r._repr_mimebundle_()
        assert bundle["text/plain"] == r.summary() == repr(r)
        if r.figure is not None:
            png = bundle["image/png"]
            assert png.startswith(b"\x89PNG")
            assert len(png) <= 60_000


def test_provenance_says_what_was_run_on_what(models):
    m = models["llama-lora"]
    p = capture(m, TEXTS, 0).provenance
    assert p.technique == "capture"
    assert p.adapter == "llama-lora"
    assert p.fingerprint == m.fingerprint()
    assert p.prompts == 4
    assert p.versions["torch"] == torch.__version__
    assert p.prompts_sha256 == capture(m, TEXTS, 1).provenance.prompts_sha256
    assert p.prompts_sha256 != capture(m, TEXTS[:3], 1).provenance.prompts_sha256
    assert p.seconds > 0


def test_a_slice_can_be_drawn_and_a_wrong_one_says_how_many(llama):
    r = logit_lens(llama, TEXTS)
    assert r.plot(prompt=1).png != r.plot(prompt=0).png
    with pytest.raises(ResultError, match="prompt 9 is not among the 4"):
        r.plot(prompt=9)


def test_tokens_of_any_script_are_drawn_without_a_warning(llama):
    r = logit_lens(llama, "日本 $x_1$ \n\t 🙂 é")
    assert r.plot().png


def test_a_table_shows_rows_and_says_how_many_it_leaves_out(llama):
    r = logit_lens(llama, [LONG, *TEXTS], track=["she"])
    lines = str(r.table(limit=3)).split("\n")
    assert repr(r.table(limit=3)) == "\n".join(lines)
    assert lines[0].split() == list(r.rows[0])
    assert len(lines) == 5
    assert lines[-1] == f"... {len(r.rows) - 3} more in .rows"
    assert str(r.table("layer", "she", limit=len(r.rows))).count("\n") == len(r.rows)
    head, row = str(r.table("she", "layer", limit=1)).split("\n")[:2]
    assert head.split() == ["she", "layer"]
    assert row.split() == [f"{r['she'][0]:.4g}", str(r["layer"][0])]


def test_a_cell_of_a_table_is_one_short_line():
    rows = [{"text": "a\nb", "n": None, "x": 0.123456}, {"text": "long " * 30, "more": [1, 2]}]
    table = Result("x", {}, {}, Provenance("x"), rows=rows).table()
    head, first, second = str(table).split("\n")
    assert head.split() == ["text", "n", "x", "more"]
    assert first.split() == ["a\\nb", "0.1235"]
    assert second.startswith("long long")
    assert [len(part.strip()) for part in second.split("…")] == [31, 6]


def test_a_table_of_what_is_not_there_is_refused(llama):
    r = generate(llama, "the", max_new_tokens=1)
    with pytest.raises(ResultError, match=r"no column 'layer' in this result: conv, sample"):
        r.table("layer")
    with pytest.raises(ResultError, match="limit=0"):
        r.table(limit=0)
    with pytest.raises(ResultError, match="has no rows"):
        Result("x", {}, {}, Provenance("x")).table()


def test_a_tensor_needs_a_name_for_each_axis():
    with pytest.raises(ResultError, match="name each axis"):
        Result("x", {"a": torch.ones(2, 2)}, {"a": ("row",)}, Provenance("x"))


def test_what_is_not_there_is_named(llama, tmp_path):
    r = capture(llama, TEXTS, 0)
    with pytest.raises(KeyError, match="resid_post"):
        r["resid"]
    with pytest.raises(ResultError, match=r"no result\.json"):
        Result.load(tmp_path)
    with pytest.raises(ResultError, match="has no figure"):
        lens_vector(llama, torch.ones(llama.width)).plot()
