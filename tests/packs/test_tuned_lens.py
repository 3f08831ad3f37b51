"""The tuned lens is trained as a naive loop trains it, and is measured on texts it has not seen."""

import pytest
import torch

from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.errors import ModelError, TextError
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model
from tool_packs.organisms import world
from tool_packs.result import Result
from tool_packs.tuned_lens import train_tuned_lens, tuned_lens

MORE = [*TEXTS, "the doctor said that the nurse is in the house on the hill", "Name a city."]


def naive(m, texts, layer, steps, lr, weight_decay):
    """One layer's map by the model's own modules, all tokens in every step."""
    x, y = [], []
    for text in texts:
        seen = []
        handle = m.layers[layer].register_forward_hook(
            lambda module, args, output, seen=seen: seen.append(
                (output if isinstance(output, torch.Tensor) else output[0])[0, 1:]
            )
        )
        with torch.no_grad():
            y.append(m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0, 1:])
        handle.remove()
        x.append(seen[0])
    x, y = torch.cat(x), torch.cat(y)
    affine = torch.nn.Linear(m.width, m.width)
    torch.nn.init.zeros_(affine.weight)
    torch.nn.init.zeros_(affine.bias)
    optimiser = torch.optim.AdamW(affine.parameters(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * (steps - step) / steps
        logits = m.core.get_output_embeddings()(m.structure.final_norm(x + affine(x)))
        if m.softcap:
            logits = m.softcap * torch.tanh(logits / m.softcap)
        loss = torch.nn.functional.kl_div(
            logits.log_softmax(-1), y.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    m.hf.zero_grad()
    return affine.weight.detach(), affine.bias.detach()


def split(texts, seed, kept):
    """Which texts are trained on, as the pack draws them."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [texts[i] for i in order[kept:]], [texts[i] for i in order[:kept]]


@pytest.mark.parametrize("name", ["llama", "gemma2-lora", "gpt2"])
def test_training_is_that_of_a_naive_loop(models, name):
    m = models[name]
    lens = train_tuned_lens(m, MORE, [1, 2], steps=6, lr=1e-3, batch=1000, weight_decay=0.1)
    train, test = split(MORE, 0, 1)
    weight, bias = naive(m, train, 1, 6, 1e-3, 0.1)
    assert (lens["weight"][0] - weight).abs().max() <= 1e-5
    assert (lens["bias"][0] - bias).abs().max() <= 1e-5
    assert weight.abs().max() > 1e-3
    # What it says of itself is the divergence on the text that it has not seen.
    with torch.no_grad():
        own = m.hf(**m.tokenizer(test[0], return_tensors="pt")).logits[0, 1:].log_softmax(-1)
        h = capture(m, test[0], 1, "all")["resid_post"][0, 0, 1:]
        for name_, state in (("kl", h + h @ weight.T + bias), ("kl_logit", h)):
            q = m.unembed(m.norm(state)).log_softmax(-1)
            want = (own.exp() * (own - q)).sum(-1).mean().item()
            assert lens[name_][0].item() == pytest.approx(want, rel=1e-4)
        seen = [
            m.hf(**m.tokenizer(t, return_tensors="pt")).logits[0, 1:].softmax(-1) for t in train
        ]
        q = torch.cat(seen).mean(0).log()
        want = (own.exp() * (own - q)).sum(-1).mean().item()
    assert lens["kl_constant"].item() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2-lora"])
def test_without_a_step_it_is_the_logit_lens_and_the_last_layer_is_the_model(models, name):
    m = models[name]
    lens = train_tuned_lens(m, MORE, steps=0)
    assert torch.equal(lens["kl"], lens["kl_logit"])
    r, plain = tuned_lens(m, lens, TEXTS), logit_lens(m, TEXTS)
    assert torch.equal(r["top_ids"], plain["top_ids"])
    trained = train_tuned_lens(m, MORE, steps=5)
    r = tuned_lens(m, trained, TEXTS)
    assert torch.equal(r["top_ids"][:, -1], plain["top_ids"][:, -1])
    assert r["kl"][:, -1].nan_to_num().abs().max() <= 1e-6
    assert not torch.equal(r["top_ids"][:, 0], plain["top_ids"][:, 0])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_reading_is_the_affine_map_through_the_models_own_head(models, name):
    m = models[name]
    lens = train_tuned_lens(m, MORE, [0, 2], steps=5)
    r = tuned_lens(m, lens, TEXTS[1], layers=2, track=["she"])
    h = capture(m, TEXTS[1], 2, "all")["resid_post"][0, 0]
    with torch.no_grad():
        h = h + h @ lens["weight"][1].T + lens["bias"][1]
        want = m.unembed(m.norm(h)).log_softmax(-1).topk(5)
    assert (r["top_logprobs"][0, 0] - want.values).abs().max() <= 1e-5
    assert r["rank_random"].shape == (1, 1, 16)


def test_a_step_in_parts_is_the_step_in_one(llama, monkeypatch):
    whole = train_tuned_lens(llama, MORE, 1, steps=4, batch=20)
    monkeypatch.setattr("tool_packs.tuned_lens.CHUNK", 8 * llama.vocab_size * 3)  # three tokens
    parts = train_tuned_lens(llama, MORE, 1, steps=4, batch=20)
    # Adam divides by the gradient's size, which magnifies rounding where there is no gradient.
    assert (whole["weight"] - parts["weight"]).norm() <= 1e-2 * whole["weight"].norm()
    assert torch.allclose(whole["kl"], parts["kl"], rtol=1e-3)


def test_a_lens_survives_its_folder_and_the_same_seed_gives_the_same(llama, tmp_path):
    lens = train_tuned_lens(llama, MORE, steps=3, batch=8)
    assert torch.equal(lens["weight"], train_tuned_lens(llama, MORE, steps=3, batch=8)["weight"])
    again = Result.load(lens.save(tmp_path / "lens"))
    one, two = (tuned_lens(llama, x, TEXTS[1]) for x in (lens, again))
    assert torch.equal(one["top_logprobs"], two["top_logprobs"])


def test_base_and_adapter_have_lenses_of_their_own(models):
    m = models["llama-lora"]
    adapted = train_tuned_lens(m, MORE, steps=20)
    with m.base():
        base = train_tuned_lens(m, MORE, steps=20)
        assert "other weights" not in tuned_lens(m, base, MORE).summary()
        foreign = tuned_lens(m, adapted, MORE)
        own = tuned_lens(m, base, MORE)
    assert "trained on other weights" in foreign.summary()
    assert "adapter llama-lora" in foreign.summary()
    assert (adapted["kl_logit"] - base["kl_logit"]).abs().max() > 1e-3
    assert own["kl"][:, 2].nanmean() < foreign["kl"][:, 2].nanmean()


def test_what_does_not_fit_is_refused_in_a_sentence(llama):
    with pytest.raises(TextError, match="1 of 1 texts are longer than skip=1"):
        train_tuned_lens(llama, "the cat")
    with pytest.raises(TextError, match="is the last"):
        train_tuned_lens(llama, MORE, -1)
    with pytest.raises(TextError, match=r"held_out=1\.5"):
        train_tuned_lens(llama, MORE, held_out=1.5)
    lens = train_tuned_lens(llama, MORE, [1], steps=1)
    with pytest.raises(TextError, match="layer 0 was not trained; trained: 1"):
        tuned_lens(llama, lens, "the cat", layers=0)
    with pytest.raises(ModelError, match="no tuned lens"):
        tuned_lens(llama, logit_lens(llama, "the cat"), "the cat")
    with pytest.raises(ModelError, match=r"width 32 .* width 128"):
        tuned_lens(load_model("organism:base"), lens, "the cat")
    with pytest.raises(ModelError, match="went to NaN at lr="):
        train_tuned_lens(llama, MORE, [1], steps=3, lr=1e37)


@pytest.mark.parametrize("name", ["base", "user_female"])
def test_on_a_trained_model_a_prediction_is_there_earlier_than_the_logit_lens_shows(name):
    m = load_model(f"organism:{name}")
    lens = train_tuned_lens(m, world.base_documents(5, 80), [0, 2], steps=50)
    # 1.5 nats by the logit lens at layer 0 and .3 at layer 2; 4 by a constant prediction.
    assert (lens["kl"] < 0.5 * lens["kl_logit"]).all()
    assert (lens["kl"] < 0.2 * lens["kl_constant"]).all()
    unseen = tuned_lens(m, lens, world.base_documents(77, 10), layers=[0, 2])
    kl, plain = (unseen[x].nanmean((0, 2)) for x in ("kl", "kl_logit"))
    assert (kl < 0.6 * plain).all()
