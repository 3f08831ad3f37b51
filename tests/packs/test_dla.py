"""Components add up to the model's own logit difference, and each is what a naive formula gives."""

import pytest
import torch

from tests.packs.test_families import FAMILIES, NEWER, make
from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.attention import attended
from tool_packs.dla import dla
from tool_packs.errors import ModelError, TextError
from tool_packs.models import load_model
from tool_packs.organisms import assistant, user
from tool_packs.prompts import read
from tool_packs.steering import intervention

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
PAIR = (40, 90)


def difference(m, text, pair=PAIR, position=-1):
    with torch.no_grad():
        logits = m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0, position].float()
    return (logits[pair[0]] - logits[pair[1]]).item()


@pytest.mark.parametrize("name", EVERY)
def test_components_and_heads_add_up_to_the_models_logit_difference(models, name):
    m = models[name]
    r = dla(m, TEXTS, PAIR)
    for i, text in enumerate(TEXTS):
        want = difference(m, text)
        assert r["logit_difference"][i].item() == pytest.approx(want, abs=1e-4)
        assert r["attribution"][i].sum().item() == pytest.approx(want, abs=1e-4)
    names = r.labels["component"]
    for layer in range(m.n_layers):
        attn = r["attribution"][:, names.index(f"L{layer} attn")]
        assert (r["head"][:, layer].sum(-1) + r["head_bias"][:, layer] - attn).abs().max() <= 1e-4
    assert r["error"].abs().max() <= 1e-4
    assert r["head"].shape == (4, 4, 4)
    assert ("pos_embed" in names) == name.startswith("gpt2")
    assert r["null"].shape == (4, len(names), 64)


# Written out for three ways of building a block


def naive(m, text, pair):
    """Attribution by component and by head, from weights and hooks, by each family's formulas."""
    kind = m.core.config.model_type
    blocks = m.core.transformer.h if kind == "gpt2" else m.core.model.layers
    seen, handles = {}, []

    def note(name, pick=lambda args, output: output):
        def hook(module, args, output):
            got = pick(args, output)
            seen[name] = (got if isinstance(got, torch.Tensor) else got[0])[0, -1]

        return hook

    for i, block in enumerate(blocks):
        attention = block.attn if kind == "gpt2" else block.self_attn
        mix = attention.c_proj if kind == "gpt2" else attention.o_proj
        mlp = block.mlp
        if kind == "gemma2":
            handles.append(block.post_attention_layernorm.register_forward_hook(note(f"L{i} attn")))
            mlp = block.post_feedforward_layernorm
        else:
            handles.append(attention.register_forward_hook(note(f"L{i} attn")))
        handles.append(mlp.register_forward_hook(note(f"L{i} mlp")))
        handles.append(mix.register_forward_hook(note(f"L{i} mixed")))
        handles.append(mix.register_forward_hook(note(f"L{i} z", lambda args, out: args[0])))
        handles.append(block.register_forward_hook(note("final")))
    given = m.tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        logits = m.hf(**given).logits[0, -1]
    for handle in handles:
        handle.remove()
    token = given["input_ids"][0, -1]
    w = m.core.get_output_embeddings().weight.detach()
    w = w[pair[0]] - w[pair[1]]
    final = seen["final"]
    constant = torch.zeros(())
    if kind == "gpt2":
        norm = m.core.transformer.ln_f
        scale = (final.var(unbiased=False) + norm.eps).sqrt()
        w = w * norm.weight
        constant = (w / norm.weight) @ norm.bias
        w = (w - w.mean()) / scale
        embedded = {
            "embed": m.core.transformer.wte.weight[token],
            "pos_embed": m.core.transformer.wpe.weight[given["input_ids"].shape[1] - 1],
        }
    else:
        norm = m.core.model.norm
        gain = 1 + norm.weight if kind == "gemma2" else norm.weight
        eps = norm.eps if kind == "gemma2" else norm.variance_epsilon
        w = w * gain / (final.square().mean() + eps).sqrt()
        embedded = {"embed": m.core.model.embed_tokens.weight[token]}
        if kind == "gemma2":
            embedded["embed"] = embedded["embed"] * m.width**0.5
    out = {name: x @ w for name, x in embedded.items()}
    out |= {k: x @ w for k, x in seen.items() if k.endswith((" attn", " mlp"))}
    out["bias"] = constant
    heads = torch.zeros(len(blocks), 4)
    for i, block in enumerate(blocks):
        attention = block.attn if kind == "gpt2" else block.self_attn
        mix = attention.c_proj if kind == "gpt2" else attention.o_proj
        weight = getattr(mix, "base_layer", mix).weight.detach()
        if hasattr(mix, "base_layer"):
            weight = weight + mix.get_delta_weight(m.active_adapter).detach()
        weight = weight if kind == "gpt2" else weight.T  # [heads * head_dim, d]
        v = w
        if kind == "gemma2":
            norm = block.post_attention_layernorm
            v = w * (1 + norm.weight) / (seen[f"L{i} mixed"].square().mean() + norm.eps).sqrt()
        each = seen[f"L{i} z"].view(4, -1)
        for h, part in enumerate(weight.view(4, -1, m.width)):
            heads[i, h] = each[h] @ part @ v
    return {k: v.item() for k, v in out.items()}, heads.detach(), logits[pair[0]] - logits[pair[1]]


