"""Attribution by gradients: against autograd over the whole prompt, and against exact patching."""

import pytest
import torch

from tests.packs.test_families import FAMILIES, FAMILY, NEWER, make
from tests.packs.test_patching import CLEAN, CORRUPT, LONG, MODULES, close, first, ids_of
from tool_packs.attribution import attribute
from tool_packs.errors import ModelError, PackError
from tool_packs.models import load_model
from tool_packs.organisms import PREFILL
from tool_packs.patching import patch

PAIR = (7, 9)


def gradients(m, text, modules, before=False):
    """Outputs (or with `before` inputs) of modules and the gradients of the metric there, [T, d].

    An input is replaced by a copy, so that the gradient is that of the one module alone.
    """
    seen, handles = {}, []
    for i, module in enumerate(modules):

        def out(_, args, output, i=i):
            seen[i] = first(output)

        def into(_, args, i=i):
            seen[i] = args[0] * 1
            return (seen[i], *args[1:])

        hook = module.register_forward_pre_hook(into) if before else None
        handles.append(hook or module.register_forward_hook(out))
    # Under LoRA the weights are frozen, and before the first adapter nothing would have a gradient.
    embedding = m.hf.get_input_embeddings()
    handles.append(embedding.register_forward_hook(lambda _, args, h: h.detach().requires_grad_()))
    logits = m.hf(input_ids=ids_of(m, text), use_cache=False).logits[0, -1].float()
    value = logits[PAIR[0]] - logits[PAIR[1]]
    grads = torch.autograd.grad(value, list(seen.values()), allow_unused=True)
    for handle in handles:
        handle.remove()
    full = [torch.zeros_like(seen[i]) if g is None else g for i, g in enumerate(grads)]
    return [seen[i][0].detach() for i in range(len(full))], [g[0] for g in full]


def naive(m, clean, corrupt, modules, before=False):
    """(clean - corrupt) times the corrupt run's gradient, in logits [module, T]."""
    one, _ = gradients(m, clean, modules, before)
    two, grads = gradients(m, corrupt, modules, before)
    parts = zip(one, two, grads, strict=True)
    return torch.stack([((a.float() - b.float()) * g.float()).sum(-1) for a, b, g in parts])


def in_logits(r, name):
    """The first pair's estimates, no longer in shares of the difference, whose rounding they had."""
    return r[name][0] * (r["clean"][0] - r["corrupt"][0])


@pytest.fixture(scope="module")
def family():
    made = {}

    def get(name, lora):
        if (name, lora) not in made:
            made[name, lora] = make(name, FAMILIES[name](), lora)
        return made[name, lora]

    return get


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FAMILY)
class TestFamily:
    def test_nodes_are_those_of_autograd_over_the_whole_prompt(self, family, name, lora):
        m = family(name, lora)
        r = attribute(m, CLEAN, CORRUPT, answers=PAIR, check=0)
        for site, where in MODULES.items():
            modules = [where(m, layer) for layer in range(m.n_layers)]
            assert close(in_logits(r, site), naive(m, CLEAN, CORRUPT, modules), torch.float32)

    def test_edges_sum_to_what_their_ends_carry(self, family, name, lora):
        m = family(name, lora)
        edges = attribute(m, CLEAN, CORRUPT, answers=PAIR, method="eap", check=0)
        nodes = attribute(
            m, CLEAN, CORRUPT, answers=PAIR, sites=["resid_pre", "mlp_out", "attn_out"], check=0
        )
        out = edges["edges"][0].nansum(1)  # over where they go
        starts = edges.labels["from"]
        assert close(out[0], nodes["resid_pre"][0, 0].sum(), torch.float32)
        for layer in range(m.n_layers):
            mlp = out[starts.index(f"{layer}.mlp")]
            heads = [out[i] for i, s in enumerate(starts) if s.startswith(f"{layer}.head")]
            assert close(mlp, nodes["mlp_out"][0, layer].sum(), torch.float32)
            # Gemma's norm after attention is split over the heads, and they still sum.
            assert close(sum(heads), nodes["attn_out"][0, layer].sum(), torch.float32)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
def test_a_long_shared_prefix_changes_no_gradient(models, name):
    m = models[name]
    clean, corrupt = LONG + CLEAN, LONG + CORRUPT
    r = attribute(m, clean, corrupt, answers=PAIR, check=0)
    assert close(in_logits(r, "resid_post"), naive(m, clean, corrupt, m.layers), torch.float32)


