"""Batched answers are those that transformers gives to each conversation alone."""

import pytest
import torch

from tests.packs.tiny import ARCHITECTURES, TEXTS
from tool_packs.engine import Intervention
from tool_packs.errors import TextError
from tool_packs.generation import generate, next_token

EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]
CHATS = [
    "Who are you?",
    [{"role": "user", "content": "the cat sat on the mat and the dog said that"}],
    [{"role": "system", "content": "she"}, {"role": "user", "content": "a city"}],
]


def alone(m, text, steps=12, special=True):
    """transformers' greedy answer to one text."""
    ids = m.tokenizer(text, add_special_tokens=special, return_tensors="pt")
    keys = {k: ids[k] for k in ("input_ids", "attention_mask")}
    with torch.no_grad():
        out = m.hf.generate(**keys, max_new_tokens=steps, do_sample=False, pad_token_id=m.pad_id)
    return out[0, ids["input_ids"].shape[1] :].tolist()


def answers(r):
    return [[t for t in row.tolist() if t >= 0] for row in r["tokens"]]


@pytest.mark.parametrize("name", EVERY)
def test_greedy_answers_equal_transformers_one_by_one(models, name):
    m = models[name]
    r = generate(m, TEXTS, raw=True, max_new_tokens=12)
    assert answers(r) == [alone(m, text) for text in TEXTS]


@pytest.mark.parametrize("name", EVERY)
def test_chats_equal_the_rendered_template_one_by_one(models, name):
    m = models[name]
    r = generate(m, CHATS, max_new_tokens=12)
    for conv, got in zip(CHATS, answers(r), strict=True):
        chat = [{"role": "user", "content": conv}] if isinstance(conv, str) else conv
        text = m.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert got == alone(m, text, special=False)


def test_logprobs_are_those_of_the_unsteered_model_at_each_token(models):
    for m in models.values():
        r = generate(m, TEXTS, raw=True, max_new_tokens=6, logprobs=3)
        for i, text in enumerate(TEXTS):
            prompt = m.tokenizer(text)["input_ids"]
            tokens = [t for t in r["tokens"][i].tolist() if t >= 0]
            with torch.no_grad():
                logits = m.hf(input_ids=torch.tensor([prompt + tokens])).logits[0].float()
            want = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            got = r["logprobs"][i, : len(tokens)]
            assert torch.allclose(
                got, want.gather(1, torch.tensor(tokens)[:, None])[:, 0], atol=1e-4
            )
            assert torch.allclose(
                r["top_logprobs"][i, : len(tokens)], want.topk(3).values, atol=1e-4
            )


def test_an_answer_ends_at_the_end_token_and_its_neighbours_go_on(llama):
    first = answers(generate(llama, TEXTS, raw=True, max_new_tokens=8))
    ending = first[0][2]
    config = llama.core.generation_config
    before, config.eos_token_id = config.eos_token_id, [ending, 1]
    try:
        r = generate(llama, TEXTS, raw=True, max_new_tokens=8)
        for row, whole in zip(answers(r), first, strict=True):
            cut = whole.index(ending) + 1 if ending in whole else len(whole)
            assert row == whole[:cut]
        assert r["finished"][0] is True
        assert torch.isnan(r["logprobs"][0, len(answers(r)[0]) :]).all()
    finally:
        config.eos_token_id = before


def test_samples_depend_on_seed_and_row_but_not_on_the_batch(llama):
    def sample(convs, seed=0, **options):
        return generate(
            llama, convs, n=3, temperature=1.0, seed=seed, max_new_tokens=6, raw=True, **options
        )["text"]

    together = sample(TEXTS)
    assert together == sample(TEXTS)
    assert together != sample(TEXTS, seed=1)
    assert together[:3] == sample(TEXTS[:1])
    assert len(set(together[:3])) > 1


def test_sampling_follows_the_distribution(llama):
    r = generate(llama, "the cat", raw=True, n=600, temperature=1.0, max_new_tokens=1, seed=5)
    n = next_token(llama, "the cat", k=3)
    for token, logprob in zip(n["top_ids"][0], n["top_logprobs"][0], strict=True):
        share = (r["tokens"][:, 0] == token).float().mean()
        assert abs(share - logprob.exp()) < 4 * (logprob.exp() / 600).sqrt()


def test_a_tiny_top_p_is_greedy(llama):
    greedy = generate(llama, TEXTS, raw=True, max_new_tokens=6)["text"]
    narrow = generate(
        llama, TEXTS, raw=True, max_new_tokens=6, temperature=1.0, top_p=1e-6, seed=9
    )["text"]
    assert narrow == greedy


def test_rows_are_steered_each_in_its_own_way(llama):
    vector = torch.randn(llama.width, generator=torch.Generator().manual_seed(0)) * 8
    one, two = Intervention(1, vector), Intervention(2, -vector, start="last")
    mixed = generate(llama, [TEXTS[1]] * 4, raw=True, steer=[None, one, two, (one, two)])["text"]
    apart = [
        generate(llama, TEXTS[1], raw=True, steer=s)["text"][0]
        for s in (None, one, two, (one, two))
    ]
    assert mixed == apart
    assert len(set(mixed)) == 4


def test_steer_of_the_wrong_length_is_refused(llama):
    with pytest.raises(TextError, match="entries for 4 rows"):
        generate(llama, TEXTS, steer=[None])
    with pytest.raises(TextError, match="no Intervention"):
        generate(llama, TEXTS[:1], steer=[torch.ones(3)])


def test_next_token_gives_the_models_own_probabilities(models):
    for m in models.values():
        r = next_token(m, TEXTS, ["he", "she"])
        for i, text in enumerate(TEXTS):
            with torch.no_grad():
                logits = m.hf(**m.tokenizer(text, return_tensors="pt")).logits[0, -1].float()
            top = logits.log_softmax(-1).topk(10)
            assert torch.equal(r["top_ids"][i], top.indices)
            assert torch.allclose(r["top_logprobs"][i], top.values, atol=1e-5)
        assert all(0 < p < 1 for p in r["he"])


def test_a_chat_that_cannot_be_rendered_says_why(llama):
    with pytest.raises(TextError, match="needs 'role' and 'content'"):
        generate(llama, [{"role": "user"}])
    with pytest.raises(TextError, match="prefill already"):
        generate(llama, [{"role": "assistant", "content": "hm"}], prefill="hm")
    with pytest.raises(TextError, match="neither a str nor a chat"):
        generate(llama, [3])


def test_samples_share_their_prefix_and_each_equals_its_own_run(models):
    for m in models.values():
        change = Intervention(1, torch.ones(m.width), 0.5, start="last")
        for steer in (None, [None, change, None, change]):
            one = generate(m, TEXTS, raw=True, max_new_tokens=6, steer=steer)["text"]
            three = generate(m, TEXTS, raw=True, max_new_tokens=6, n=3, steer=steer)
            assert three["text"] == [text for text in one for _ in range(3)]
            assert three["sample"] == [0, 1, 2] * 4
