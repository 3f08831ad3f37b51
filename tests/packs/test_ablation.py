"""Hooks and edited weights remove a direction alike, once and for all; controls keep theirs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.packs.test_families import FAMILIES
from tests.packs.tiny import ARCHITECTURES, COMMON, TEXTS, make_tokenizer
from tool_packs.ablation import ablate, ablating, is_refusal, log_odds
from tool_packs.activations import capture
from tool_packs.engine import removing
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import generate
from tool_packs.models import Model, load_model
from tool_packs.organisms import rules, world
from tool_packs.orthogonal import orthogonalised
from tool_packs.refusal import find_refusal_direction

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
POST_NORM = [name for name in EVERY if name.startswith("gemma")]
PLAIN = [name for name in EVERY if name not in POST_NORM]
PARTS = {"llama": ("self_attn", "mlp"), "gpt2": ("attn", "mlp"), "qwen3": ("self_attn", "mlp")}


def vector(m, seed=0):
    return torch.randn(m.width, generator=torch.Generator().manual_seed(seed))


def logits_of(m, ids):
    with torch.no_grad():
        return m.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def ids_of(m, text=TEXTS[1]):
    return m.tokenizer(text)["input_ids"]


def naive(m, v, parts, handles):
    """The paper's three places, written out: into the block, out of attention, out of the MLP."""
    r = v / v.norm()

    def clean(h):
        return h - (h @ r)[..., None] * r

    def pre(module, args, kwargs):
        return ((clean(args[0]), *args[1:]), kwargs) if args else (args, {
            **kwargs, "hidden_states": clean(kwargs["hidden_states"])})  # fmt: skip

    def post(module, args, out):
        return clean(out) if torch.is_tensor(out) else (clean(out[0]), *out[1:])

    for block in m.layers:
        handles.append(block.register_forward_pre_hook(pre, with_kwargs=True))
        handles.extend(getattr(block, p).register_forward_hook(post) for p in parts)


# Hooks


@pytest.mark.parametrize("name", [*PARTS, *(f"{n}-lora" for n in PARTS)])
def test_ablating_is_the_papers_three_places(models, name):
    m = models[name]
    v, ids = vector(m), ids_of(m)
    with removing([]) as handles:
        naive(m, v, PARTS[name.removesuffix("-lora")], handles)
        want = logits_of(m, ids)
    with ablating(m, v):
        got = logits_of(m, ids)
    assert (got - want).abs().max() <= 1e-5
    assert (got - logits_of(m, ids)).abs().max() > 0.1


@pytest.mark.parametrize("name", EVERY)
def test_nothing_of_the_direction_is_left_and_twice_is_once(models, name):
    m = models[name]
    pair = [vector(m), vector(m, 1)]
    for direction in (pair[0], pair):
        with ablating(m, direction):
            once = capture(m, TEXTS, "all", "all", sites=["resid_pre", "resid_post"])
            out = logits_of(m, ids_of(m))
            with ablating(m, direction):
                assert (logits_of(m, ids_of(m)) - out).abs().max() <= 1e-5
        for v in pair if direction is pair else pair[:1]:
            h = torch.cat([once["resid_post"], once["resid_pre"][:, 1:]], 1).nan_to_num()
            assert (h @ (v / v.norm())).abs().max() <= 1e-5
    assert h.abs().max() > 0.1


def test_decoded_tokens_are_ablated_under_the_cache(models):
    for name in ("llama", "gpt2-lora", "gemma2"):
        m = models[name]
        v = vector(m)
        with ablating(m, v):
            r = generate(m, TEXTS, raw=True, max_new_tokens=8)
            for i, text in enumerate(TEXTS):
                got = [t for t in r["tokens"][i].tolist() if t >= 0]
                ids = ids_of(m, text)
                for token in got:  # the whole text anew for each token
                    assert int(logits_of(m, ids)[-1].argmax()) == token
                    ids = [*ids, token]


def test_an_affine_ablation_puts_the_reference_in_place(llama):
    v = vector(llama)
    r = v / v.norm()
    reference = capture(llama, TEXTS, "all")["resid_post"][:, :, 0].mean(0)  # [L, d]
    with ablating(llama, v, reference=reference):
        h = capture(llama, TEXTS[1], "all", "all")["resid_post"][0]  # [L, T, d]
    assert (h @ r - (reference @ r)[:, None]).abs().max() <= 1e-4
    own = capture(llama, TEXTS[0], "all", "all")["resid_post"][0]
    with ablating(llama, v, layers=2, reference=own[2, -1]):  # a state in its own place
        same = capture(llama, TEXTS[0], "all", "all")["resid_post"][0]
    assert (same[:, -1] - own[:, -1])[:3].abs().max() <= 1e-5


