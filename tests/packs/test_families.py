"""Every core technique against naive transformers and hooks, on nine families, plain and with LoRA.

A short form (two families of nine, in float32) is ordinary; the whole matrix is slow.
"""

import copy

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model

from tests.packs.tiny import ARCHITECTURES, COMMON, TEXTS, VOCABULARY, make_tokenizer
from tool_packs.activations import capture
from tool_packs.directions import direction
from tool_packs.errors import ModelError
from tool_packs.generation import generate, next_token
from tool_packs.loading import quiet_peft
from tool_packs.logit_lens import logit_lens
from tool_packs.models import Model
from tool_packs.steering import intervention

NEOX = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
FAMILIES = {
    **ARCHITECTURES,
    "qwen2": lambda: t.Qwen2Config(**COMMON),
    "mistral": lambda: t.MistralConfig(**COMMON, head_dim=8, sliding_window=6),
    "neox": lambda: t.GPTNeoXConfig(**NEOX),
    "phi3": lambda: t.Phi3Config(**COMMON),
}
# What LoRA goes on, by the names that each family gives to its matrices.
TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "neox": ["query_key_value", "dense"],
    "phi3": ["qkv_proj", "o_proj", "down_proj"],
}
SHORT = ("gpt2", "neox")  # one with learned positions, which padding can spoil, and one with rotary
FAMILY = [n if n in SHORT else pytest.param(n, marks=pytest.mark.slow) for n in FAMILIES]
PRECISIONS = [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]

VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
NEWER = {
    "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: t.Qwen3MoeConfig(
        **COMMON, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "olmoe": lambda: t.OlmoeConfig(**COMMON, num_experts=4, num_experts_per_tok=2),
    "bamba": lambda: t.BambaConfig(
        **COMMON,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_d_state=8,
        mamba_expand=2,
        attn_layer_indices=[1],
    ),
    "gemma3-multimodal": lambda: t.Gemma3Config(
        text_config=t.Gemma3TextConfig(
            **COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=6
        ),
        vision_config=VISION,
    ),
    "mamba2": lambda: t.Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=1,
        chunk_size=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
}


def make(name, config, lora=False):
    """A model with random weights, norms included, and where asked a LoRA that changes it."""
    torch.manual_seed(0)
    multimodal = name.endswith("multimodal")
    auto = t.AutoModelForImageTextToText if multimodal else t.AutoModelForCausalLM
    hf = auto.from_config(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    if lora:
        targets = TARGETS.get(name, ["q_proj", "v_proj", "o_proj", "down_proj"])
        fan = name == "gpt2"
        with quiet_peft():
            hf = get_peft_model(
                hf,
                LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan, task_type="CAUSAL_LM"),
            )
        with torch.no_grad():
            for path, parameter in hf.named_parameters():
                if "lora_B" in path:
                    parameter.normal_(std=0.1)
    return Model(hf, make_tokenizer(), name)


@pytest.fixture(scope="module")
def family():
    """Models by family and adapter, made once."""
    made = {}

    def get(name, lora, dtype):
        if (name, lora) not in made:
            made[name, lora] = make(name, FAMILIES[name](), lora)
        m = made[name, lora]
        if dtype == torch.float32:
            return m
        return Model(copy.deepcopy(m.hf).to(dtype), m.tokenizer, name)

    return get


def naive(m, text, change=None):
    """Blocks' outputs [L, T, d] and logits [T, V] of one text alone, by hooks written out here.

    `change` is (layer, vector), added at every token.
    """
    seen, handles = [], []

    def look(module, args, output):
        h = output if isinstance(output, torch.Tensor) else output[0]
        seen.append(h[0].float())

    def add(module, args, output):
        if isinstance(output, torch.Tensor):
            return output + change[1].to(output.dtype)
        return (output[0] + change[1].to(output[0].dtype), *output[1:])

    if change is not None:
        handles.append(m.layers[change[0]].register_forward_hook(add))
    handles += [layer.register_forward_hook(look) for layer in m.layers]
    try:
        with torch.no_grad():
            out = m.hf(**m.tokenizer(text, return_tensors="pt"))
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(seen), out.logits[0].float()


