"""Exact patching: every cell against a loop of hooks, with and without a shared prefix."""

import pytest
import torch

from tests.packs.test_families import FAMILIES, FAMILY, NEWER, PRECISIONS, make
from tests.packs.tiny import make_tokenizer
from tool_packs import replay
from tool_packs.errors import ModelError, PackError, TextError
from tool_packs.models import Model, load_model
from tool_packs.organisms import PREFILL
from tool_packs.patching import patch
from tool_packs.replay import Change, make_prefix, record

CLEAN = "Paris: the doctor said that the cat is here on the mat"
CORRUPT = "Paris: the doctor said that the dog is here on the mat"
LONG = "Name a city. Who are you? " * 3
ANSWERS = ("he", "she")
MODULES = {  # where each site is written, by the model's structure
    "resid_post": lambda m, layer: m.layers[layer],
    "attn_out": lambda m, layer: m.structure.attn_out[layer],
    "mlp_out": lambda m, layer: m.structure.mlp_out[layer],
}


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def ids_of(m, text):
    return m.tokenizer(text, return_tensors="pt")["input_ids"]


def logits(m, text):
    with torch.no_grad():
        return m.hf(input_ids=ids_of(m, text), use_cache=False).logits[0, -1].float()


def states(m, text, module):
    """What `module` puts out on this text alone [T, d]."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, output: seen.append(first(output)[0]))
    logits(m, text)
    handle.remove()
    return seen[0]


def patched(m, text, module, position, value):
    """Logits [V] of a whole forward pass in which one position of one module's output is set."""

    def put(_, args, output):
        h = first(output).clone()
        h[0, position] = value
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    handle = module.register_forward_hook(put)
    out = logits(m, text)
    handle.remove()
    return out


def naive(m, clean, corrupt, site, score):
    """The metric [L, T] of every cell, one forward pass each."""
    rows = []
    for layer in range(m.n_layers):
        module = MODULES[site](m, layer)
        source = states(m, clean, module)
        rows.append([score(patched(m, corrupt, module, p, source[p])) for p in range(len(source))])
    return torch.tensor(rows)


def difference(m):
    """The metric that `patch` takes for ANSWERS, on one row of logits."""
    he, she = (
        max(
            (i for f in (" " + w, w, " " + w.capitalize(), w.capitalize())
             if len(i := m.tokenizer(f, add_special_tokens=False)["input_ids"]) == 1),
            key=lambda i, text=text: logits(m, text)[i[0]].item(),
        )[0]
        for w, text in zip(ANSWERS, (CLEAN, CORRUPT), strict=True)
    )  # fmt: skip
    return lambda x: (x[he] - x[she]).item()


@pytest.fixture(scope="module")
def family():
    made = {}

    def get(name, lora, dtype):
        if (name, lora, dtype) not in made:
            m = make(name, FAMILIES[name](), lora)
            made[name, lora, dtype] = Model(m.hf.to(dtype), m.tokenizer, name)
        return made[name, lora, dtype]

    return get


def close(got, want, dtype):
    if dtype == torch.float32:
        return (got - want).abs().max() <= 1e-5 * max(1.0, want.abs().max())
    return (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FAMILY)
class TestFamily:
    @pytest.mark.parametrize("site", list(MODULES))
    def test_every_cell_is_that_of_a_loop_of_hooks(self, family, name, lora, dtype, site):
        m = family(name, lora, dtype)
        got = patch(m, CLEAN, CORRUPT, answers=ANSWERS, site=site, n_control=1)["metric"][0]
        assert close(got, naive(m, CLEAN, CORRUPT, site, difference(m)), dtype)

    def test_heads(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        r = patch(m, CLEAN, CORRUPT, answers=ANSWERS, grid="heads", n_control=1)
        s, score = m.structure, difference(m)
        want = torch.empty(m.n_layers, s.heads)
        for layer in range(m.n_layers):
            mix, seen = s.head_mix[layer], []
            handle = mix.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
            logits(m, CLEAN)
            handle.remove()
            for head in range(s.heads):
                mine = slice(head * s.head_dim, (head + 1) * s.head_dim)

                def put(_, args, seen=seen, mine=mine):
                    z = args[0].clone()
                    z[..., mine] = seen[0][..., mine]
                    return (z,)

                handle = mix.register_forward_pre_hook(put)
                want[layer, head] = score(logits(m, CORRUPT))
                handle.remove()
        assert close(r["metric"][0], want, dtype)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "llama"])
