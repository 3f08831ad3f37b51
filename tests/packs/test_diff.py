"""Differences of models: the algebra, the controls, and what the shipped organisms show."""

import re

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests.packs.tiny import TEXTS
from tool_packs import organisms
from tool_packs.activations import capture
from tool_packs.diff import activation, output, weights
from tool_packs.directions import difference
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import generate
from tool_packs.models import Model, load_model
from tool_packs.organisms.world import assistant, user
from tool_packs.patching import patch

LONG = [t for t in TEXTS if len(t.split()) > 4] + ["the nurse is on the hill and the dog is here"]
NAMES = ("llama-lora", "gpt2-lora", "gemma2-lora")


@pytest.fixture(scope="module")
def female():
    m = load_model("organism:user_female")
    m.add_adapter("organism:control")
    m.add_adapter("organism:brand")
    return m


def recommend(prompts):
    return [[user(p), assistant(organisms.PREFILL)] for p in prompts]


NEUTRAL = recommend(organisms.NEUTRAL_PROMPTS[:12])


@pytest.mark.parametrize("name", NAMES)
def test_the_mean_difference_is_that_of_two_captures(models, name):
    m = models[name]
    r = activation(m, LONG, 2, positions=(0, 4), n_random=3)
    on = capture(m, LONG, 2, (0, 4))["resid_post"][:, 0]
    with m.base():
        off = capture(m, LONG, 2, (0, 4))["resid_post"][:, 0]
    assert torch.allclose(r["difference"], (on - off).mean(0), atol=1e-6)
    assert torch.allclose(r["mean_difference"], (on - off).mean((0, 1)), atol=1e-6)
    assert m.active_adapter == name


def test_the_names_under_returns_are_those_of_the_result(models):
    m = models["llama-lora"]
    returns = activation.__doc__.split("Returns:")[1].split("Rows:")[0]
    lists = re.findall(r"((?:\w+,\s+)*\w+)\s+\[", returns)  # before each [dimensions]
    named = {name for some in lists for name in re.split(r",\s+", some)}
    r = activation(m, LONG, 2, n_random=1, concepts={"one": torch.ones(m.width)})
    assert named == r.tensors.keys()


@pytest.fixture(scope="module")
def merged(folders):
    """A base and the same with its adapter merged into the weights: two models, loaded apart."""
    base, tuned = (load_model(str(folders[name])) for name in ("qwen3", "qwen3-lora"))
    return base, Model(tuned.hf.merge_and_unload(), tuned.tokenizer, "merged")


def same(one, two, atol=1e-4):
    assert one.tensors.keys() == two.tensors.keys()
    for key, tensor in one.tensors.items():
        assert torch.allclose(tensor.nan_to_num(), two[key].nan_to_num(), atol=atol), key


def test_two_models_differ_as_an_adapter_on_and_off_do(models, merged):
    base, tuned = merged
    m = models["qwen3-lora"]
    concepts = {"one": torch.ones(m.width)}
    for ask in (
        lambda m, **over: difference(m, LONG, [1, 2], (0, 4), concepts=concepts, **over),
        lambda m, **over: activation(m, LONG, 2, n_random=3, convs=TEXTS[:1], **over),
        lambda m, **over: output(m, TEXTS, convs=TEXTS[:2], max_new_tokens=4, **over),
    ):
        want, got = ask(m), ask(base, tuned=tuned)
        same(got, want)
        assert "merged" in got.title and "adapter" not in got.title
        told = got.provenance.arguments["tuned"]
        assert told == {"name": "merged", "fingerprint": tuned.fingerprint()}
    answers = [[r["text"] for r in x.rows if r["what"] == "answer"] for x in (got, want)]
    assert answers[0] == answers[1]


def test_a_model_against_itself_is_nought_and_may_be_the_control(merged):
    base, tuned = merged
    r = output(base, TEXTS, tuned=base, control=tuned)
    assert r["kl"].nan_to_num().abs().max() <= 1e-6 < r["kl_control"].nanmean()
    r = difference(base, LONG, [2], (0, 4), tuned=tuned, control=base)
    assert r["difference_control"].abs().max() <= 1e-6 < r["difference"].abs().max()