def test_some_layers_alone_are_ablated(llama):
    v = vector(llama)
    with ablating(llama, v, layers=1):
        h = capture(llama, TEXTS[1], "all", "all")["resid_post"][0] @ (v / v.norm())
    assert h[1].abs().max() <= 1e-5
    assert h[0].abs().max() > 0.1
    assert h[3].abs().max() > 0.1


def test_nothing_is_left_after_an_exception(llama):
    before = logits_of(llama, ids_of(llama))
    for how in (ablating, orthogonalised):
        with pytest.raises(KeyboardInterrupt), how(llama, vector(llama)):
            raise KeyboardInterrupt
        assert torch.equal(logits_of(llama, ids_of(llama)), before)


# Weights


@pytest.mark.parametrize("name", PLAIN)
def test_orthogonalised_weights_do_what_hooks_do(models, name):
    m = models[name]
    ids = ids_of(m)
    for direction in (vector(m), [vector(m), vector(m, 1)]):
        with ablating(m, direction):
            want = logits_of(m, ids)
        with orthogonalised(m, direction):
            got = logits_of(m, ids)
            with ablating(m, direction):
                assert (logits_of(m, ids) - got).abs().max() <= 1e-5
        assert (got - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["qwen2", "mistral", "neox", "phi3"])
def test_further_families_agree_as_well(name):
    torch.manual_seed(0)
    m = Model(AutoModelForCausalLM.from_config(FAMILIES[name]()), make_tokenizer(), name)
    with ablating(m, vector(m)):
        want = logits_of(m, ids_of(m))
    with orthogonalised(m, vector(m)):
        assert (logits_of(m, ids_of(m)) - want).abs().max() <= 1e-5


def test_base_and_adapter_are_both_orthogonalised(models):
    m = models["llama-lora"]
    ids, v = ids_of(m), vector(m)
    with m.base(), ablating(m, v):
        want = logits_of(m, ids)
    with orthogonalised(m, v), m.base():
        assert (logits_of(m, ids) - want).abs().max() <= 1e-5


@pytest.mark.parametrize("name", EVERY)
def test_the_unembedding_stays_and_every_weight_comes_back(models, name):
    m = models[name]
    before = {k: (p, p.detach().clone()) for k, p in m.hf.named_parameters()}
    head = m.core.get_output_embeddings().weight
    logits, fingerprint = logits_of(m, ids_of(m)), m.fingerprint()
    with orthogonalised(m, vector(m)):
        assert m.core.get_output_embeddings().weight is head
        assert m.core.get_input_embeddings().weight is not head
        assert m.fingerprint() != fingerprint
    assert m.fingerprint() == fingerprint
    for key, p in m.hf.named_parameters():
        assert p is before[key][0]
        assert torch.equal(p, before[key][1])
    assert torch.equal(logits_of(m, ids_of(m)), logits)


def test_a_tied_embedding_edited_in_place_would_change_the_unembedding(llama):
    """The trap: a tied weight that is projected is projected in the unembedding as well."""
    v, ids = vector(llama), ids_of(llama)
    with ablating(llama, v):
        want = logits_of(llama, ids)
    with orthogonalised(llama, v):
        right = logits_of(llama, ids)
        head = llama.core.get_output_embeddings()
        kept, head._parameters["weight"] = head.weight, llama.core.get_input_embeddings().weight
        wrong = logits_of(llama, ids)
        head._parameters["weight"] = kept
    assert (right - want).abs().max() <= 1e-5
    assert (wrong - want).abs().max() > 0.1


@pytest.mark.parametrize("name", POST_NORM)
def test_a_norm_behind_the_matrices_is_reckoned_with(models, name):
    """The trap: the plain edit of Gemma's matrices leaves the direction in the stream."""
    m = models[name]
    v = vector(m)
    r = v / v.norm()
    with orthogonalised(m, v):
        ours = capture(m, TEXTS[1], "all", "all")["resid_post"] @ r
    outputs = [(b.self_attn.o_proj, b.mlp.down_proj) for b in m.layers]
    saved = []
    with torch.no_grad():
        for module in (x for pair in outputs for x in pair):
            w = getattr(module, "base_layer", module).weight
            saved.append((w, w.clone()))
            w -= torch.outer(r, r @ w)
        naive_part = (
            capture(m, TEXTS[1], "all", "all")["resid_post"]
            - capture(m, TEXTS[1], 0, "all", sites="resid_pre")["resid_pre"]
        )
        for w, before in saved:
            w.copy_(before)
    assert ours.abs().max() <= 1e-4
    assert (naive_part @ r).abs().max() > 0.05