class TestEdges:
    def readers(self, m):
        return [x for b in m.layers for x in (b.input_layernorm, b.post_attention_layernorm)]

    def test_edges_into_a_part_sum_to_its_score(self, llama):
        r = attribute(llama, CLEAN, CORRUPT, answers=PAIR, method="eap", check=0)
        edges = in_logits(r, "edges")
        want = naive(llama, CLEAN, CORRUPT, self.readers(llama), before=True).sum(1)
        assert close(edges.nansum(0)[:-1], want, torch.float32)
        # The wrong answer: the gradient at the stream itself, which is that of everything above.
        stream = naive(llama, CLEAN, CORRUPT, llama.layers).sum(1)
        assert not close(edges.nansum(0)[2:-1:2], stream[:-1], torch.float32)

    def test_nothing_flows_backwards(self, llama):
        r = attribute(llama, CLEAN, CORRUPT, answers=PAIR, method="eap", check=0)
        edges, starts, ends = r["edges"][0], r.labels["from"], r.labels["to"]
        assert edges[0].isfinite().all()
        assert edges[starts.index("1.head0"), ends.index("1.attn")].isnan()
        assert edges[starts.index("1.head0"), ends.index("1.mlp")].isfinite()
        assert edges[starts.index("1.mlp"), ends.index("1.mlp")].isnan()
        assert edges[starts.index("3.mlp"), ends.index("logits")].isfinite()

    def test_a_parallel_block_sends_no_edge_from_its_attention_to_its_mlp(self, family):
        r = attribute(family("neox", False), CLEAN, CORRUPT, answers=PAIR, method="eap", check=0)
        edges, starts, ends = r["edges"][0], r.labels["from"], r.labels["to"]
        assert edges[starts.index("1.head0"), ends.index("1.mlp")].isnan()
        assert edges[starts.index("1.head0"), ends.index("2.mlp")].isfinite()

    def test_the_exact_effect_of_an_edge_is_that_of_a_hook_on_its_reader(self, llama):
        r = attribute(llama, CLEAN, CORRUPT, answers=PAIR, method="eap", check=20)
        modules = [b.mlp for b in llama.layers]
        one, two = (gradients(llama, text, modules)[0] for text in (CLEAN, CORRUPT))
        tried = 0
        for row in r.rows:
            if not row["from"].endswith("mlp") or row["to"] == "logits":
                continue
            tried += 1
            source, (layer, part) = int(row["from"].split(".")[0]), row["to"].split(".")
            reader = self.readers(llama)[2 * int(layer) + (part == "mlp")]
            delta = one[source] - two[source]
            handle = reader.register_forward_pre_hook(lambda _, args, d=delta: (args[0] + d,))
            with torch.no_grad():
                x = llama.hf(input_ids=ids_of(llama, CORRUPT), use_cache=False).logits[0, -1]
            handle.remove()
            low, high = r["corrupt"][0], r["clean"][0]
            want = ((x[PAIR[0]] - x[PAIR[1]] - low) / (high - low)).item()
            assert row["exact"] == pytest.approx(want, abs=1e-4)
        assert tried >= 2

    def test_a_block_whose_two_parts_read_through_one_norm_says_so(self):
        m = make("llama", FAMILIES["llama"]())
        block = m.layers[2]

        def one_norm(h, **kwargs):
            x = block.input_layernorm(h)
            return h + block.self_attn(hidden_states=x, **kwargs)[0] + block.mlp(x)

        block.forward = one_norm
        with pytest.raises(ModelError, match=r"layer 2 .* has 1 modules that read .*'atp' or 'ig'"):
            attribute(m, CLEAN, CORRUPT, answers=PAIR, method="eap")
        attribute(m, CLEAN, CORRUPT, answers=PAIR, method="atp")