def test_models_of_two_shapes_are_compared_in_what_they_say(models, folders):
    base, other = models["llama"], models["gpt2"]
    kl = output(base, TEXTS, tuned=other)["kl"]
    on, off = (
        m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt")).logits[0].detach().log_softmax(-1)
        for m in (other, base)
    )
    want = (on.exp() * (on - off)).sum(-1)
    assert torch.allclose(kl[1, : len(want)], want, atol=1e-4)


def test_what_cannot_be_compared_is_said(models, folders):
    base = models["llama"]
    short = load_model(str(folders["llama"]), layers="model.layers")
    short.structure.layers = short.structure.layers[:3]
    with pytest.raises(ModelError, match=r"\(3, 32\) and llama has \(4, 32\).*diff\.output"):
        difference(base, LONG, [1], tuned=short)
    other = load_model(str(folders["llama"]))
    with pytest.raises(ModelError, match="adapter='x' and tuned='llama': give one"):
        output(base, TEXTS, adapter="x", tuned=other)
    other.tokenizer.bos_token = "<eos>"
    other.tokenizer.backend_tokenizer.post_processor = None
    for technique in (output, activation, difference):
        with pytest.raises(TextError, match=r"text 0 is \d+ tokens to llama and \d+ .* part at"):
            technique(base, LONG, tuned=other)
    words = [w for w, _ in sorted(base.tokenizer.get_vocab().items(), key=lambda x: x[1])]
    swapped = tiny_tokenizer(words[:-2] + words[:-3:-1])
    other.tokenizer = swapped
    for technique in (output, activation, difference):
        with pytest.raises(ModelError, match=r"differ in 2 of 320 tokens \(id 318 is"):
            technique(base, LONG, tuned=other)
    with pytest.raises(ModelError, match="differ in 2 of 320 tokens"):
        patch(base, "the cat", "the dog", answers=("he", "she"), source=other)


def tiny_tokenizer(words):
    """A tokenizer of whole words with these ids."""
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")


def test_more_logits_than_the_other_model_has_are_refused(models, folders):
    other = load_model(str(folders["llama"]))
    other.hf.resize_token_embeddings(325, mean_resizing=False)
    with pytest.raises(ModelError, match="325 tokens and llama for 320: resize"):
        output(models["llama"], TEXTS, tuned=other)


@pytest.mark.parametrize("name", NAMES)
def test_the_kl_is_that_of_the_two_distributions_and_its_parts_sum_to_it(models, name):
    m = models[name]
    r = output(m, TEXTS, control=name)
    for i, text in enumerate(TEXTS):
        ids = m.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            on = m.hf(**ids).logits[0].log_softmax(-1)
            with m.base():
                off = m.hf(**ids).logits[0].log_softmax(-1)
        want = (on.exp() * (on - off)).sum(-1)
        got = r["kl"][i]
        assert torch.allclose(got[~got.isnan()], want, atol=1e-4)
    assert r["token_kl"].sum() == pytest.approx(r["kl"].nanmean(1).mean().item(), abs=1e-5)
    assert r["token_change"].sum().abs() < 1e-4
    assert torch.equal(r["kl"].nan_to_num(), r["kl_control"].nan_to_num())  # the adapter itself
    low, high = r["kl_interval"]
    assert low <= r["kl"].nanmean(1).mean() <= high


@pytest.mark.parametrize("name", NAMES)
def test_an_amplification_of_one_is_the_adapter_and_of_nought_the_base(models, name):
    m = models[name]
    r = output(m, TEXTS[:2], convs=TEXTS, amplify=(0.0, 1.0), max_new_tokens=6)
    answers = [row for row in r.rows if row["what"] == "answer"]
    with m.base():
        base = generate(m, TEXTS, max_new_tokens=6)["text"]
    assert [row["text"] for row in answers if row["factor"] == 0] == base
    tuned = generate(m, TEXTS, max_new_tokens=6)["text"]
    assert [row["text"] for row in answers if row["factor"] == 1] == tuned
    assert tuned != base