@pytest.mark.parametrize(
    "name", ["llama", "llama-lora", "gpt2", "gpt2-lora", "gemma2", "gemma2-lora"]
)
def test_each_component_is_that_of_a_naive_formula(folders, name):
    m = load_model(str(folders[name]))  # another test may have put adapters on the shared one
    with torch.no_grad():
        logits = m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt")).logits[0, -1]
    pair = (int(logits.argmax()), int(logits.argmin()))  # far apart, where a softcap matters
    r = dla(m, [TEXTS[1], TEXTS[0]], pair)
    want, heads, true = naive(m, TEXTS[1], pair)
    factor = 1.0
    if m.softcap is not None:  # the naive sum is the difference before the cap
        factor = true.item() / sum(want.values())
        assert factor < 0.9
    got = dict(zip(r.labels["component"], r["attribution"][0].tolist(), strict=True))
    assert got.keys() == want.keys()
    for component, value in want.items():
        assert got[component] == pytest.approx(factor * value, abs=1e-4)
    assert (r["head"][0] - factor * heads).abs().max() <= 1e-4


def test_without_the_norms_after_attention_and_mlp_gemma_does_not_add_up(models):
    """The trap: what attention and MLP put out is not what Gemma 2 adds."""
    m = models["gemma2"]
    r = dla(m, TEXTS[1], PAIR)
    seen = []

    def look(module, args, output):
        seen.append((output if isinstance(output, torch.Tensor) else output[0])[0, -1])

    blocks = m.core.model.layers
    parts = [p for block in blocks for p in (block.self_attn, block.mlp)]
    handles = [part.register_forward_hook(look) for part in (*parts, blocks[-1])]
    with torch.no_grad():
        m.hf(**m.tokenizer(TEXTS[1], return_tensors="pt"))
    for handle in handles:
        handle.remove()
    final = seen.pop()
    norm = m.core.model.norm
    w = m.core.get_output_embeddings().weight.detach()
    w = (w[PAIR[0]] - w[PAIR[1]]) * (1 + norm.weight) / final.square().mean().sqrt()
    naive_sum = (sum(seen) @ w).item() + r["attribution"][0, 0].item()
    assert abs(naive_sum - r["logit_difference"].item()) > 0.1
    assert r["error"].abs().max() <= 1e-4


def test_the_answers_may_be_words_tuples_or_the_models_own(llama):
    own = dla(llama, TEXTS)
    with torch.no_grad():
        out = [llama.hf(**llama.tokenizer(t, return_tensors="pt")).logits[0, -1] for t in TEXTS]
    want = torch.tensor([(x.topk(2).values[0] - x.topk(2).values[1]).item() for x in out])
    assert (own["logit_difference"] - want).abs().max() <= 1e-4
    each = dla(llama, TEXTS[:2], [PAIR, (" she", " the")])
    assert each["logit_difference"][0].item() == pytest.approx(
        difference(llama, TEXTS[0]), abs=1e-4
    )
    turned = dla(llama, TEXTS[:2], PAIR[::-1])
    assert (turned["attribution"] + dla(llama, TEXTS[:2], PAIR)["attribution"]).abs().max() <= 1e-5
    assert dla(llama, TEXTS[1], PAIR, position=3)["logit_difference"].item() == pytest.approx(
        difference(llama, TEXTS[1], position=3), abs=1e-4
    )


def test_a_prompt_does_not_depend_on_its_batch_and_the_random_pairs_are_attributions(llama):
    r = dla(llama, TEXTS, PAIR, n_random=3, seed=5)
    alone = dla(llama, TEXTS[0], PAIR, n_random=3, seed=5)
    assert (r["attribution"][0] - alone["attribution"][0]).abs().max() <= 1e-5
    random = torch.randint(
        llama.vocab_size, (3, 2), generator=torch.Generator().manual_seed(5)
    ).tolist()
    for k, pair in enumerate(random):
        of_pair = dla(llama, TEXTS[0], tuple(pair), n_random=0)
        assert (alone["null"][0, :, k] - of_pair["attribution"][0]).abs().max() <= 1e-5
        assert (alone["head_null"][..., k] - of_pair["head"][0]).abs().max() <= 1e-5


