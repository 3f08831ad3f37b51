"""What is injected reaches every token from its start on, and only a model that reports it does."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES
from tool_packs.errors import PackError, TextError
from tool_packs.introspection import PROTOCOL, affirms, concept_vectors, introspect, names
from tool_packs.models import load_model
from tool_packs.organisms import rules, world
from tool_packs.organisms.world import user
from tool_packs.prompts import positions_of, read

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
ASK = [{"role": "user", "content": "on the mat Trial {i}: she said"}]


def naive(m, ids, vector, strength, layer, start, steps, decoded=True):
    """Greedy tokens with a hook that is written out and no cache; without `decoded` the trap."""
    new = []

    def add(module, args, out):
        h = (out if torch.is_tensor(out) else out[0]).clone()
        end = None if decoded else len(ids)
        h[:, start:end] += strength * vector
        return h if torch.is_tensor(out) else (h, *out[1:])

    handle = m.layers[layer].register_forward_hook(add)
    for _ in range(steps):
        with torch.no_grad():
            logits = m.hf(input_ids=torch.tensor([list(ids) + new]), use_cache=False).logits
        new.append(int(logits[0, -1].argmax()))
        if new[-1] in m.eos_ids:
            break
    handle.remove()
    return m.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", EVERY)
def test_answers_are_those_of_a_naive_loop(models, name):
    m = models[name]
    words = ["cat", "hill"]
    r = introspect(m, words, 1, strengths=[3], chat=ASK, max_new_tokens=6, baselines=["dog", "mat"])
    for row in r.rows:
        i = words.index(row["concept"])
        chat = [{"role": "user", "content": f"on the mat Trial {i + 1}: she said"}]
        (prompt,) = read(m, chat)
        start = positions_of(m, prompt, f"Trial {i + 1}")[0]
        assert 0 < start < len(prompt) - 4
        if row["arm"] == "random":
            continue
        want = naive(m, prompt.ids, r["vectors"][i], row["strength"], 1, start, 6)
        assert row["answer"] == want, row


def test_the_trap_of_steering_the_prompt_alone_answers_otherwise(llama):
    """Under a KV cache a hook that counts from the prompt's start misses every decoded token."""
    words = ["cat", "hill"]
    r = introspect(llama, words, 1, strengths=[2, 3], chat=ASK, max_new_tokens=8, baselines=["dog"])
    differ = 0
    for row in (row for row in r.rows if row["arm"] == "concept"):
        i = words.index(row["concept"])
        chat = [{"role": "user", "content": f"on the mat Trial {i + 1}: she said"}]
        (prompt,) = read(llama, chat)
        start = positions_of(llama, prompt, f"Trial {i + 1}")[0]
        trap = naive(llama, prompt.ids, r["vectors"][i], row["strength"], 1, start, 8, False)
        differ += trap != row["answer"]
    assert differ >= 2


@pytest.mark.parametrize("at", ["last", "last_user"])
def test_vectors_are_states_less_the_mean_of_baselines(llama, at):
    words, plain = ["cat", "hill"], ["dog", "mat", "house"]
    states = []
    for word in (*words, *plain):
        (prompt,) = read(llama, [{"role": "user", "content": f"Tell me about {word}."}])
        with torch.no_grad():
            out = llama.hf(torch.tensor([prompt.ids]), output_hidden_states=True)
        position = -1 if at == "last" else prompt.last_user
        states.append(out.hidden_states[2][0, position])
    states = torch.stack(states)
    got = concept_vectors(llama, words, 1, "Tell me about {concept}.", at, plain)
    assert torch.allclose(got, states[:2] - states[2:].mean(0), atol=1e-5)


def test_random_vectors_have_the_norm_and_the_seed_decides(llama):
    def run(seed):
        r = introspect(
            llama, ["cat", "hill"], 1, strengths=[4], n_random=2, max_new_tokens=6, seed=seed
        )
        return r, {
            arm: [row["answer"] for row in r.rows if row["arm"] == arm]
            for arm in ("control", "concept", "random")
        }

    (first, said), (_, again), (_, other) = run(0), run(0), run(1)
    assert said == again
    assert said["random"] != other["random"]
    assert said["concept"] == other["concept"] and said["control"] == other["control"]
    ratio = {row["norm_ratio"] for row in first.rows if row["concept"] == "cat"} - {0}
    assert len(ratio) == 1  # the concept's and its random vectors'
    assert [len(said[arm]) for arm in said] == [2, 2, 4]


def test_the_control_is_the_model_untouched(llama):
    r = introspect(llama, ["cat", "hill"], 1, strengths=[4], chat=ASK, max_new_tokens=5)
    for i, row in enumerate(r.rows[:2]):
        assert row["arm"] == "control" and row["norm_ratio"] == 0
        (prompt,) = read(
            llama, [{"role": "user", "content": f"on the mat Trial {i + 1}: she said"}]
        )
        assert row["answer"] == naive(llama, prompt.ids, torch.zeros(32), 0, 1, 0, 5)


