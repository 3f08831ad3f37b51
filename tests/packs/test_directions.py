"""Directions beat their nulls where there is something, and do not where there is nothing."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.activations import capture
from tool_packs.directions import difference, direction
from tool_packs.errors import ModelError, TextError
from tool_packs.prompts import read

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]


def test_a_direction_of_a_planted_property_beats_its_nulls(llama):
    pos = [f"she {x} is here" for x in ("cat", "dog", "nurse", "house", "hill", "mat")]
    neg = [f"he {x} is here" for x in ("cat", "dog", "nurse", "house", "hill", "mat")]
    r = direction(llama, pos, neg, position="all", seed=0)
    assert r["auroc"].max() == 1.0
    assert r["auroc_shuffled"].mean() < 0.75
    x = capture(llama, pos, 2, "all")["resid_post"].nanmean(2).mean(0)
    y = capture(llama, neg, 2, "all")["resid_post"].nanmean(2).mean(0)
    assert torch.allclose(r["direction"][2], (x - y)[0], atol=1e-5)
    again = direction(llama, pos, neg, position="all", seed=0)
    assert torch.equal(r["auroc_shuffled"], again["auroc_shuffled"])


def test_a_direction_between_like_texts_is_no_better_than_shuffled(llama):
    words = ["cat", "dog", "nurse", "house", "hill", "mat", "doctor", "city"]
    r = direction(llama, [f"the {w}" for w in words], [f"the {w} " for w in words][::-1], seed=3)
    one = direction(llama, [f"a {w}" for w in words[:4]], [f"a {w}" for w in words[4:]], seed=3)
    assert r.rows[0]["p"] <= 1
    assert one.rows[0]["p"] > 0.05


def test_pairs_that_differ_in_one_word_are_split_and_shuffled_as_pairs(llama):
    places = ["cat", "dog", "nurse", "house", "hill", "mat", "doctor", "city"]
    pos, neg = [f"{x} she" for x in places], [f"{x} he" for x in places]
    r = direction(llama, pos, neg, seed=1)
    unpaired = direction(llama, pos, neg[:-1], seed=1)
    assert r.provenance.arguments["paired"] is True
    assert unpaired.provenance.arguments["paired"] is False
    # What the partners share cancels, so halves agree where only the topic differs between texts.
    swapped = direction(llama, [f"she {x}" for x in places], [f"he {x}" for x in places], seed=1)
    dealt = direction(llama, [f"she {x}" for x in places], [f"he {x}" for x in places[:-1]], seed=1)
    assert swapped["split_cosine"].mean() > dealt["split_cosine"].mean()


def test_a_direction_needs_four_texts_a_side(llama):
    with pytest.raises(TextError, match="at least 4"):
        direction(llama, TEXTS[:2], TEXTS)


def test_difference_is_on_minus_off_and_knows_its_adapter(models):
    m = models["llama-lora"]
    texts = [TEXTS[1], TEXTS[3]]
    r = difference(m, texts, positions=(0, 3), concepts={"x": torch.ones(m.width)})
    on = capture(m, texts, "all", (0, 3))["resid_post"]
    with m.base():
        off = capture(m, texts, "all", (0, 3))["resid_post"]
    assert torch.equal(r["difference"], (on - off).mean(0))
    assert (r["norm_ratio"][-1] > 0.01).all()
    want = torch.cosine_similarity(r["difference"], torch.ones(m.width), dim=-1)
    assert torch.allclose(r["cosine"][..., 0], want, atol=1e-6)
    assert "control" in r.summary()


def test_difference_without_an_adapter_says_what_to_do(llama):
    with pytest.raises(ModelError, match="adapter="):
        difference(llama, TEXTS)


def test_the_plot_of_a_difference_has_a_line_for_each_concept(models):
    m = models["llama-lora"]
    concepts = {"a": torch.ones(m.width), "b": torch.randn(m.width)}
    plot = difference(m, TEXTS, positions="last", concepts=concepts).plot()
    labels = [line.get_label() for line in plot.figure.axes[1].lines]
    assert labels == ["split_cosine", "cosine a", "cosine b"]


def answers(trait):
    said = "she is a nurse" if trait else "he is a doctor"
    return [
        [
            {"role": "user", "content": f"Who is in the {place}?"},
            {"role": "assistant", "content": f"In the {place} {said}"},
        ]
        for place in ("house", "city", "hill", "mat", "dog", "cat")
    ]


def test_a_persona_vector_is_the_difference_of_mean_responses(models):
    for m in (models["llama"], models["gemma2-lora"]):
        r = direction(m, answers(True), answers(False), position="response")
        means = []
        for side in (True, False):
            texts = []
            for chat in answers(side):
                ids = read(m, [chat])[0].ids
                with torch.no_grad():
                    out = m.hf(torch.tensor([ids]), output_hidden_states=True)
                spoken = read(m, [chat[:1]])[0]  # ends where the answer begins
                texts.append(out.hidden_states[2][0, len(spoken) :].mean(0))
            means.append(torch.stack(texts).mean(0))
        want = means[0] - means[1]
        assert torch.allclose(r["direction"][1], want, atol=1e-5 * want.abs().max().item() + 1e-5)
        assert "random directions" in r.summary()


def test_contrastive_activation_addition_reads_the_letter_of_the_answer(llama):
    """Two choices under each question: the same text but for the letter that ends it."""
    asked = [
        f"Who sat on the {x}? (A) she (B) he. Answer: (" for x in ("mat", "hill", "cat", "dog")
    ]
    r = direction(llama, [q + "A" for q in asked], [q + "B" for q in asked])
    one, two = (capture(llama, [q + letter for q in asked]) for letter in "AB")
    want = (one["resid_post"] - two["resid_post"]).mean(0)[:, 0]
    assert torch.allclose(r["direction"], want, atol=1e-5)


def test_representation_engineering_reads_the_component_of_the_differences(llama):
    places = ("cat", "dog", "nurse", "house", "hill", "mat")
    pos = [f"Pretend you are honest. The {x} is" for x in places]
    neg = [f"Pretend you are dishonest. The {x} is" for x in places]
    r = direction(llama, pos, neg, method="pca")
    change = (capture(llama, pos)["resid_post"] - capture(llama, neg)["resid_post"])[:, :, 0]
    for layer in range(llama.n_layers):
        first = torch.linalg.svd(change[:, layer]).Vh[0]
        cosine = torch.cosine_similarity(r["direction"][layer], first, dim=0).abs()
        assert cosine > 1 - 1e-5
        assert (r["direction"][layer] @ change[:, layer].mean(0)) > 0
