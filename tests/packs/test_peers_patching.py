"""Exact patching is TransformerLens's, cell by cell (nnsight: see test_patching)."""

import json

import pytest
import torch

from benchmarks.peer_fixtures.transformer_lens_patching import (
    CLEAN,
    CONFIGS,
    CORRUPT,
    OUT,
    WORDS,
    checksum,
    make_model,
    make_tokenizer,
)
from tool_packs.models import Model
from tool_packs.patching import patch

PEER = json.loads(OUT.read_text(encoding="utf-8"))


NUMBERS = ("checksum", "clean", "corrupt")


@pytest.mark.parametrize("name", CONFIGS)
def test_patching_is_that_of_transformer_lens(name):
    hf, theirs = make_model(name), PEER[name]
    assert checksum(hf) == pytest.approx(theirs["checksum"], rel=1e-9)
    m = Model(hf, make_tokenizer(), name)
    for site in [key for key in theirs if key not in NUMBERS]:
        grid = {"grid": "heads"} if site == "heads" else {"site": site}
        r = patch(m, CLEAN, CORRUPT, answers=WORDS, n_control=0, **grid)
        got, want = r["metric"][0], torch.tensor(theirs[site])
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 1e-5
        # What it would be if nothing were patched.
        assert (want - theirs["corrupt"]).abs().max() > 0.05
    assert r["clean"][0].item() == pytest.approx(theirs["clean"], abs=1e-5)
    assert r["corrupt"][0].item() == pytest.approx(theirs["corrupt"], abs=1e-5)
