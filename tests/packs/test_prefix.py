"""A beginning that prompts share is computed once, and no answer changes for it."""

import pytest
import torch
import transformers as t

from tests.packs.test_families import NEWER, make
from tests.packs.tiny import ARCHITECTURES, COMMON
from tool_packs import prefix
from tool_packs.engine import Intervention, make_batch, step_logits
from tool_packs.generation import generate, last_logits
from tool_packs.prompts import read

LONG = "the cat sat on the mat and the dog said that she is here and the nurse is in the house "
OTHER = "Paris and London and the hill, the doctor said that he is here and the cat is on the mat "
ENDS = ("the dog", "Who are you? Name a city.", "she", "he said that the house on the hill is", "a")
TEXTS = [LONG * 2 + end for end in ENDS] + [OTHER * 2 + end for end in ENDS]
EVERY = [*ARCHITECTURES, *(f"{name}-lora" for name in ARCHITECTURES)]


@pytest.fixture
def reuse(monkeypatch):
    """Turns the reuse off and on, and counts the tokens of the passes."""
    seen = []
    real = prefix.step_logits

    def counted(m, ids, mask, positions, cache):
        seen.append(ids.numel())
        return real(m, ids, mask, positions, cache)

    monkeypatch.setattr(prefix, "step_logits", counted)

    class Reuse:
        tokens = seen

        def off(self):
            seen.clear()
            monkeypatch.setattr(prefix, "WORTH_SHARE", 2.0)

        def on(self):
            seen.clear()
            monkeypatch.setattr(prefix, "WORTH_SHARE", 0.25)

    return Reuse()


@pytest.mark.parametrize("name", EVERY)
def test_greedy_answers_are_those_without_reuse_token_by_token(models, name, reuse):
    m = models[name]
    m.plain_cache = None
    reuse.off()
    want = generate(m, TEXTS, raw=True, max_new_tokens=12)
    without = sum(reuse.tokens)
    reuse.on()
    got = generate(m, TEXTS, raw=True, max_new_tokens=12)
    assert torch.equal(got["tokens"], want["tokens"])
    close = torch.isclose(got["logprobs"], want["logprobs"], atol=1e-4, equal_nan=True)
    assert close.all()
    assert sum(reuse.tokens) < 0.5 * without


def test_a_padded_row_reaches_as_far_back_as_its_window(models, reuse):
    """The wrong way beside ours: padding between the shared beginning and the end of a row."""
    m = models["gemma2"]  # sliding window of 6
    prompts = read(m, [LONG * 2 + text for text in TEXTS[:5]])
    batch = make_batch(m, prompts, list(range(5)))
    truth, _ = step_logits(m, batch.ids, batch.mask, batch.positions, None)
    ours, _ = prefix.prefill(m, batch)
    assert len(reuse.tokens) >= 2
    assert (ours - truth).abs().max() < 1e-4

    shared = min(prefix._common(prompts[0].ids, p.ids) for p in prompts[1:])
    one = torch.tensor([prompts[0].ids[:shared]])
    _, cache = step_logits(m, one, torch.ones_like(one), torch.arange(shared)[None], None)
    cache.batch_repeat_interleave(5)
    ends = [list(p.ids[shared:]) for p in prompts]
    width = max(map(len, ends))
    ids = torch.tensor([[m.pad_id] * (width - len(e)) + e for e in ends])
    mask = torch.tensor([[1] * shared + [0] * (width - len(e)) + [1] * len(e) for e in ends])
    positions = (mask.cumsum(1) - 1)[:, shared:]
    wrong, _ = step_logits(m, ids, mask, positions, cache)
    padded = [i for i, e in enumerate(ends) if len(e) < width]
    assert (wrong - truth)[padded].abs().max() > 0.05


VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(0)) * 4
EARLY, LATE = Intervention(1, VECTOR), Intervention(2, -VECTOR, start="last")
PART = Intervention(0, VECTOR, 0.5, start=3, stop=9)
STEERED = {  # and whether the beginning stays the same for all rows
    "all alike from the start": ([(EARLY,)] * 10, True),
    "all alike in the end": ([(LATE,)] * 10, True),
    "differently in the end": ([(LATE,), (), (-LATE, LATE), (2 * LATE,), ()] * 2, True),
    "alike in a part, differently in the end": ([(PART,), (PART, LATE)] * 5, True),
    "each in its own way": ([(s * EARLY,) for s in range(10)], False),
    "some from the start": ([(), (EARLY,), (LATE,), (EARLY, LATE), (PART,)] * 2, False),
}


@pytest.mark.parametrize("case", STEERED)
def test_rows_share_what_is_steered_alike_and_nothing_else(models, reuse, case):
    steer, alike = STEERED[case]
    for name in ("llama", "gemma3"):
        m = models[name]
        prompts = read(m, TEXTS)
        reuse.off()
        want = last_logits(m, prompts, steer)
        without = sum(reuse.tokens)
        reuse.on()
        got = last_logits(m, prompts, steer)
        assert (got - want).abs().max() < 1e-3
        assert (sum(reuse.tokens) < 0.5 * without) is alike


def test_reuse_is_a_matter_of_tokens_saved(models, reuse):
    m = models["llama"]
    reuse.on()
    last_logits(m, read(m, ["the cat", "the dog", "the mat"]))
    assert len(reuse.tokens) == 1
    reuse.on()
    last_logits(m, read(m, [LONG * 2 + "she"] * 6))  # the same text six times
    assert reuse.tokens[0] + reuse.tokens[-1] < 200


@pytest.mark.parametrize("name", ["bamba", "mamba2", "mixtral", "gemma3-multimodal"])
def test_a_model_with_another_memory_is_left_alone(name, reuse):
    m = make(name, NEWER[name]())
    prompts = read(m, TEXTS)
    reuse.off()
    want = last_logits(m, prompts)
    reuse.on()
    got = last_logits(m, prompts)
    assert (got - want).abs().max() < 1e-4
    assert m.plain_cache is (name in ("mixtral", "gemma3-multimodal"))


def test_angles_that_depend_on_the_length_are_not_shared():
    config = t.LlamaConfig(
        **COMMON | {"max_position_embeddings": 64},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    )
    assert prefix._probe(make("llama", config)) is False


def test_samples_after_a_shared_beginning_are_those_without(models, reuse):
    m = models["gemma2-lora"]
    options = {"raw": True, "max_new_tokens": 6, "n": 3, "temperature": 1.0, "seed": 4}
    reuse.off()
    want = generate(m, TEXTS, **options)["text"]
    reuse.on()
    assert generate(m, TEXTS, **options)["text"] == want
