"""Directions and steering beside steering-vectors and repeng, run in environments of their own.

benchmarks/peer_fixtures/{steering_vectors,repeng}.py wrote what they say.
"""

import contextlib
import json

import pytest
import torch

from benchmarks.peer_fixtures.directions_models import (
    CONFIGS,
    FIXTURES,
    checksum,
    make_model,
    make_tokenizer,
)
from tool_packs.activations import capture
from tool_packs.directions import direction
from tool_packs.models import Model
from tool_packs.steering import steering

STEERING_VECTORS = json.loads((FIXTURES / "steering_vectors.json").read_text(encoding="utf-8"))
REPENG = json.loads((FIXTURES / "repeng.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=CONFIGS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def m(name):
    return Model(
        make_model(*CONFIGS[name], STEERING_VECTORS["models"][name]["seed"]), make_tokenizer(), name
    )


def told(peer, name, m):
    """What the peer said, once it is sure that it spoke of this very model."""
    case = peer["models"][name]
    assert [case["kind"], case["arguments"]] == list(CONFIGS[name])
    assert checksum(m.hf) == pytest.approx(case["checksum"], rel=1e-12)
    return case


def ours(peer, m, **options):
    return direction(m, peer["pos"], peer["neg"], n_null=1, **options)["direction"]


def error(got, want):
    want = torch.tensor(want)
    return ((got - want).abs().max() / want.abs().max().clamp_min(1)).item()


def last_logits(m, text):
    with torch.no_grad():
        return m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0, -1]


def cosines(got, want):
    want = torch.stack([torch.tensor(row) for row in want])
    return torch.cosine_similarity(got, want, dim=-1)


def test_the_mean_is_that_of_steering_vectors(name, m):
    case = told(STEERING_VECTORS, name, m)
    assert error(ours(STEERING_VECTORS, m), case["mean"]) <= 1e-6
    assert error(ours(STEERING_VECTORS, m, position=-2), case["second_last"]) <= 1e-6


def test_the_uncentred_component_is_that_of_steering_vectors(name, m):
    case = told(STEERING_VECTORS, name, m)
    unit = torch.nn.functional.normalize(ours(STEERING_VECTORS, m, method="pca"), dim=-1)
    assert error(unit, case["pca"]) <= 1e-6


def test_what_attention_and_mlp_add_differs_as_in_steering_vectors(name, m):
    case = told(STEERING_VECTORS, name, m)
    one, two = (
        capture(m, STEERING_VECTORS[side], sites=["attn_out", "mlp_out"]) for side in ("pos", "neg")
    )
    for site in ("attn_out", "mlp_out"):
        mean = (one[site] - two[site]).mean(0)[:, 0]
        assert error(mean, case[site]) <= 1e-6


def test_a_steered_model_says_what_it_says_under_steering_vectors(name, m):
    case, text = told(STEERING_VECTORS, name, m), STEERING_VECTORS["prompt"]
    vector = torch.tensor(case["mean"])
    assert error(last_logits(m, text), case["plain"]) <= 1e-6
    with steering(m, vector, case["layer"], 2.0):
        assert error(last_logits(m, text), case["logits"]) <= 1e-6
    with steering(m, vector, case["layer"], 2.0, start=2):
        assert error(last_logits(m, text), case["from_third"]) <= 1e-6
    assert error(torch.tensor(case["plain"]), case["logits"]) > 0.1


@pytest.mark.parametrize(("method", "theirs"), [("pca-centred", "pca_diff"), ("pca", "pca_center")])
def test_components_are_those_of_repeng_up_to_the_layer_that_it_reads_after_the_norm(
    name, m, method, theirs
):
    case = told(REPENG, name, m)[theirs]
    assert sorted(map(int, case)) == list(range(1, m.n_layers))
    got = ours(REPENG, m, method=method)
    for layer in range(1, m.n_layers - 1):
        cosine = cosines(got[layer], [case[str(layer)]])
        assert cosine >= 0.999, layer
    # At the last layer repeng's hidden_states[-1] is after the final norm. Read there, it agrees.
    last = str(m.n_layers - 1)
    apart = cosines(got[-1], [case[last]]).abs().item()
    x = capture(m, REPENG["pos"] + REPENG["neg"], -1)["resid_post"][:, 0, 0]
    with torch.no_grad():
        x = m.norm(x)
    change = x[: len(x) // 2] - x[len(x) // 2 :]
    if method == "pca-centred":
        change = change - change.mean(0)
    after_norm = torch.linalg.svd(change).Vh[0]
    agreed = cosines(after_norm, [case[last]]).abs().item()
    assert agreed >= 0.999
    assert apart < agreed


def test_a_steered_model_says_what_it_says_under_repeng(name, m):
    case, text = told(REPENG, name, m), REPENG["prompt"]
    assert error(last_logits(m, text), case["plain"]) <= 1e-6
    with contextlib.ExitStack() as stack:
        for layer in case["layers"]:
            vector = torch.tensor(case["pca_center"][str(layer)])
            stack.enter_context(steering(m, vector, layer, 2.0))
        assert error(last_logits(m, text), case["logits"]) <= 1e-6
    assert error(torch.tensor(case["plain"]), case["logits"]) > 0.1