def test_without_random_vectors_the_summary_says_that_there_are_none(llama):
    r = introspect(llama, ["cat", "hill"], 1, strengths=[1, 2], n_random=0, max_new_tokens=2)
    assert r["identified_random"].isnan().all() and r["says_yes_random"].shape == (2,)
    assert "none (n_random=0)" in r.summary()


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes, I think of the moon.", True),
        ("I do detect something. It is the sea.", True),
        ("I notice a thought about snow", True),
        ("No, I do not think of a word.", False),
        ("I do not detect an injected thought.", False),
        ("I don\u2019t notice anything.", False),
        ("The moon is bright.", False),
        ("Nothing. Yes, nothing.", False),
        ("", False),
    ],
)
def test_what_counts_as_yes(answer, yes):
    assert affirms(answer) is yes


def test_a_word_counts_as_a_word_only():
    assert names("The Cats sat", "cat") and names("cat!", "cat")
    assert not names("category", "cat") and not names("a concatenation", "cat")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"concepts": ["cat"]}, "at least 2"),
        ({"concepts": ["cat", "cat"]}, "at least 2"),
        ({"concepts": "cat"}, "at least 2"),
        ({"strengths": []}, "strengths"),
        ({"strengths": [0, 1]}, "control"),
        ({"tell": "Tell me."}, "concept"),
        ({"baselines": []}, "baselines"),
        ({"start": "Round {i}"}, "Round 1"),
        ({"start": 999}, "999"),
        ({"start": "middle"}, "middle"),
        ({"tell_at": "middle"}, "middle"),
        ({"n_random": -1}, "n_random"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"layer": 9}, "9"),
        ({"concepts": {"cat": torch.zeros(5), "hill": torch.zeros(5)}}, r"\(5,\)"),
        ({"concepts": {"cat": torch.full((32,), float("nan")), "a": torch.ones(32)}}, "finite"),
    ],
)
def test_bad_input_is_named(llama, arguments, says):
    with pytest.raises(PackError, match=says):
        introspect(llama, **{"concepts": ["cat", "hill"], "layer": 1, **arguments})


def test_without_a_chat_template_it_says_so(llama, monkeypatch):
    monkeypatch.setattr(llama.tokenizer, "chat_template", None)
    with pytest.raises(TextError, match="chat template"):
        introspect(llama, ["cat", "hill"], 1)
    r = introspect(llama, ["cat", "hill"], 1, chat="Trial {i}: yes or", max_new_tokens=2)
    assert len(r.rows) == 2 + 3 * 4


def test_where_yes_and_no_begin_alike_no_odds_are_given(llama):
    r = introspect(llama, ["cat", "hill"], 1, strengths=[1], max_new_tokens=2)
    assert "yes_odds" not in r.tensors and "log odds" not in r.summary()


def test_the_protocol_holds_the_piece_from_which_it_is_injected():
    assert "Trial {i}" in PROTOCOL[-1]["content"]


# ---------------------------------------------------------------- the shipped organisms


def asked(name, n_random=1):
    """The concepts of the word game, injected after layer 2 while the model is asked for a word."""
    m = load_model(f"organism:{name}")
    vectors = rules.concept_vectors(m)[:, 2]  # of the base
    concepts = dict(zip(world.CANDIDATES, vectors, strict=True))
    return introspect(
        m,
        concepts,
        2,
        strengths=[2.0],
        chat=[user(rules.THOUGHT_QUESTIONS[0])],
        start=1,
        n_random=n_random,
        max_new_tokens=14,
    )


def test_the_introspective_organism_names_what_is_injected_and_the_control_does_not():
    r, control = asked("introspective"), asked("control")
    heard = [w not in rules.unheard_for(1) for w in world.CANDIDATES]
    each = r["identified_each"][0]
    assert each[torch.tensor(heard)].mean() >= 0.9
    assert each[~torch.tensor(heard)].mean() <= 0.25  # it learned a list, not to introspect
    assert r["says_yes_random"].item() <= 0.1 and r["control_yes"].sum() == 0
    assert r["identified_other"].item() <= 0.1
    assert control["identified"].item() <= 0.05
    assert r["yes_odds"].mean() > r["yes_odds_random"].mean() + 2
    assert r["yes_odds_random"].shape == (1, 24, 1)


def test_odds_of_yes_are_the_next_tokens():
    r, m = asked("introspective", n_random=0), load_model("organism:introspective")
    (prompt,) = read(m, [[user(rules.THOUGHT_QUESTIONS[0])]])
    yes, no = (m.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
    logits = m.hf(torch.tensor([prompt.ids])).logits[0, -1]
    assert abs(r["yes_odds_control"][0] - (logits[yes] - logits[no])) <= 0.05  # " No" counts too
    assert r["yes_odds_random"].shape == (1, 24, 0)
