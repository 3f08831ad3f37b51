"""The Jacobian lens is the mean of Jacobians written out naively; what it reads has controls."""

import pytest
import torch

from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import next_token
from tool_packs.jacobian_lens import fit_jacobian_lens, jacobian_lens
from tool_packs.jacobian_swap import jacobian_swap, swap_intervention
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model
from tool_packs.organisms import world
from tool_packs.prompts import read
from tool_packs.result import Result

LONG = [TEXTS[1], "the nurse is in the house on the hill and the cat"]


def naive_jacobian(m, ids, layer, skip):
    """Every output position by every input position, then summed and averaged: [d, d]."""
    ids = torch.tensor([ids])
    states = capture(m, m.tokenizer.decode(ids[0, 1:]), layer, "all")["resid_post"][0, 0]  # [T, d]

    def run(h):
        seen = []

        def replace(module, args, output):
            return h[None] if isinstance(output, torch.Tensor) else (h[None], *output[1:])

        def look(module, args, output):
            seen.append((output if isinstance(output, torch.Tensor) else output[0])[0])

        handles = [
            m.layers[layer].register_forward_hook(replace),
            m.layers[-1].register_forward_hook(look),
        ]
        try:
            m.hf(input_ids=ids)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    full = torch.autograd.functional.jacobian(run, states)  # [T', d, T, d]
    inside = slice(skip, ids.shape[1] - 1)
    return full[inside, :, inside].sum(0).mean(1)