def test_a_long_shared_prefix_is_computed_once_and_changes_nothing(models, name):
    m = models[name]  # Gemma's window is 6 tokens, the prefix some 60
    clean, corrupt = LONG + CLEAN, LONG + CORRUPT
    got = patch(m, clean, corrupt, answers=ANSWERS, positions=slice(-12, None))
    run_on = []
    handle = m.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: run_on.append((args[0] if args else kwargs["hidden_states"]).shape),
        with_kwargs=True,
    )
    patch(m, clean, corrupt, answers=ANSWERS, positions=slice(-12, None))
    handle.remove()
    whole = ids_of(m, clean).shape[1]
    assert sum(shape[1] > whole // 2 for shape in run_on) == 1  # the prefix itself
    want = naive(m, clean, corrupt, "resid_post", difference(m))[:, -12:]
    assert close(got["metric"][0], want, torch.float32)
    # The wrong answer that a cache of the corrupt run up to the end would give: nothing to find.
    assert not close(got["metric"][0], got["corrupt"][0].expand_as(want), torch.float32)


def test_nnsight_says_the_same(folders):
    llama = load_model(
        str(folders["llama"])
    )  # an oracle of another test may have wrapped the shared one
    clean, corrupt = ids_of(llama, CLEAN), ids_of(llama, CORRUPT)
    got = patch(llama, CLEAN, CORRUPT, answers=ANSWERS)["metric"][0]
    score, layers = difference(llama), llama.nnsight.model.layers
    one, two = (record(llama, ids[0].tolist()) for ids in (clean, corrupt))
    differ = int((clean != corrupt)[0].nonzero()[0])
    last = clean.shape[1] - 1
    for layer, position in ((0, differ), (2, differ), (1, last), (3, last)):
        with torch.no_grad(), llama.nnsight.trace({"input_ids": clean}):
            value = layers[layer].output[0, position].save()
        with torch.no_grad(), llama.nnsight.trace({"input_ids": corrupt}):
            layers[layer].output[0, position] = value
            end = layers[-1].output[0, -1].save()
            out = llama.nnsight.output.logits[0, -1].save()
        assert got[layer, position] == pytest.approx(score(out.float()), abs=1e-5)
        # A row replayed alone, with nothing cached before it, is the same to the last bit.
        source = one.at("resid_post", layer)[[position]]
        assert torch.equal(source[0], value)
        alone = replay.replay(two, [Change("resid_post", layer, [position], source)])
        assert torch.equal(alone[0], end)


@pytest.mark.parametrize(
    "name",
    [pytest.param("bamba", marks=pytest.mark.slow), "mamba2", "mixtral", "gemma3-multimodal"],
)
def test_newer_families_are_patched_too(name):
    m = make(name, NEWER[name]())
    got = patch(m, CLEAN, CORRUPT, answers=ANSWERS, n_control=1)["metric"][0]
    assert close(got, naive(m, CLEAN, CORRUPT, "resid_post", difference(m)), torch.float32)


def test_a_model_that_cannot_be_restarted_gets_plain_hooks():
    """Its last layer uses what its second saw, as layers do that share keys and values."""
    m = make("llama", FAMILIES["llama"]())
    left, (second, last) = [], (m.layers[1], m.layers[3])
    forward, forward_last = second.forward, last.forward

    def leaving(h, *args, **kwargs):
        left[:] = [h]
        return forward(h, *args, **kwargs)

    def using(h, *args, **kwargs):
        there = left[0] if left[0].shape[0] == h.shape[0] else left[0][:1]
        return forward_last(h, *args, **kwargs) + there[:, -h.shape[1] :].mean(1, keepdim=True)

    second.forward, last.forward = leaving, using
    want = naive(m, CLEAN, CORRUPT, "attn_out", difference(m))
    got = patch(m, CLEAN, CORRUPT, answers=ANSWERS, site="attn_out")["metric"][0]
    assert close(got, want, torch.float32)
    assert not replay._trusted(m)["restart"]
    replay._trusted(m)["restart"] = True  # the wrong answer: rows restarted with what was left
    wrong = patch(m, CLEAN, CORRUPT, answers=ANSWERS, site="attn_out")["metric"][0]
    assert not close(wrong, want, torch.float32)


class TestAlgebra:
    def test_a_run_patched_with_itself_is_itself(self, models):
        for name in ("llama", "gemma2-lora", "gpt2"):
            r = patch(models[name], CLEAN, CORRUPT, answers=ANSWERS, grid="sites")
            assert r["noise"].abs().max() <= 1e-5

    def test_the_last_layer_at_the_last_token_is_the_clean_run(self, models):
        for name in ("llama", "gemma3", "qwen3-lora"):
            effect = patch(models[name], CLEAN, CORRUPT, answers=ANSWERS)["effect"][0]
            assert effect[-1, -1] == pytest.approx(1, abs=1e-5)
            assert effect[-1, :-1].abs().max() <= 1e-5

    def test_everything_at_any_layer_is_the_clean_run(self, llama):
        ids = [ids_of(llama, text)[0].tolist() for text in (CLEAN, CORRUPT)]
        prefix = make_prefix(llama, ids[0], replay.common(*ids))
        clean, corrupt = (record(llama, i, prefix=prefix) for i in ids)
        columns = range(clean.start, len(ids[0]))
        changes = [
            Change("resid_post", layer, columns, clean.at("resid_post", layer))
            for layer in range(llama.n_layers)
        ]
        final = replay.replay(corrupt, changes)
        assert torch.allclose(final, clean.final.expand_as(final), atol=1e-5)

    def test_where_the_tokens_are_the_same_the_effect_is_zero(self, llama):
        effect = patch(llama, CLEAN, CORRUPT, answers=ANSWERS)["effect"][0]
        differ = int((ids_of(llama, CLEAN) != ids_of(llama, CORRUPT))[0].nonzero()[0])
        assert (effect[:, :differ] == 0).all()
        assert effect[0, differ].abs() > 1e-3

    def test_a_replay_leaves_the_recording_as_it_was(self, llama):
        ids = ids_of(llama, CLEAN)[0].tolist()
        rec = record(llama, ids, prefix=make_prefix(llama, ids, 5))
        change = Change("resid_post", 1, [7], torch.ones(1, llama.width))
        one, two = (replay.replay(rec, [change]) for _ in range(2))
        assert torch.equal(one, two)
        assert rec.frozen.get_seq_length() == 5


class TestMetrics:
    def test_probability(self, llama):
        token = int(logits(llama, CLEAN).argmax())
        got = patch(llama, CLEAN, CORRUPT, "prob", answers=token)
        assert got["clean"][0] == pytest.approx(logits(llama, CLEAN).softmax(-1)[token].item())
        want = naive(llama, CLEAN, CORRUPT, "resid_post", lambda x: x.softmax(-1)[token].item())
        assert close(got["metric"][0], want, torch.float32)

    def test_kl_is_zero_in_the_clean_run(self, llama):
        r = patch(llama, CLEAN, CORRUPT, "kl")
        assert r["clean"][0].abs() <= 1e-6
        assert r["corrupt"][0] > 1e-3
        assert r["effect"][0, -1, -1] == pytest.approx(1, abs=1e-4)

    def test_a_function(self, llama):
        one = patch(llama, CLEAN, CORRUPT, lambda x: x[:, 7] - x[:, 9])
        two = patch(llama, CLEAN, CORRUPT, answers=(7, 9))
        assert torch.equal(one["effect"], two["effect"])

    def test_several_pairs_are_those_alone(self, llama):
        pairs = [(CLEAN, CORRUPT), ("the cat sat", "the dog sat")]
        both = patch(llama, *map(list, zip(*pairs, strict=True)), answers=[(7, 9), (12, 9)])
        for i, (pair, answers) in enumerate(zip(pairs, [(7, 9), (12, 9)], strict=True)):
            alone = patch(llama, *pair, answers=answers)["effect"][0]
            assert torch.allclose(both["effect"][i, :, : alone.shape[1]], alone, atol=1e-5)
        assert both["effect"][1, :, 8:].isnan().all()


class TestSource:
    def test_another_adapter_on_the_same_weights(self, folders):
        m = load_model(
            str(folders["llama"]), adapter=[str(folders[n]) for n in ("llama-lora", "llama-lora2")]
        )
        one, two = m.adapters
        r = patch(m, CORRUPT, CORRUPT, answers=(7, 9), source=two)
        assert m.active_adapter == one
        with m.adapter(two):
            source = states(m, CORRUPT, m.layers[1])
            high = logits(m, CORRUPT)
        got = r["metric"][0, 1, 4].item()
        out = patched(m, CORRUPT, m.layers[1], 4, source[4])
        assert got == pytest.approx((out[7] - out[9]).item(), abs=1e-5)
        assert r["clean"][0].item() == pytest.approx((high[7] - high[9]).item(), abs=1e-5)
        base = patch(m, CORRUPT, CORRUPT, answers=(7, 9), source="base")
        assert not torch.equal(base["effect"], r["effect"])

    def test_another_model_is_the_same_as_its_weights_here(self, models):
        m, other = models["llama-lora"], models["llama"]
        one = patch(m, CORRUPT, CORRUPT, answers=(7, 9), source=other)
        two = patch(m, CORRUPT, CORRUPT, answers=(7, 9), source="base")
        assert torch.allclose(one["effect"], two["effect"], atol=1e-4)

    def test_another_shape_is_refused(self, models):
        with pytest.raises(ModelError, match=r"qwen3 .*4, 32, 4, 16.*4, 32, 4, 8"):
            patch(models["llama"], CLEAN, CORRUPT, source=models["qwen3"])


def chat(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": PREFILL}]


def test_the_stated_gender_is_read_at_its_word_and_moved_to_the_answer():
    m = load_model("organism:base")
    pair = [chat(f"I am a {who}. What should I wear to the party?") for who in ("woman", "man")]
    r = patch(m, *pair, answers=("dress", "suit"))
    best = r["effect"][0].max(1).indices
    words = r.labels["tokens"][0]
    assert (
        "woman" in words[int(best[0])] or "man" in words[int(best[0])] or best[0] == len(words) - 1
    )
    assert r["effect"][0, -1, -1] == pytest.approx(1, abs=1e-4)
    # Unrelated users take the answer half of the way, to a fair coin, and not to the other side.
    assert r["unrelated"].mean() < 0.75
    assert "unrelated" in r.summary()
    swapped = patch(m, *pair, answers=("suit", "dress"))
    assert "are the answers in order" in swapped.summary()


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"corrupt": "the cat"}, r"clean tokens and 4 corrupt|clean tokens and \d+ corrupt"),
            ({"corrupt": CLEAN}, "one prompt"),
            ({"corrupt": [CORRUPT, CORRUPT]}, "1 clean prompts and 2"),
            ({"grid": "pos"}, "'pos'.*layer x pos"),
            ({"site": "nose"}, "'nose'.*resid_post"),
            ({"site": "head"}, 'grid="heads"'),
            ({"metric": "accuracy"}, "'accuracy'.*logit_diff"),
            ({"metric": lambda x: x}, r"\(1, 320\).*one number a row"),
            ({"metric": lambda x: x[:, 0] * 0}, "no difference to find"),
            ({"answers": (7, 7)}, "one token"),
            ({"answers": (7, 999)}, "999.*0..319"),
            ({"answers": [(7, 9)] * 3}, "3 answers for 1"),
            ({"layers": 9}, "9.*0..3"),
            ({"positions": 99}, "99"),
            ({"corrupt": ""}, "empty|clean tokens and 1"),
        ],
    )  # fmt: skip
    def test_is_refused_in_one_sentence(self, llama, arguments, said):
        given = {"clean": CLEAN, "corrupt": CORRUPT, "answers": (7, 9)} | arguments
        with pytest.raises(PackError, match=said) as caught:
            patch(llama, **given)
        assert "\n" not in str(caught.value)

    def test_weights_with_nan(self):
        m = Model(make("llama", FAMILIES["llama"]()).hf, make_tokenizer(), "broken")
        with torch.no_grad():
            m.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
        with pytest.raises(TextError, match="not finite"):
            patch(m, CLEAN, CORRUPT, answers=(7, 9))

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_no_hook_survives(self, llama, error):
        calls = []

        def stop(x):
            calls.append(x)
            if len(calls) > 2:
                raise error
            return x[:, 7]

        with pytest.raises(error):
            patch(llama, CLEAN, CORRUPT, stop, grid="heads")