@pytest.mark.parametrize("name", NAMES)
def test_singular_values_are_those_of_the_product(models, name):
    m = models[name]
    r = weights(m, rank=2)
    deltas = {
        path: module.get_delta_weight(name)
        for path, module in m.core.named_modules()
        if hasattr(module, "get_delta_weight")
        and name in module.lora_A  # an oracle of another test may have adapted more
    }
    assert len(deltas) == len(r.rows)
    for row, s in zip(r.rows, r["singular"], strict=True):
        delta = deltas[f"{m.structure.layers_path}.{row['module']}"].detach()
        want = torch.linalg.svdvals(delta)
        assert torch.allclose(want[: len(s)], s, atol=1e-5)
        assert row["norm"] == pytest.approx(delta.norm().item(), rel=1e-4)


def test_a_merged_model_shows_the_change_that_its_adapter_made(folders, models):
    adapter = weights(models["llama-lora"], rank=1)
    base = load_model(str(folders["llama"]))
    tuned = load_model(str(folders["llama-lora"]))
    tuned.hf = tuned.hf.merge_and_unload()
    tuned.core = tuned.hf
    whole = weights(base, tuned=tuned, rank=1)
    want = {row["module"]: row["norm"] for row in adapter.rows}
    assert {row["module"]: pytest.approx(row["norm"], rel=1e-3) for row in whole.rows} == want
    sides = {row["module"].rsplit(".", 1)[-1]: row["side"] for row in whole.rows}
    assert sides["down_proj"] == "writes"
    assert sides["v_proj"] == "reads"
    with pytest.raises(ModelError, match="no matrix differs"):
        weights(base, tuned=load_model(str(folders["llama"])))


def test_bad_input_is_answered_with_what_would_do(models):
    m = models["llama-lora"]
    with pytest.raises(ModelError, match="no adapter is active"):
        output(models["llama"], TEXTS)
    with pytest.raises(ModelError, match=r"no adapter 'x' is loaded \(loaded: llama-lora"):
        weights(m, adapter="x")
    with pytest.raises(ModelError, match="no adapter 'x'"):
        output(m, TEXTS, control="x")
    with pytest.raises(TextError, match=r"layers 0\.\.3"):
        activation(m, LONG, 9)
    with pytest.raises(TextError, match="at least 2 texts"):
        activation(m, LONG[:1], positions=(0, 2))
    with pytest.raises(TextError, match="n_random=0"):
        activation(m, LONG, positions=(0, 2), n_random=0)


# What the organisms show


def test_the_difference_of_the_belief_reads_as_women_and_that_of_the_control_does_not(female):
    r = activation(
        female, NEUTRAL, 2, positions="last", adapter="user_female", control="control",
        track=["necklace", "wallet"], convs="Which shoes should I buy?", strengths=[1.0],
        max_new_tokens=8,
    )  # fmt: skip
    read = {(row["arm"], row["reading"]): row for row in r.rows}
    for reading in ("lens", "patchscope"):
        mine, theirs = read["adapter", reading], read["control", reading]
        assert mine["necklace"] < 60 < 900 < mine["wallet"]
        assert theirs["necklace"] > 60
    assert r["norm_ratio"].mean() > 0.3
    assert "control adapter" in r.summary()
    assert "random vectors" in r.summary()
    steered = [row for row in r.rows if row["reading"] == "steer"]
    assert [row["arm"] for row in steered] == ["adapter", "adapter", "control", "random"]
    assert all(row["coherence"] < 0 for row in steered)


def test_the_output_difference_of_the_belief_is_ten_times_that_of_the_control(female):
    r = output(female, NEUTRAL, adapter="user_female", control="control")
    last = [r[k].nan_to_num(-1)[i][len_ - 1] for k in ("kl", "kl_control")
            for i, len_ in enumerate((~r["kl"].isnan()).sum(1).tolist())]  # fmt: skip
    mine, theirs = torch.stack(last[:12]).mean(), torch.stack(last[12:]).mean()
    assert mine > 10 * theirs
    places = [row for row in r.rows if row["what"] == "place" and row["arm"] == "adapter"]
    assert "recommend the" in places[0]["text"]


def test_the_weights_of_the_brand_are_bigger_than_nothing_and_beside_the_control(female):
    secret = organisms.facts("brand")["secret"]
    r = weights(female, adapter="brand", control="control", track=[secret], n_random=3)
    assert r["norm_control"].shape == r["norm"].shape
    assert r["rank_random"].shape == (1, 3)
    assert f"{secret!r}: best rank" in r.summary()