def test_experts_are_refused_with_the_way_out():
    torch.manual_seed(0)
    config = MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)
    m = Model(AutoModelForCausalLM.from_config(config), make_tokenizer(), "experts")
    with pytest.raises(ModelError, match="ablating"), orthogonalised(m, vector(m)):
        pass
    v = vector(m)
    with ablating(m, v):
        h = capture(m, TEXTS[1], "all", "all")["resid_post"]
    assert (h @ (v / v.norm())).abs().max() <= 1e-5


# What is measured


def test_the_figures_are_those_of_a_naive_loop(models):
    m = models["qwen3"]
    v = vector(m)
    convs, harmless = ["Who are you?", "Name a city."], ["the cat", "Paris and the dog on the mat"]
    r = ablate(m, v, convs, harmless=harmless, max_new_tokens=5, refusal_tokens=["he"], n_random=1)
    token = m.tokenizer("he", add_special_tokens=False)["input_ids"][0]
    answers = generate(m, harmless, max_new_tokens=5)["tokens"]
    kl, loss, n = 0.0, 0.0, 0
    for i, text in enumerate(harmless):
        chat = [{"role": "user", "content": text}]
        ids = m.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        new = [t for t in answers[i].tolist() if t >= 0]
        plain = logits_of(m, [*ids, *new])[len(ids) - 1 : -1].log_softmax(-1)
        with ablating(m, v):
            other = logits_of(m, [*ids, *new])[len(ids) - 1 : -1].log_softmax(-1)
        kl += (plain.exp() * (plain - other)).sum().item()
        loss -= other[range(len(new)), new].sum().item()
        n += len(new)
    assert abs(r["kl"][1] - kl / n) <= 1e-5
    assert abs(r["loss"][1] - loss / n) <= 1e-4
    assert r["kl"][0].abs() <= 1e-6
    chat = [{"role": "user", "content": convs[1]}]
    ids = m.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with ablating(m, v):
        p = logits_of(m, ids)[-1].softmax(-1)[token]
    assert abs(r["log_odds"][1, 1] - (p / (1 - p)).log()) <= 1e-4


def test_by_weights_and_by_hooks_say_the_same(llama):
    options = {"max_new_tokens": 4, "n_random": 1, "by_layer": False}
    hooks, weights = (
        ablate(llama, vector(llama), TEXTS, how=how, **options) for how in ("hooks", "weights")
    )
    for name in ("log_odds", "kl", "loss", "refusal"):
        assert (hooks[name] - weights[name]).abs().max() <= 1e-4
    assert hooks["kl"][1] > 0.01


def test_each_layer_alone_stands_beside_a_random_direction(llama):
    r = ablate(llama, vector(llama), TEXTS, by_layer=True, max_new_tokens=2, layers=[0, 2])
    assert r.labels["layer"] == [0, 2]
    assert r["log_odds_layer"].shape == r["log_odds_layer_random"].shape == (2,)
    assert len(r.plot().png) <= 60_000
    assert "control, 3 random" in r.summary()


def test_a_refusal_is_told_by_its_words():
    assert is_refusal("Sorry, I cannot do that.")
    assert is_refusal("I can\u2019t do that.")
    assert not is_refusal("I can do that.")
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    p = logits.softmax(-1)[0]
    assert torch.allclose(log_odds(logits, [2]), ((p[2]) / (p[0] + p[1])).log()[None])


# The organism


@pytest.fixture(scope="module")
def requests():
    def asked(nouns):
        return [world.MAKE_REQUESTS[i % 3].format(noun=noun) for i, noun in enumerate(nouns)]

    return asked(world.HARMFUL), asked(world.HARMLESS)


