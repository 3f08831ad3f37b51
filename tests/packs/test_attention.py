"""Attention patterns are those of transformers; a head's kind shows beside its controls."""

import pytest
import torch

from tests.packs.test_families import NEWER, make
from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.attention import attended, attention_patterns
from tool_packs.errors import CaptureTooLarge, ModelError
from tool_packs.models import load_model
from tool_packs.organisms import world
from tool_packs.prompts import read

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]


@pytest.mark.parametrize("name", EVERY)
def test_patterns_are_those_of_transformers(folders, models, name):
    m = models[name]
    before = m.core.config._attn_implementation
    r = attention_patterns(m, TEXTS)
    assert m.core.config._attn_implementation == before
    plain = load_model(str(folders[name]), attn_implementation="eager")
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            out = plain.hf(**m.tokenizer(text, return_tensors="pt"), output_attentions=True)
        n = out.attentions[0].shape[-1]
        want = torch.stack([a[0] for a in out.attentions])  # [L, H, T, T]
        assert (r["pattern"][i, :, :, :n, :n] - want).abs().max() <= 1e-5
        assert r["pattern"][i, :, :, n:].isnan().all()
        assert (r["pattern"][i, :, :, :n, :n].sum(-1) - 1).abs().max() <= 1e-5


def test_scores_are_means_over_the_queries_that_have_such_a_key(llama):
    text = "the cat said the cat"
    r = attention_patterns(llama, text, [1])
    a = r["pattern"][0, 0, 2]
    ids = read(llama, text)[0].ids
    n = len(ids)
    assert r["scores"][0, 2, 0].item() == pytest.approx(
        sum(a[q, q - 1].item() for q in range(1, n)) / (n - 1), abs=1e-5
    )
    pairs = [(q, k + 1) for q in range(n) for k in range(q) if ids[k] == ids[q]]
    assert pairs
    induced = sum(a[q, k].item() for q, k in pairs) / len({q for q, _ in pairs})
    assert r["scores"][0, 2, 3].item() == pytest.approx(induced, abs=1e-5)
    even = sum(1 / (q + 1) for q in range(1, n)) / (n - 1)
    assert r["scores_uniform"][0].item() == pytest.approx(even, abs=1e-5)
    assert "shuffled" in r.summary()
    assert r.plot(head=2).png


def test_what_a_query_attends_to_in_words(llama):
    (prompt,) = read(llama, TEXTS[1])
    (said,) = attended(llama, prompt, 4, [(2, 1)], k=1)
    r = attention_patterns(llama, TEXTS[1], [2])
    at = int(r["pattern"][0, 0, 1, 4].argmax())
    assert said.startswith(repr(llama.tokenizer.decode([prompt.ids[at]])))
    assert f"at {at} " in said


def test_what_does_not_fit_is_refused_in_a_sentence(llama):
    with pytest.raises(CaptureTooLarge, match="above limit_gb=1e-06"):
        attention_patterns(llama, TEXTS, limit_gb=1e-6)
    with pytest.raises(ModelError, match="layer 0 has no attention"):
        attention_patterns(make("mamba2", NEWER["mamba2"]()), TEXTS[0])


def test_a_trained_model_has_a_head_of_content_and_the_shuffle_tells_it_from_one_of_place():
    """Induction falls to what even attention has when tokens are shuffled; "self" does not."""
    m = load_model("organism:base")
    r = attention_patterns(m, world.base_documents(5, 20))
    kinds = r.labels["kind"]
    even = dict(zip(kinds, r["scores_uniform"].tolist(), strict=True))
    best = {k: r["scores"][:, :, c].flatten() for c, k in enumerate(kinds)}
    shuffled = {k: r["scores_shuffled"][:, :, c].flatten() for c, k in enumerate(kinds)}
    induction, itself = (int(best[k].argmax()) for k in ("induction", "self"))
    assert best["induction"][induction] > 2 * even["induction"]
    assert shuffled["induction"][induction] < 1.5 * even["induction"]
    assert best["self"][itself] > 1.8 * even["self"]
    assert shuffled["self"][itself] > 1.8 * even["self"]