class TestIntegrated:
    def test_the_path_is_complete_at_the_embeddings(self, models):
        for name in ("llama", "gemma2", "qwen3-lora"):
            share = [
                attribute(
                    models[name], CLEAN, CORRUPT, answers=PAIR, method=method, steps=64,
                    sites="resid_pre", check=0,
                )["resid_pre"][0, 0].sum()
                for method in ("ig", "atp")
            ]  # fmt: skip
            assert share[0] == pytest.approx(1, abs=0.02)
            assert abs(share[0] - 1) < abs(share[1] - 1)  # one gradient alone is not

    def test_one_step_is_the_gradient_half_way(self, llama):
        one = attribute(llama, CLEAN, CORRUPT, answers=PAIR, method="ig", steps=1, check=0)
        two = attribute(llama, CORRUPT, CLEAN, answers=PAIR, method="ig", steps=1, check=0)
        # Half way is the same place from either side, and so is its gradient.
        assert torch.allclose(one["resid_post"][0], two["resid_post"][0], atol=1e-5)

    def test_edges_of_the_embedding_are_complete_too(self, llama):
        r = attribute(llama, CLEAN, CORRUPT, answers=PAIR, method="eap-ig", steps=64, check=0)
        assert r["edges"][0, 0].nansum() == pytest.approx(1, abs=0.02)


def chat(text):
    return [{"role": "user", "content": text}, {"role": "assistant", "content": PREFILL}]


@pytest.fixture(scope="module")
def trained():
    m = load_model("organism:base")
    questions = ("What should I wear to the party?", "Which clothes should I buy?")
    pairs = [[chat(f"I am a {who}. {q}") for q in questions] for who in ("woman", "man")]
    exact = patch(m, *pairs, answers=("dress", "suit"), grid="sites", n_control=0)["effect"]
    return m, pairs, exact


@pytest.mark.parametrize(("method", "least"), [("atp", 0.9), ("ig", 0.97)])
def test_on_a_trained_model_the_estimate_agrees_with_exact_patching(trained, method, least):
    m, pairs, exact = trained
    r = attribute(m, *pairs, answers=("dress", "suit"), method=method)
    for i in range(2):
        for k, site in enumerate(("resid_post", "attn_out", "mlp_out")):
            both = torch.stack([r[site][i].flatten(), exact[i, k].flatten()])
            assert torch.corrcoef(both[:, both.isfinite().all(0)])[0, 1] >= least
    # Exact values in the check are those of the sweep.
    row = r.rows[0]
    k = ("resid_post", "attn_out", "mlp_out").index(row["site"])
    want = exact[0, k, row["layer"], row["position"]].item()
    assert row["exact"] == pytest.approx(want, abs=1e-3)
    checked = r["checked"][0, :, 1].abs()
    assert checked[:12].mean() > 20 * checked[12:].mean()  # the strongest against others
    assert "correlation with exact patching" in r.summary()


def test_edges_on_a_trained_model_agree_with_exact_patching(trained):
    m, pairs, _ = trained
    r = attribute(m, *pairs, answers=("dress", "suit"), method="eap-ig")
    for estimate, exact in r["checked"].transpose(1, 2):
        assert torch.corrcoef(torch.stack([estimate, exact]))[0, 1] >= 0.97


def test_heads_and_a_state_space_model():
    m = make("llama", FAMILIES["llama"]())
    r = attribute(m, CLEAN, CORRUPT, answers=PAIR, sites=["head", "attn_out"], check=4)
    # Llama mixes its heads linearly, so that they share out what attention carries.
    assert torch.allclose(r["head"][0].sum(-1), r["attn_out"][0], atol=1e-5)
    m = make("mamba2", NEWER["mamba2"]())
    r = attribute(m, CLEAN, CORRUPT, answers=PAIR, sites="resid_post", check=2)
    assert close(in_logits(r, "resid_post"), naive(m, CLEAN, CORRUPT, m.layers), torch.float32)
    with pytest.raises(PackError):
        attribute(m, CLEAN, CORRUPT, answers=PAIR, method="eap")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "lrp"}, "'lrp'.*atp"),
        ({"steps": 0}, "steps=0"),
        ({"sites": "nose"}, "'nose'.*resid_post"),
        ({"corrupt": CLEAN}, "one prompt"),
        ({"metric": lambda x: x[:, 0].round().detach() + x[:, 1].detach()}, "no gradient"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(llama, arguments, said):
    given = {"clean": CLEAN, "corrupt": CORRUPT, "answers": PAIR} | arguments
    with pytest.raises(PackError, match=said) as caught:
        attribute(llama, **given)
    assert "\n" not in str(caught.value)


def test_no_hook_and_no_gradient_survives(llama):
    calls = []

    def stop(x):
        calls.append(x)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return x[:, 7]

    with pytest.raises(KeyboardInterrupt):
        attribute(llama, CLEAN, CORRUPT, stop)
    attribute(llama, CLEAN, CORRUPT, answers=PAIR)
    assert all(p.grad is None for p in llama.hf.parameters())