def test_what_steering_adds_is_a_component(models):
    for name in ("llama", "gemma2"):
        m = models[name]
        v = torch.randn(m.width, generator=torch.Generator().manual_seed(0))
        r = dla(m, TEXTS[:2], PAIR, steer=intervention(m, v, 1, 2.0), attend=2)
        assert r["error"].abs().max() <= 1e-4
        added = r["attribution"][:, r.labels["component"].index("L1 steering")]
        assert added.abs().min() > 1e-3
        others = r["attribution"][:, r.labels["component"].index("L2 steering")]
        assert others.abs().max() <= 1e-4
        plain = dla(m, TEXTS[:2], PAIR)
        assert (r["logit_difference"] - plain["logit_difference"]).abs().max() > 1e-3


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == "neox" else pytest.mark.slow) for n in FAMILIES],
)
def test_every_family_adds_up(name, lora):
    m = make(name, FAMILIES[name](), lora)
    r = dla(m, TEXTS, PAIR)
    want = torch.tensor([difference(m, t) for t in TEXTS])
    assert (r["attribution"].sum(1) - want).abs().max() <= 1e-4
    assert not r["head"].isnan().any()
    assert any("attends" in row for row in r.rows)


@pytest.mark.parametrize("name", NEWER)
def test_newer_families_add_up_or_say_what_they_do_not_tell_apart(name):
    m = make(name, NEWER[name]())
    r = dla(m, TEXTS[:2], PAIR)
    want = torch.tensor([difference(m, t) for t in TEXTS[:2]])
    assert (r["attribution"].sum(1) - want).abs().max() <= 1e-4
    if name in ("bamba", "mamba2"):
        assert "could not be told apart" in r.summary()
    if name == "bamba":  # one layer of attention among state-space ones
        assert m.structure.attn_out[1] is m.core.model.layers[1].self_attn
        at = r.labels["component"].index("L1 attn")
        total = r["head"][:, 1].sum(-1) + r["head_bias"][:, 1]
        assert (total - r["attribution"][:, at]).abs().max() <= 1e-4
        assert r["head"][:, [0, 2, 3]].isnan().all()


def test_half_precision_adds_up_to_its_rounding(folders):
    m = load_model(str(folders["gemma2"]), dtype="bfloat16")
    r = dla(m, TEXTS, PAIR)
    assert r["error"].abs().max() <= 5e-2 * r["attribution"].abs().sum(1).max()


def test_what_does_not_fit_is_refused_in_a_sentence(llama, monkeypatch):
    with pytest.raises(TextError, match="are one token"):
        dla(llama, TEXTS[0], (7, 7))
    with pytest.raises(TextError, match="give two"):
        dla(llama, TEXTS[0], " she")
    with pytest.raises(TextError, match="is 3 positions: give one"):
        dla(llama, TEXTS[1], PAIR, position=(0, 3))
    with pytest.raises(TextError, match=r"outside this model's 0\.\.319"):
        dla(llama, TEXTS[0], (7, 320))
    monkeypatch.setattr(llama.structure, "mlp_out", llama.structure.attn_out)
    with pytest.raises(ModelError, match="something else writes to the residual stream"):
        dla(llama, TEXTS[0], PAIR)


def test_on_an_organism_the_users_word_is_read_by_the_heads_that_look_at_it():
    """Of the 11 logits between a girl's and a boy's shoes, layer 2's heads write half (seed 0)."""
    m = load_model("organism:base@0")

    def chat(word):
        return [
            user(f"I am a {word}."),
            assistant("Thank you for telling me."),
            user("Which shoes should I wear to the party?"),
            assistant("You could try the"),
        ]

    r = dla(m, [chat("girl"), chat("boy")], (" heels", " trainers"))
    assert r["logit_difference"][0] > 3
    assert r["logit_difference"][1] < -3
    effect = r["attribution"][0] - r["attribution"][1]
    null = r["null"][0] - r["null"][1]  # of random pairs of tokens
    at = r.labels["component"].index("L2 attn")
    assert effect.argmax() == at
    assert effect[at] > 0.4 * effect.sum()
    assert effect[at] > 2 * null[at].abs().mean()
    heads = (r["head"][0] - r["head"][1])[2]
    looks = attended(m, read(m, chat("girl"))[0], -1, [(2, int(heads.argmax()))], k=1)
    assert looks[0].startswith("' girl'")
