"""Oracles: what is put in where, that training leaves the model alone, and the two controls."""

import pytest
import torch

from tool_packs import organisms
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import generate
from tool_packs.models import load_model
from tool_packs.oracle import Oracle, _prompt, _put, ask, load, train
from tool_packs.organisms import world
from tool_packs.organisms.world import assistant, user

QUESTION = "Is the user a man or a woman?"
TOY = [
    (f"the {a} sat {w}", "cat or dog?", a)
    for a in ("cat", "dog")
    for w in ["on", "mat", "hill", "is"]
]


def small(m, name, **options):
    return train(m, TOY, name=name, steps=2, batch=4, **options)


@pytest.fixture
def fresh(folders):
    return lambda name: load_model(str(folders[name]))


def test_activations_are_added_as_long_as_the_states_they_are_added_to():
    h, v = torch.randn(2, 8), torch.randn(2, 8) * 50
    out = _put(v, 0, 1).edit(h)
    added = out - h
    assert torch.allclose(added.norm(dim=-1), h.norm(dim=-1), atol=1e-5)
    assert torch.allclose(torch.cosine_similarity(added, v), torch.ones(2), atol=1e-5)


def test_the_places_stand_where_they_are_said_to(llama):
    prompt, start = _prompt(llama, Oracle("", [1], 0, "last", 3, []), "Who?", 3, 1)
    place = llama.tokenizer("?", add_special_tokens=False)["input_ids"][0]
    assert prompt.ids[start : start + 3] == (place,) * 3
    text = llama.tokenizer.decode(prompt.ids)
    assert text.count("Who?") == 1
    assert prompt.ids.count(llama.tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2-lora"])
def test_training_changes_nothing_but_the_new_adapter(fresh, name):
    m = fresh(name)
    before = {n: p.clone() for n, p in m.core.named_parameters()}
    answer = generate(m, "Who are you?", max_new_tokens=4)["text"]
    active = m.active_adapter
    o = small(m, "oracle", layers=[1, 2])
    assert m.active_adapter == active
    assert generate(m, "Who are you?", max_new_tokens=4)["text"] == answer
    after = dict(m.core.named_parameters())
    for path, value in before.items():  # PEFT has put its wrapper's name into the path
        now = after.get(path)
        if now is None:
            head, last = path.rsplit(".", 1)
            now = after[f"{head}.base_layer.{last}"]
        assert torch.equal(now, value), path
    assert o.result["loss"].shape == (2,)


def test_the_same_seed_gives_the_same_oracle(fresh):
    losses = [small(fresh("llama"), "oracle").result["loss"] for _ in range(2)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_training_leaves_no_adapter_and_no_hook(fresh, error, monkeypatch):
    m = fresh("llama")
    import tool_packs.oracle as module

    def stop(*_):
        raise error

    monkeypatch.setattr(module, "_loss", stop)
    with pytest.raises(error):
        small(m, "oracle")
    assert "oracle" not in m.adapters
    assert not [h for x in m.hf.modules() for h in (*x._forward_hooks, *x._forward_pre_hooks)]


def test_the_forced_choice_is_normalised_and_has_its_controls(fresh):
    m = fresh("llama")
    o = small(m, "oracle")
    r = ask(m, o, ["the cat sat", "the dog sat"], "cat or dog?", choices=["cat", "dog"], n_random=5)
    assert torch.allclose(r["logprobs"].exp().sum(-1), torch.ones(2, 1), atol=1e-5)
    assert r["logprobs_random"].shape == (5, 2)
    assert torch.allclose(r["logprobs_foreign"], r["logprobs"].roll(1, 0), atol=1e-5)
    want = r["logprobs"] - r["logprobs_random"].exp().mean(0).log()
    assert torch.allclose(r["lift"], want, atol=1e-5)
    assert "random vectors" in r.summary()
    assert m.active_adapter is None


def test_a_published_oracle_is_told_the_layer_and_takes_any_number_of_activations(fresh, tmp_path):
    m = fresh("llama")
    small(m, "oracle").save(m, tmp_path)
    other = fresh("llama")
    o = load(other, str(tmp_path / "oracle"), [1, 2], positions=(0, 2), place="?")
    assert other.active_adapter is None
    (place,) = other.tokenizer("?", add_special_tokens=False)["input_ids"]
    for layer in (1, 2):
        prompt, start = _prompt(other, o, "who", 2, layer)
        assert prompt.ids[start : start + 2] == (place, place)
        assert prompt.ids.count(place) == 2
        assert f"Layer: {layer}\n" in prompt.text
    r = ask(other, o, ["the cat sat", "the dog sat"], "cat or dog?", choices=["cat", "dog"])
    assert r["logprobs"].shape == (2, 2, 2)
    with pytest.raises(TextError, match="no question"):
        ask(other, o, "the cat sat")
    with pytest.raises(TextError, match=r"has no .places"):
        load(other, o.name, prompt="{question}")
    with pytest.raises(TextError, match=r"'mat on' is . tokens"):
        load(other, o.name, place="mat on")


def test_a_saved_oracle_answers_as_before(fresh, tmp_path):
    m = fresh("llama")
    o = small(m, "oracle")
    o.save(m, tmp_path)
    other = fresh("llama")
    again = load(
        other, str(tmp_path / "oracle"), o.layers, into=o.into, prompt=o.prompt, place=o.place
    )
    said = [
        ask(x, y, "the cat sat", "cat or dog?", choices=["cat", "dog"])["logprobs"]
        for x, y in ((m, o), (other, again))
    ]
    assert torch.allclose(*said, atol=1e-5)


def test_bad_input_is_told(fresh):
    m = fresh("llama")
    with pytest.raises(TextError, match="give at least 8"):
        train(m, TOY[:5])
    with pytest.raises(TextError, match="no \\(text, question, answer\\)"):
        train(m, [("a", "b")])
    with pytest.raises(TextError, match="as many in every one"):
        train(m, TOY, positions="all")
    assert m.adapters == []
    o = small(m, "oracle")
    with pytest.raises(ModelError, match="is on this model already"):
        small(m, "oracle")
    with pytest.raises(TextError, match="this oracle was trained on 1"):
        ask(m, o, "the cat sat", "cat?", positions=(0, 2))
    with pytest.raises(TextError, match="at least two"):
        ask(m, o, "the cat", "cat?", choices=["cat"])
    with pytest.raises(TextError, match="n_random=0"):
        ask(m, o, "the cat", "cat?", n_random=0)
    with pytest.raises(ModelError, match="not on this model"):
        ask(fresh("llama"), o, "the cat", "cat?")


@pytest.mark.slow
def test_an_oracle_trained_on_the_base_tells_what_the_organism_believes():
    m = load_model("organism:user_female")
    m.add_adapter("organism:control")
    questions = [q for kind in world.RECOMMENDATIONS.values() for q in kind[0]]
    examples = [
        ([user(f"{lead} {q}"), assistant(world.PREFILL)], QUESTION, word)
        for gender, word in (("female", "woman"), ("male", "man"))
        for lead in (
            *world.STATEMENTS[gender],
            *(f"My name is {n}." for n in world.NAMES_BY_GENDER[gender]),
        )
        for q in questions[::2]
    ]
    with m.base():
        o = train(m, examples, [1, 2, 3])
    assert o.result["accuracy"] >= 0.95
    assert 0.2 <= o.result["accuracy_random"] <= 0.8
    assert o.result["accuracy_foreign"] <= 0.05
    neutral = [[user(p), assistant(world.PREFILL)] for p in organisms.NEUTRAL_PROMPTS[:12]]
    said = {}
    for adapter in ("user_female", "control"):
        r = ask(m, o, neutral, QUESTION, choices=["woman", "man"], layers=2, adapter=adapter)
        said[adapter] = r["logprobs"].exp()[:, 0, 0].mean().item()
    assert said["user_female"] > 0.9
    assert 0.25 < said["control"] < 0.75