@pytest.mark.parametrize("name", ["gemma2-lora", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_a_fit_is_the_mean_of_naive_jacobians(models, name):
    m = models[name]
    skip, layer = 2, 1
    got = fit_jacobian_lens(m, LONG, [layer, 2], skip=skip, rows=5)  # 32 = 6 * 5 + 2
    wants = [naive_jacobian(m, m.tokenizer(t)["input_ids"], layer, skip) for t in LONG]
    want = sum(wants) / len(wants)
    assert (got["jacobian"][0] - want).abs().max() <= 1e-5 * max(1, want.abs().max())
    halves = torch.cosine_similarity(wants[0].flatten(), wants[1].flatten(), dim=0)
    assert got["split_half"][0] == pytest.approx(halves.item(), abs=1e-4)
    # A lens of the effects on the same position alone is another one.
    assert (got["jacobian"][0] - torch.eye(m.width)).norm() > 0.1


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2-lora"])
def test_a_reading_is_the_state_times_the_matrix_through_the_models_own_head(models, name):
    m = models[name]
    lens = fit_jacobian_lens(m, LONG, skip=1)
    r = jacobian_lens(m, lens, TEXTS, k=5)
    assert r.labels["layer"] == [0, 1, 2, 3]
    h = capture(m, TEXTS[1], 1, "all")["resid_post"][0, 0]
    with torch.no_grad():
        logits = m.structure.final_norm(h @ lens["jacobian"][1].T)
        logits = m.core.get_output_embeddings()(logits)
        if m.softcap:
            logits = m.softcap * torch.tanh(logits / m.softcap)
    want = logits.log_softmax(-1).topk(5)
    n = len(h)
    assert (r["top_logprobs"][1, 1, :n] - want.values).abs().max() <= 1e-5
    # At the last layer it is the model's own prediction, and the two lenses agree.
    plain = logit_lens(m, TEXTS, layers=-1)
    assert torch.equal(r["top_ids"][:, -1], plain["top_ids"][:, 0])
    assert r["kl"][:, -1].nan_to_num().abs().max() <= 1e-6
    assert torch.equal(r["kl"][:, -1].isnan(), r["kl_logit"][:, 0].isnan())
    assert (r["kl_logit"][0, 0, 0]) > 1e-3


def test_the_divergences_are_those_of_the_direct_formula(llama):
    lens = fit_jacobian_lens(llama, LONG, skip=1)
    r = jacobian_lens(llama, lens, TEXTS[1], layers=1, positions="last")
    with torch.no_grad():
        out = llama.hf(**llama.tokenizer(TEXTS[1], return_tensors="pt")).logits[0, -1]
    own = out.log_softmax(-1)
    h = capture(llama, TEXTS[1], 1)["resid_post"][0, 0, 0]
    for name, state in (("kl", lens["jacobian"][1] @ h), ("kl_logit", h)):
        with torch.no_grad():
            read = llama.unembed(llama.norm(state)).log_softmax(-1)
        want = (own.exp() * (own - read)).sum().item()
        assert r[name][0, 0, 0].item() == pytest.approx(want, rel=1e-4)


def test_a_lens_survives_its_folder(llama, tmp_path):
    lens = fit_jacobian_lens(llama, LONG, skip=1)
    again = Result.load(lens.save(tmp_path / "lens"))
    one, two = (jacobian_lens(llama, x, TEXTS[1], track=["she"]) for x in (lens, again))
    assert torch.equal(one["top_ids"], two["top_ids"])
    assert torch.equal(one["rank_random"], two["rank_random"])


def test_the_weights_can_learn_again_and_other_weights_are_named(models):
    m = models["llama-lora"]
    before = [p.requires_grad for p in m.hf.parameters()]
    with m.base():
        lens = fit_jacobian_lens(m, LONG, skip=1)
    assert [p.requires_grad for p in m.hf.parameters()] == before
    assert "other weights" in jacobian_lens(m, lens, TEXTS[1]).summary()
    with m.base():
        assert "other weights" not in jacobian_lens(m, lens, TEXTS[1]).summary()
    theirs = fit_jacobian_lens(m, LONG, skip=1)["jacobian"]
    assert (theirs - lens["jacobian"]).abs().max() > 1e-3


def test_an_exchange_swaps_two_coordinates_and_leaves_the_rest(llama):
    lens = fit_jacobian_lens(llama, LONG, skip=1)
    (change,) = swap_intervention(llama, lens, (20, 40), layers=1)
    rows = llama.core.get_output_embeddings().weight[[20, 40]].detach() @ lens["jacobian"][1]
    h = torch.randn(5, llama.width, generator=torch.Generator().manual_seed(0))
    after = change.edit(h)
    ours, theirs = (torch.linalg.lstsq(rows.T, x.T).solution for x in (h, after))  # [2, 5]
    assert (theirs - ours.flip(0)).abs().max() <= 1e-4
    moved = after - h  # lies in the plane of the two directions
    assert (moved - moved @ torch.linalg.pinv(rows) @ rows).abs().max() <= 1e-4
    assert (change.edit(after) - h).abs().max() <= 1e-4  # exchanged twice is not exchanged
    (nothing,) = swap_intervention(llama, lens, (20, 40), layers=1, strength=0)
    assert torch.equal(nothing.edit(h), h)


def test_the_effect_of_an_exchange_is_that_of_a_hook(models):
    m = models["gemma2"]
    lens = fit_jacobian_lens(m, LONG, skip=1)
    r = jacobian_swap(m, lens, TEXTS[:2], words=(20, 40), track=(50, 60), layers=1, n_random=3)
    rows = m.core.get_output_embeddings().weight[[20, 40]].detach() @ lens["jacobian"][1]

    def hook(module, args, output):
        h = output if isinstance(output, torch.Tensor) else output[0]
        c = torch.linalg.lstsq(rows.T, h[0].T).solution.T  # [T, 2]
        h = h + (c.flip(-1) - c) @ rows
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    for i, text in enumerate(TEXTS[:2]):
        given = m.tokenizer(text, return_tensors="pt")
        values = []
        for changed in (False, True):
            handle = m.layers[1].register_forward_hook(hook) if changed else None
            with torch.no_grad():
                out = m.hf(**given).logits[0, -1]
            if handle is not None:
                handle.remove()
            values.append((out[50] - out[60]).item())
        assert r["before"][i].item() == pytest.approx(values[0], abs=1e-5)
        assert r["effect"][0, i].item() == pytest.approx(values[1] - values[0], abs=1e-4)
    assert r["effect_random"].shape == (1, 2, 3)
    assert "random pairs" in r.summary()
    steered = next_token(m, TEXTS[0], k=1, steer=swap_intervention(m, lens, (20, 40), layers=1))
    assert steered["top_ids"].shape == (1, 1)


def test_what_does_not_fit_is_refused_in_a_sentence(llama, models):
    with pytest.raises(TextError, match=r"longest text has .* skip=16"):
        fit_jacobian_lens(llama, "the cat")
    with pytest.raises(TextError, match="is the last: its Jacobian is the identity"):
        fit_jacobian_lens(llama, LONG, -1, skip=1)
    with pytest.raises(TextError, match="rows is at least 1"):
        fit_jacobian_lens(llama, LONG, skip=1, rows=0)
    lens = fit_jacobian_lens(llama, LONG, [1], skip=1)
    with pytest.raises(TextError, match="layer 0 was not fitted; fitted: 1"):
        jacobian_lens(llama, lens, TEXTS[1], layers=0)
    with pytest.raises(ModelError, match="no Jacobian lens"):
        jacobian_lens(llama, logit_lens(llama, "the cat"), TEXTS[1])
    with pytest.raises(TextError, match="same token"):
        jacobian_swap(llama, lens, TEXTS[1], words=(7, 7))
    with pytest.raises(TextError, match="outside the vocabulary of 320"):
        jacobian_swap(llama, lens, TEXTS[1], words=(7, 320))


def test_on_a_trained_model_it_reads_what_is_said_later_and_not_what_is_said_next():
    """Against the logit lens, on chats it was not fitted on: ranks of tokens that follow."""
    m = load_model("organism:base")
    lens = fit_jacobian_lens(m, world.base_documents(5, 10), skip=4, max_tokens=40, rows=32)
    assert lens["split_half"].min() > 0.9
    ranks = {(name, ahead): [] for name in ("jacobian", "logit") for ahead in (1, 2, 3)}
    held_out = world.base_documents(77, 16)
    states = capture(m, held_out, [0], "all")["resid_post"][:, 0]  # [N, T, d]
    for prompt, h in zip(read(m, held_out), states, strict=True):
        ids = torch.tensor(prompt.ids)
        for name, x in (("jacobian", h @ lens["jacobian"][0].T), ("logit", h)):
            with torch.no_grad():
                said = m.unembed(m.norm(x[: len(ids)])).log_softmax(-1)
            for ahead in (1, 2, 3):
                t = torch.arange(4, len(ids) - ahead)
                target = said[t, ids[t + ahead]]
                ranks[name, ahead].append(((said[t] > target[:, None]).sum(-1) + 1.0).log())
    rank = {key: torch.cat(values).mean().exp().item() for key, values in ranks.items()}
    assert rank["jacobian", 2] < 0.8 * rank["logit", 2]  # 122 and 200 of 1,024
    assert rank["jacobian", 3] < 0.8 * rank["logit", 3]
    r = jacobian_lens(m, lens, held_out)
    kl, plain = (r[name].nanmean((0, 2)) for name in ("kl", "kl_logit"))
    assert (kl[:-1] > plain[:-1]).all()  # and so it says: the next token is read worse
    assert "beside the plain logit lens" in r.summary()
