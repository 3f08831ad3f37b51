"""Interchange interventions on a learned subspace: a planted direction, identities, controls."""

import itertools

import pytest
import torch

from tests.packs.tiny import TEXTS
from tool_packs import das as pack
from tool_packs.das import _all_logits, _orthonormal, _read_pairs, das
from tool_packs.errors import PackError, TextError
from tool_packs.models import load_model
from tool_packs.patching import patch

WORDS = [
    f"the {a} {b} {c}"
    for a in ("cat", "dog", "nurse", "doctor", "house")
    for b in ("sat on", "is in", "said that", "and")
    for c in ("the mat", "she", "Paris", "the hill", "London")
]
BASE, SOURCE = WORDS, [WORDS[(37 * i + 11) % len(WORDS)] for i in range(len(WORDS))]


def hooked(m, base, source, layer, change):
    """Logits after each base with change(its last state, the source's last state) put in place."""
    out = []
    for one, two in zip(base, source, strict=True):
        kept = []
        hook = m.layers[layer].register_forward_hook(lambda _, __, h, kept=kept: kept.append(h))
        ids = [torch.tensor([m.tokenizer(t)["input_ids"]]) for t in (one, two)]
        with torch.no_grad():
            m.core(ids[1])
        hook.remove()

        def put(_, __, h, theirs=kept[0][0, -1]):
            h = h.clone()
            h[0, -1] = change(h[0, -1], theirs)
            return h

        hook = m.layers[layer].register_forward_hook(put)
        with torch.no_grad():
            out.append(m.core(ids[0]).logits[0, -1])
        hook.remove()
    return torch.stack(out)


