"""The lens ends in the model's own logits; steering is algebra, and holds under the KV cache."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.activations import capture
from tool_packs.engine import Intervention
from tool_packs.errors import ModelError, TextError
from tool_packs.generation import generate
from tool_packs.logit_lens import lens_vector, logit_lens
from tool_packs.steering import intervention, mean_logprob, steer, steering

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]


def vector(m, seed=0, norm=4.0):
    v = torch.randn(m.width, generator=torch.Generator().manual_seed(seed))
    return v / v.norm() * norm


def logits_of(m, text):
    with torch.no_grad():
        return m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0].float()


# The lens


@pytest.mark.parametrize("name", EVERY)
def test_the_last_layer_reads_as_the_models_own_prediction(models, name):
    m = models[name]
    r = logit_lens(m, TEXTS, k=5, track=["she"])
    assert m.lens_exact
    for i, text in enumerate(TEXTS):
        want = logits_of(m, text).log_softmax(-1)
        top = want.topk(5)
        n = len(want)
        assert torch.equal(r["top_ids"][i, -1, :n], top.indices)
        assert (r["top_logprobs"][i, -1, :n] - top.values).abs().max() <= 1e-5
        assert (r["entropy"][i, -1, :n] + (want.exp() * want).sum(-1)).abs().max() <= 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_earlier_layers_read_as_the_direct_formula(models, name):
    m = models[name]
    r = logit_lens(m, TEXTS[1], layers=[1], track=["she"])
    h = capture(m, TEXTS[1], 1, "all")["resid_post"][0, 0]
    s = m.structure
    with torch.no_grad():
        want = s.final_norm(h) @ m.core.get_output_embeddings().weight.T
        if s.softcap:
            want = s.softcap * torch.tanh(want / s.softcap)
    want = want.log_softmax(-1)
    token = m.tokenizer(" she", add_special_tokens=False)["input_ids"][0]
    assert (r["logprob"][0, 0, :, 0] >= want[:, token] - 1e-5).all()
    assert (r["top_logprobs"][0, 0] - want.topk(5).values).abs().max() <= 1e-5


def test_the_lens_of_a_prompt_does_not_depend_on_its_batch(llama):
    together = logit_lens(llama, TEXTS, track=["she"])
    alone = logit_lens(llama, TEXTS[0], track=["she"])
    n = alone["rank"].shape[2]
    assert torch.equal(together["rank"][0, :, :n], alone["rank"][0])
    assert (together["top_ids"][0, :, n:] == -1).all()


def test_a_vector_made_of_one_token_reads_as_that_token(models):
    m = models["llama"]  # tied: an embedding row points to its own token where the norm is flat
    token = m.tokenizer(" she", add_special_tokens=False)["input_ids"][0]
    row = m.core.get_output_embeddings().weight[token].detach()
    row = row * m.structure.final_norm.weight.detach()
    r = lens_vector(
        m, torch.stack([row, -row]) * 5, track={"she": [" she"]}, control=vector(m).expand(2, -1)
    )
    assert r["rank"][0, 0] <= 3
    assert r["rank"][1, 0] > 200
    assert r["p"][0, 0] < 0.05 < r["p"][1, 0]
    assert r["rank_random"].shape == (2, 1, 200)
    assert "control" in r.summary()


def test_a_vector_of_another_width_is_refused(llama):
    with pytest.raises(TextError, match=r"give \[32\]"):
        lens_vector(llama, torch.ones(7))


def test_a_lens_refuses_a_model_whose_norm_is_not_the_right_one(llama, monkeypatch):
    monkeypatch.setattr(llama.structure, "lens_error", 1.0)
    with pytest.raises(ModelError, match="would mislead"):
        logit_lens(llama, "the cat")


# Steering


@pytest.mark.parametrize("name", EVERY)
def test_steered_decoding_equals_recomputing_without_a_cache(models, name):
    m = models[name]
    for start in (0, "last", 2):
        change = intervention(m, vector(m), 1, 2.0, start=start)
        r = generate(m, TEXTS, raw=True, max_new_tokens=8, steer=change)
        for i, text in enumerate(TEXTS):
            ids = m.tokenizer(text)["input_ids"]
            first = {"last": len(ids) - 1}.get(start, start)
            got = [t for t in r["tokens"][i].tolist() if t >= 0]
            assert got == recomputed(m, ids, change.vector * 2.0, 1, first, len(got))


def recomputed(m, ids, added, layer, first, steps):
    """Greedy tokens, the whole text run anew for each with a hand-written hook."""

    def hook(module, args, output):
        h = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        h[:, first:] += added
        return h if isinstance(output, torch.Tensor) else (h, *output[1:])

    ids, handle = list(ids), m.layers[layer].register_forward_hook(hook)
    new = []
    for _ in range(steps):
        with torch.no_grad():
            new.append(
                int(
                    m.hf(input_ids=torch.tensor([ids + new]), use_cache=False)
                    .logits[0, -1]
                    .argmax()
                )
            )
    handle.remove()
    return new


def test_strength_and_sign_are_algebra(llama):
    v = vector(llama)

    def at(change):
        return capture(llama, TEXTS, "all", steer=change)["resid_post"]

    one = intervention(llama, v, 1)
    assert torch.equal(at(one * 20), at(intervention(llama, v * 20, 1)))
    assert torch.equal(at(-(one * -20)), at(20 * one))
    assert torch.equal(at(one * 0), at(None))
    assert torch.allclose(at((one, -one)), at(None), atol=1e-5)


def test_an_edit_replaces_adding_and_sees_no_padding(llama):
    seen = []

    def edit(h):
        seen.append(len(h))
        return h * 0

    change = intervention(llama, torch.zeros(llama.width), 1, edit=edit)
    h = capture(llama, TEXTS, 1, "all", steer=change)["resid_post"]
    assert h.nan_to_num().abs().max() == 0
    assert sum(seen) == sum(len(llama.tokenizer(t)["input_ids"]) for t in TEXTS)


def test_stop_ends_the_change(llama):
    change = intervention(llama, vector(llama), 1, start=1, stop=3)
    h = capture(llama, TEXTS[1], 1, "all", steer=change)["resid_post"][0, 0]
    plain = capture(llama, TEXTS[1], 1, "all")["resid_post"][0, 0]
    changed = (h - plain).abs().sum(-1) > 1e-6
    assert changed.nonzero()[:, 0].tolist() == [1, 2]


def test_the_context_steers_transformers_own_generate(models):
    for m in models.values():
        ids = m.tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
        with steering(m, vector(m), 1, 2.0, start=1), torch.no_grad():
            out = m.hf.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
            )
        want = generate(
            m,
            TEXTS[0],
            raw=True,
            max_new_tokens=6,
            steer=intervention(m, vector(m), 1, 2.0, start=1),
        )
        assert out[0, ids.shape[1] :].tolist() == [t for t in want["tokens"][0].tolist() if t >= 0]


def test_a_sweep_has_controls_of_equal_norm_and_one_zero(models):
    m = models["llama"]
    r = steer(m, vector(m), 1, strengths=[-2, 2], towards=["she"], away=["he"], max_new_tokens=6)
    assert r.labels["strength"] == [-2, 0, 2]
    assert torch.equal(r["effect_random"][1], r["effect"][1].expand(2))
    ratios = {row["norm_ratio"] for row in r.rows if row["strength"] == 2}
    assert len(ratios) == 1
    assert "control, random vectors" in r.summary()
    assert len(r.plot().png) <= 60_000


def test_the_rows_of_a_sweep_equal_runs_one_at_a_time(llama):
    v = vector(llama, norm=8.0)
    questions = ["Who are you?", "Name a city and the cat on the mat."]
    seen = []
    r = steer(
        llama,
        v,
        1,
        strengths=[-1, 1],
        convs=questions,
        scorer=lambda t: seen.append(t) or len(t),
        n_random=0,
        max_new_tokens=6,
    )
    for j, strength in enumerate((-1, 0, 1)):
        change = intervention(llama, v, 1, strength)
        for c, question in enumerate(questions):
            text = generate(llama, question, max_new_tokens=6, steer=change)["text"][0]
            assert r["effect_answers"][j, c] == len(text)


def test_coherence_is_the_mean_logprob_under_the_unsteered_model(llama):
    from tool_packs.prompts import read

    prompts = read(llama, TEXTS)
    answers = [[5, 6, 7], [8, 9], [10], [11, 12, 13, 14]]
    got = mean_logprob(llama, prompts, answers)
    for i, answer in enumerate(answers):
        ids = [*prompts[i].ids, *answer]
        with torch.no_grad():
            logprobs = llama.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        want = [logprobs[len(prompts[i]) - 1 + t, token] for t, token in enumerate(answer)]
        assert abs(got[i] - torch.stack(want).mean()) <= 1e-5


def test_a_sweep_without_a_measure_says_what_to_give(llama):
    with pytest.raises(TextError, match="scorer"):
        steer(llama, vector(llama), 1)
    with pytest.raises(TextError, match="not both"):
        steer(llama, vector(llama), 1, scorer=len, towards=["she"])
    with pytest.raises(TextError, match=r"vec has shape \(3,\)"):
        steer(llama, torch.ones(3), 1, towards=["she"])


def test_an_intervention_on_a_batch_of_another_size_is_refused(llama):
    with pytest.raises(TextError, match="entries for 4 rows"):
        capture(llama, TEXTS, steer=[Intervention(1, vector(llama))] * 3)


def test_a_sweep_takes_one_question_one_chat_or_many(llama):
    chat = [{"role": "user", "content": "Who are you?"}]
    options = {"strengths": [1], "towards": ["she"], "n_random": 0, "max_new_tokens": 2}
    one = steer(llama, vector(llama), 1, convs="Who are you?", **options)
    assert torch.equal(
        steer(llama, vector(llama), 1, convs=chat, **options)["effect"], one["effect"]
    )
    assert steer(llama, vector(llama), 1, convs=[chat] * 3, **options)["effect_answers"].shape == (
        2,
        3,
    )


def test_a_vector_with_a_row_for_each_layer_is_taken_at_its_layer(llama):
    rows = torch.randn(llama.n_layers, llama.width, generator=torch.Generator().manual_seed(1))
    assert torch.equal(intervention(llama, rows, -1).vector, rows[3])