def close(got, want, dtype):
    error = (got.float() - want).abs().max()
    if dtype == torch.float32:
        return error <= 1e-5 * max(1.0, want.abs().max())
    return (got.float() - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("dtype", PRECISIONS, ids=["fp32", "bf16"])
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("name", FAMILY)
class TestFamily:
    def test_capture(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        for text in TEXTS:
            got = capture(m, text, "all", "all")["resid_post"][0]
            assert close(got, naive(m, text)[0], dtype)

    def test_capture_of_a_mixed_batch(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        got = capture(m, TEXTS, "all", "last")["resid_post"][:, :, 0]
        want = torch.stack([naive(m, text)[0][:, -1] for text in TEXTS])
        assert close(got, want, dtype)

    def test_logit_lens_at_the_last_layer(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        assert m.lens_exact
        r = logit_lens(m, TEXTS[1], layers=-1, positions="last", k=1)
        want = naive(m, TEXTS[1])[1][-1].log_softmax(-1).max()
        assert close(r["top_logprobs"][0, 0, 0, 0], want, dtype)

    def test_steering(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        v = torch.randn(m.width, generator=torch.Generator().manual_seed(3))
        got = capture(m, TEXTS[1], "all", "all", steer=intervention(m, v, 1, 2.0))["resid_post"]
        want = naive(m, TEXTS[1], (1, 2.0 * v))[0]
        assert close(got[0], want, dtype)
        assert not close(got[0], naive(m, TEXTS[1])[0], dtype)

    def test_direction(self, family, name, lora, dtype):
        m = family(name, lora, dtype)
        other = [text + " Paris" for text in TEXTS]
        got = direction(m, TEXTS, other, n_null=2)["direction"]
        one, two = (
            torch.stack([naive(m, text)[0][:, -1] for text in side]) for side in (TEXTS, other)
        )
        want = one.mean(0) - two.mean(0)
        # Whatever its length is, it points where the naive one points.
        cosine = torch.cosine_similarity(got.float(), want, dim=-1)
        assert cosine.min() >= (1 - 1e-5 if dtype == torch.float32 else 1 - 1e-2)

    def test_generation_is_that_of_transformers_one_by_one(self, family, name, lora, dtype):
        if dtype != torch.float32:
            pytest.skip("in bfloat16 a tie of two tokens may fall either way")
        m = family(name, lora, dtype)
        r = generate(m, TEXTS, raw=True, max_new_tokens=8)
        for i, text in enumerate(TEXTS):
            given = m.tokenizer(text, return_tensors="pt")
            given.pop("token_type_ids", None)
            with torch.no_grad():
                out = m.hf.generate(
                    **given, max_new_tokens=8, do_sample=False, eos_token_id=m.eos_ids
                )
            want = out[0, given["input_ids"].shape[1] :].tolist()
            assert r["tokens"][i, : len(want)].tolist() == want


@pytest.mark.parametrize("name", [n for n in NEWER if n != "mamba2"])
def test_newer_families_read_steer_and_write(name):
    m = make(name, NEWER[name]())
    assert m.n_layers == 4
    assert m.lens_exact
    for text in TEXTS[:2]:
        got = capture(m, text, "all", "all")["resid_post"][0]
        assert close(got, naive(m, text)[0], torch.float32)
    v = torch.randn(m.width, generator=torch.Generator().manual_seed(3))
    got = capture(m, TEXTS[1], "all", "all", steer=intervention(m, v, 1))["resid_post"][0]
    assert close(got, naive(m, TEXTS[1], (1, v))[0], torch.float32)
    together = generate(m, TEXTS, raw=True, max_new_tokens=5)["text"]
    assert together == [generate(m, x, raw=True, max_new_tokens=5)["text"][0] for x in TEXTS]


def test_a_state_space_model_is_read_and_says_that_it_does_not_generate():
    m = make("mamba2", NEWER["mamba2"]())
    for text in TEXTS[:2]:
        got = capture(m, text, "all", "all")["resid_post"][0]
        assert close(got, naive(m, text)[0], torch.float32)
    want = naive(m, TEXTS[1])[1][-1].log_softmax(-1).max()
    assert close(next_token(m, TEXTS[1], k=1)["top_logprobs"][0, 0], want, torch.float32)
    with pytest.raises(ModelError, match=r"Mamba2ForCausalLM keeps no key-value cache.*m\.hf"):
        generate(m, TEXTS[0], raw=True, max_new_tokens=2)