@pytest.fixture(scope="module")
def planted(folders):
    """A model whose layers above 1 add nothing, and the one direction that decides of two tokens.

    Which of them has the larger logit is then the sign of the state along that direction.
    """
    m = load_model(str(folders["llama"]))
    with torch.no_grad():
        for layer in m.layers[2:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        rows = m.core.get_output_embeddings().weight
        h = hooked(m, WORDS, WORDS, 1, lambda mine, _: mine)
        # Two tokens that the texts decide between, about half of them each way.
        a, b = max(
            itertools.combinations(range(5, 120), 2),
            key=lambda ab: min(
                (h[:, ab[0]] > h[:, ab[1]]).sum(), (h[:, ab[0]] < h[:, ab[1]]).sum()
            ),
        )
        w = m.core.model.norm.weight * (rows[a] - rows[b])
    says = torch.where(h[:, a] > h[:, b], a, b).tolist()
    answers = [says[WORDS.index(t)] for t in SOURCE]
    return m, w / w.norm(), answers


class TestFinding:
    def test_a_planted_direction_is_found(self, planted):
        m, w, answers = planted
        r = das(m, BASE, SOURCE, answers=answers, layer=1, dim=1)
        arms = {row["arm"]: row for row in r.rows}
        assert (r["subspace"][:, 0] @ w).abs() > 0.85  # a random direction of 32: .14
        assert arms["learned"]["held_out"] > 0.9
        assert arms["whole state"]["held_out"] == 1.0
        assert arms["random"]["held_out"] < 0.75
        assert arms["shuffled"]["held_out"] < 0.75
        assert arms["unpatched"]["held_out"] < 0.75
        assert "controls" in r.summary()

    def test_it_is_not_in_what_a_base_without_it_would_say(self, planted):
        """The planted direction alone brings the source's answer; all the others bring none."""
        m, w, answers = planted
        pairs = _read_pairs(m, BASE, SOURCE, "last", 1, "resid_post")
        choices = torch.tensor(sorted(set(answers)))
        says = lambda q: choices[_all_logits(m, pairs, q)[:, choices].argmax(-1)]  # noqa: E731
        others = torch.linalg.svd(w[None])[2][1:].T  # [d, d - 1]
        assert (says(w[:, None]) == torch.tensor(answers)).all()
        assert (says(others) == says(torch.zeros(m.width, 1))).all()


class TestAlgebra:
    def test_all_dimensions_are_the_whole_state(self, llama):
        pairs = _read_pairs(llama, BASE[:12], SOURCE[:12], "last", 2, "resid_post")
        q = _orthonormal(torch.randn(llama.width, llama.width))
        whole = _all_logits(llama, pairs, None)
        assert torch.allclose(_all_logits(llama, pairs, q), whole, atol=1e-4)
        assert torch.allclose(
            whole, hooked(llama, BASE[:12], SOURCE[:12], 2, lambda _, theirs: theirs), atol=1e-4
        )
        r = das(llama, BASE[:12], SOURCE[:12], layer=2, dim=llama.width, steps=2)
        accuracy = dict(zip(r.labels["arm"], r["accuracy"].tolist(), strict=True))
        assert accuracy["learned"] == accuracy["whole state"] == accuracy["random"]

    def test_the_whole_state_is_what_patching_puts_there(self, llama):
        one, two = "the cat sat on the mat", "the dog sat on the mat"
        pairs = _read_pairs(llama, [one] * 8, [two] * 8, "last", 1, "resid_post")
        logits = _all_logits(llama, pairs, None)[0]
        a, b = 40, 41
        r = patch(llama, two, one, lambda x: x[:, a] - x[:, b], layers=1, positions="last")
        assert logits[a] - logits[b] == pytest.approx(r["metric"].item(), abs=1e-4)

    @pytest.mark.parametrize("name", ["llama", "gemma2-lora", "gpt2"])
    def test_a_subspace_is_exchanged_and_nothing_else(self, models, name):
        m = models[name]
        pairs = _read_pairs(m, TEXTS * 2, TEXTS[::-1] * 2, "last", 1, "resid_post")
        q = _orthonormal(torch.randn(m.width, 3, generator=torch.Generator().manual_seed(0)))
        if name == "llama":
            want = hooked(
                m, TEXTS * 2, TEXTS[::-1] * 2, 1, lambda a, b: a - q @ (q.T @ a) + q @ (q.T @ b)
            )
            assert torch.allclose(_all_logits(m, pairs, q), want, atol=1e-4)
        same = _read_pairs(m, TEXTS * 2, TEXTS * 2, "last", 1, "resid_post")
        plain = _all_logits(m, same, torch.zeros(m.width, 1))
        assert torch.allclose(_all_logits(m, same, q), plain, atol=1e-4)  # with itself: identity
        assert not torch.allclose(_all_logits(m, pairs, q), plain, atol=1e-2)

    @pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out"])
    def test_other_sites(self, llama, site):
        pairs = _read_pairs(llama, TEXTS * 2, TEXTS[::-1] * 2, "last", 1, site)
        q = _orthonormal(torch.randn(llama.width, llama.width))
        whole = _all_logits(llama, pairs, None)
        assert torch.allclose(_all_logits(llama, pairs, q), whole, atol=1e-4)
        r = das(llama, BASE[:12], SOURCE[:12], layer=1, site=site, steps=3)
        assert r["subspace"].norm() == pytest.approx(1.0, abs=1e-5)

    def test_the_model_gathers_no_gradient_and_a_seed_repeats(self, llama):
        one = das(llama, BASE[:12], SOURCE[:12], layer=1, dim=2, steps=4)
        two = das(llama, BASE[:12], SOURCE[:12], layer=1, dim=2, steps=4)
        assert torch.equal(one["subspace"], two["subspace"])
        assert all(p.grad is None for p in llama.hf.parameters())
        eye = one["subspace"].T @ one["subspace"]
        assert torch.allclose(eye, torch.eye(2), atol=1e-5)

    def test_an_interrupt_leaves_no_hook(self, llama, monkeypatch):
        def stop(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(torch.autograd, "grad", stop)
        with pytest.raises(KeyboardInterrupt):
            das(llama, BASE[:12], SOURCE[:12], layer=1, steps=2)


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": 33}, "1..32"),
        ({"layer": 9}, "9"),
        ({"site": "head"}, "head"),
        ({"site": "nose"}, "nose"),
        ({"position": "all"}, "give one"),
        ({"position": 99}, "99"),
        ({"steps": 0}, "steps=0"),
        ({"held_out": 1.0}, "held_out=1.0"),
        ({"answers": ["she"]}, "1 answers"),
        ({"answers": ["she"] * 12}, "one answer"),
        ({"answers": [999] * 12}, "999"),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(llama, options, shown):
    with pytest.raises(PackError) as caught:
        das(llama, BASE[:12], SOURCE[:12], **options)
    assert shown in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pairs_that_do_not_fit(llama):
    with pytest.raises(TextError, match="5 base prompts and 4 sources"):
        das(llama, BASE[:5], SOURCE[:4])
    with pytest.raises(TextError, match="at least 8"):
        das(llama, BASE[:5], SOURCE[:5])


def test_states_with_nan_are_refused(folders):
    m = load_model(str(folders["llama"]))
    m.core.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(PackError, match="NaN"):
        das(m, BASE[:12], SOURCE[:12], layer=1)


def test_held_out_pairs_whose_text_was_seen_are_counted(llama):
    r = das(llama, BASE[:12], SOURCE[:12], layer=1, steps=2)
    seen = sum(s in BASE[:12] for s in SOURCE[:12])
    assert seen  # of these texts some are the base of another pair
    assert any("that training saw" in line for line in r.lines)
    assert pack.FEWEST == 8
