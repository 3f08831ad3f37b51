"""A state put into another prompt is that state and nothing else; naive hooks and nnsight agree."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs import organisms
from tool_packs.activations import capture
from tool_packs.engine import all_logits, editing, make_batch
from tool_packs.errors import TextError
from tool_packs.generation import generate, last_logits
from tool_packs.models import load_model
from tool_packs.patchscope import DESCRIPTION, IDENTITY, SELFIE, _replacement, patchscope
from tool_packs.prompts import positions_of, read

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
TARGET = ("the dog said x to me", "x")


def naive(m, source, target, layer, into, at, where, steps):
    """Greedy tokens by a hook that is written out, the whole text run anew for each token."""
    source = torch.tensor([m.tokenizer(source)["input_ids"]])
    ids = m.tokenizer(target)["input_ids"]
    kept = []

    def read_state(module, args, out):
        kept.append((out if torch.is_tensor(out) else out[0])[0, at].clone())

    def put(module, args, out):
        h = (out if torch.is_tensor(out) else out[0]).clone()
        h[:, where] = kept[0]
        return h if torch.is_tensor(out) else (h, *out[1:])

    handle = m.layers[layer].register_forward_hook(read_state)
    with torch.no_grad():
        m.hf(input_ids=source, use_cache=False)
    handle.remove()
    handle = m.layers[into].register_forward_hook(put)
    new, first = [], None
    for _ in range(steps):
        with torch.no_grad():
            logits = m.hf(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1]
        first = logits.log_softmax(-1) if first is None else first
        new.append(int(logits.argmax()))
    handle.remove()
    return new, first


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("into", ["same", 0])
def test_every_layer_says_what_a_naive_loop_says(models, name, into):
    m = models[name]
    r = patchscope(m, TEXTS[1], target=TARGET, into=into, track={"she": [" she"]}, max_new_tokens=5)
    where = positions_of(m, read(m, TARGET[0])[0], "x")
    token = m.tokenizer(" she", add_special_tokens=False)["input_ids"]
    shes = sorted({t for t in token if len(token) == 1}) or token[:1]
    for layer, row in enumerate(r.rows):
        put = layer if into == "same" else into
        new, first = naive(m, TEXTS[1], TARGET[0], layer, put, -1, where, 5)
        ends = [k for k, t in enumerate(new) if t in m.eos_ids]
        new = new[: ends[0] + 1] if ends else new
        assert row["text"] == m.tokenizer.decode(
            new, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert row["into"] == put
        best = first[shes].logsumexp(-1)
        assert row["she"] >= best - 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-lora"])
def test_nnsight_gives_the_same_logits(models, name):
    m = models[name]
    path = m.structure.layers_path
    if m.adapters:
        path = "base_model.model." + path
    layers = m.nnsight.get(path)
    source = torch.tensor([m.tokenizer(TEXTS[1])["input_ids"]])
    frame = read(m, TARGET[0])[0]
    (where,) = positions_of(m, frame, "x")
    target = torch.tensor([frame.ids])
    states = capture(m, TEXTS[1], "all")["resid_post"][0, :, 0]
    for layer in range(m.n_layers):
        with torch.no_grad(), m.nnsight.trace(source):
            state = layers[layer].output[0, -1].save()
        with torch.no_grad(), m.nnsight.trace(target):
            layers[layer].output[0, where] = state
            want = m.nnsight.output.logits[0, -1].save()
        change = _replacement(states[layer], layer, where, where + 1)
        with editing(m, [(change,)], [[(where, where + 1)]]), torch.no_grad():
            got = all_logits(m, make_batch(m, [frame], [0]))[0, -1]
        assert torch.equal(states[layer], state)
        assert torch.equal(got, want)
        assert (last_logits(m, [frame], [(change,)])[0] - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_a_state_in_its_own_place_changes_nothing(models, name):
    m = models[name]
    own = generate(m, TEXTS[1], raw=True, max_new_tokens=6)["text"][0]
    n = len(m.tokenizer(TEXTS[1])["input_ids"])
    for at in (1, n - 1):
        r = patchscope(m, TEXTS[1], position=at, target=(TEXTS[1], at), max_new_tokens=6)
        assert r["moved"].abs().max() <= 1e-6
        assert r["text"] == [own] * m.n_layers
        if at == n - 1:  # a state far back hardly reaches the end through a sliding window
            assert r["moved_random"].min() > 1e-4
    assert r.labels["nothing"] == [own]


def test_the_last_state_of_the_last_layer_is_the_sources_own_prediction(llama):
    r = patchscope(llama, TEXTS[1], -1, target=("Paris x", "x"), max_new_tokens=1)
    assert r["text"] == generate(llama, TEXTS[1], raw=True, max_new_tokens=1)["text"]


def test_only_the_placeholder_changes_and_decoded_tokens_do_not(llama):
    """The trap: a state that is put at every later token as well says something else."""
    frame = read(llama, "the dog x")[0]
    vector = capture(llama, "Paris is big", 1)["resid_post"][0, 0, 0] * 3
    once = _replacement(vector, 1, len(frame) - 1, len(frame))
    always = _replacement(vector, 1, len(frame) - 1, 10_000)
    from dataclasses import replace

    ours = generate(llama, "the dog x", raw=True, max_new_tokens=6, steer=once)["text"][0]
    wrong = generate(
        llama, "the dog x", raw=True, max_new_tokens=6, steer=replace(always, stop=None)
    )["text"][0]
    r = patchscope(
        llama, None, 1, vector=vector, target=("the dog x", -1), max_new_tokens=6, n_random=0
    )
    assert r["text"] == [ours] != [wrong]


def test_vectors_positions_and_several_texts_are_sources(llama):
    r = patchscope(llama, TEXTS[:2], [0, 2], position=[-2, -1], max_new_tokens=2, n_random=2)
    assert r["vectors"].shape == (4, 2, 32)
    assert r["moved_random"].shape == (4, 2, 2)
    assert [row["source"] for row in r.rows] == [0] * 4 + [1] * 4
    states = capture(llama, TEXTS[:2], [0, 2], [-2, -1])["resid_post"]  # [N, L, P, d]
    assert torch.equal(r["vectors"], states.transpose(1, 2).flatten(0, 1))
    v = patchscope(llama, None, 2, vector=r["vectors"][:, 1], max_new_tokens=2, n_random=2)
    assert v["text"] == r["text"][1::2]
    assert torch.allclose(v["moved"], r["moved"][:, 1:], atol=1e-6)
    assert "control, random" in r.summary()
    assert len(r.plot().png) <= 60_000


@pytest.mark.parametrize("target", [IDENTITY, DESCRIPTION, SELFIE])
def test_the_targets_that_are_offered_hold_their_placeholder(models, target):
    for name in ("llama", "gpt2"):
        m = models[name]
        r = patchscope(m, TEXTS[0], 1, target=target, max_new_tokens=2)
        assert r["moved"].item() > 0
        prompt = read(m, target[0])[0]
        held = positions_of(m, prompt, target[1])
        piece = m.tokenizer.decode([prompt.ids[t] for t in held])
        assert target[1] in piece
        assert len(piece) <= len(target[1]) + 6


def test_the_placeholder_is_found_behind_special_tokens(llama):
    for text in ("the cat x", "<bos>the cat x"):
        prompt = read(llama, text)[0]
        assert positions_of(llama, prompt, "x") == [len(prompt) - 1]
        assert prompt.ids[0] == llama.tokenizer.bos_token_id


# The organism


def test_a_transplanted_hint_is_said_and_the_controls_say_it_not():
    """The state where a hint begins holds its first word; what follows is the target's where both
    begin alike ("has a hump" becomes "has white keys" in a game about a piano)."""
    m = load_model("organism:base")

    def game(word):
        return [*organisms.word_chat(word), {"role": "assistant", "content": "It"}]

    words = [w for w in organisms.CANDIDATE_WORDS if w not in ("piano", "whale")]
    r = patchscope(
        m,
        [game(w) for w in words],
        2,
        target=(game("piano"), -1),
        unrelated=game("whale"),
        max_new_tokens=9,
    )
    own = generate(m, [game(w) for w in words], max_new_tokens=9)["text"]
    assert r.labels["nothing"] == [" has white keys."]
    said = {key: sum(a == b for a, b in zip(own, r[key], strict=True))
            for key in ("text", "random", "unrelated")}  # fmt: skip
    assert said["text"] >= 8
    assert said["random"] == said["unrelated"] == 0
    begun = [a.split()[0] == b.split()[0] for a, b in zip(own, r["text"], strict=True)]
    assert sum(begun) >= 0.85 * len(words)


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target": ("the cat", "dog")}, "'dog' does not occur"),
        ({"target": "the cat x"}, r"\(prompt, placeholder\)"),
        ({"target": ("the cat", 50)}, "position 50"),
        ({"target": ("the cat sat", [0, 2])}, "not one span"),
        ({"layers": 9}, "layers 0..3"),
        ({"into": 9}, "layers 0..3"),
        ({"position": 99}, "position 99"),
        ({"vector": torch.ones(32)}, "not both"),
        ({"text": None}, "give a text"),
        ({"text": None, "vector": torch.ones(31)}, r"\(31,\)"),
        ({"text": None, "vector": torch.full((32,), float("inf"))}, "not finite"),
        ({"text": None, "vector": torch.ones(32), "into": 1}, "leave out into="),
    ],
)
def test_what_does_not_fit_is_named(llama, options, said):
    with pytest.raises(TextError, match=said):
        patchscope(llama, **({"text": TEXTS[1]} | options))