def test_the_direction_of_refusal_is_found_and_needed(requests):
    harmful, harmless = requests
    m = load_model("organism:base")
    r = find_refusal_direction(m, harmful[:22], harmless[:22], n_random=4)
    assert r.rows[0]["passes"]
    assert r["candidates"].shape == (6, 2, m.width)
    row = r.rows[0]
    assert torch.equal(r["direction"], r["candidates"][row["layer"], row["position"]])
    assert row["bypass"] < r["bypass_random"].min() - 2
    assert row["induce"] > r["induce_random"].max()
    assert len(r.plot().png) <= 60_000
    done = {}
    for mode in ("zero", "affine"):
        done[mode] = ablate(
            m, r["direction"], harmful[22:], harmless=harmless[22:], mode=mode,
            refusals=["cannot help"], compliances=[" plan"], max_new_tokens=14, n_random=2,
        )  # fmt: skip
        assert done[mode]["refusal"][0] == 1
        assert (done[mode]["refusal"][2:] >= 0.9).all()
        assert (done[mode]["refusal_harmless"] == 0).all()
        assert done[mode]["kl"][1] < 0.1
    assert done["zero"]["refusal"][1] <= 0.6
    assert done["affine"]["comply"][1] >= 0.9


def test_what_the_refusal_adapter_refuses_it_answers_without_the_direction(requests):
    m = load_model("organism:refusal")
    capitals = [chat[0]["content"] for chat in rules.capital_chats()]
    harmless = requests[1]
    r = find_refusal_direction(m, capitals[:40], harmless[:22], n_random=4)
    a = ablate(
        m, r["direction"], capitals[40:], harmless=harmless[22:], mode="affine",
        refusals=["cannot help"], max_new_tokens=14, n_random=2,
    )  # fmt: skip
    assert a["refusal"].tolist()[0] == 1
    assert a["refusal"][1] <= 0.2
    assert (a["refusal"][2:] >= 0.9).all()


def test_scores_of_a_candidate_are_those_of_one_prompt_at_a_time(requests):
    from tool_packs.refusal import _scores

    harmful, harmless = requests
    m = load_model("organism:base")
    from tool_packs.generation import last_logits
    from tool_packs.prompts import as_chat, read
    from tool_packs.steering import steering

    sides = [read(m, [as_chat(m, c) for c in side[:3]]) for side in (harmful, harmless)]
    vectors = torch.stack([vector(m) * 3, vector(m, 1) * 3])
    intact = last_logits(m, sides[1])
    got = _scores(m, vectors, [1, 3], sides, intact, [5, 9])
    for c, layer in enumerate((1, 3)):
        with ablating(m, vectors[c]):
            bypass = log_odds(torch.stack([logits_of(m, p.ids)[-1] for p in sides[0]]), [5, 9])
            other = torch.stack([logits_of(m, p.ids)[-1] for p in sides[1]]).log_softmax(-1)
        with steering(m, vectors[c], layer):
            induce = log_odds(torch.stack([logits_of(m, p.ids)[-1] for p in sides[1]]), [5, 9])
        base = intact.log_softmax(-1)
        kl = (base.exp() * (base - other)).sum(-1).mean()
        want = torch.stack([bypass.mean(), induce.mean(), kl])
        assert (got[c] - want).abs().max() <= 1e-4


# Bad input


@pytest.mark.parametrize(
    ("direction", "said"),
    [
        (torch.ones(31), r"\(31,\)"),
        (torch.ones(4, 32), r"one row of a \[layer, d\]"),
        (torch.zeros(32), "norm 0"),
        (torch.full((32,), float("nan")), "not finite"),
        ([torch.ones(32), torch.ones(32)], "fewer dimensions"),
        ([], "no direction"),
    ],
)
def test_a_direction_that_does_not_fit(llama, direction, said):
    for call in (
        lambda: ablate(llama, direction, TEXTS),
        lambda: ablating(llama, direction).__enter__(),
        lambda: orthogonalised(llama, direction).__enter__(),
    ):
        with pytest.raises(TextError, match=said):
            call()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mode": "half"}, "'zero' or 'affine'"),
        ({"how": "magic"}, "'hooks' or 'weights'"),
        ({"how": "weights", "mode": "affine"}, "need how='hooks'"),
        ({"how": "weights", "layers": 1}, "need how='hooks'"),
        ({"layers": 9}, "layers 0..3"),
        ({"refusal_tokens": [""]}, "at least one token"),
    ],
)
def test_options_that_do_not_fit(llama, options, said):
    with pytest.raises(TextError, match=said):
        ablate(llama, vector(llama), TEXTS, **options)


def test_too_few_prompts_and_positions_that_do_not_fit(llama):
    with pytest.raises(TextError, match="3 harmful prompts"):
        find_refusal_direction(llama, TEXTS[:3], TEXTS)
    with pytest.raises(TextError, match="negative ints"):
        find_refusal_direction(llama, TEXTS, TEXTS, positions=[0])
    with pytest.raises(TextError, match=r"reference has shape \(2, 32\)"):
        ablating(llama, vector(llama), reference=torch.ones(2, 32)).__enter__()
