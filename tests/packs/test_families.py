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
from tool_packs.errors import ModelError, StructureUnknown
from tool_packs.generation import generate, next_token
from tool_packs.loading import quiet_peft
from tool_packs.logit_lens import logit_lens
from tool_packs.models import Model
from tool_packs.steering import intervention
from tool_packs.structure import first_tensor

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

MOE = {"num_experts_per_tok": 2}
SSM = {"mamba_d_state": 8}
NEWEST = {
    "gpt-oss": lambda: t.GptOssConfig(
        **COMMON, **MOE, head_dim=8, num_local_experts=4, sliding_window=6
    ),
    "qwen3-next": lambda: t.Qwen3NextConfig(
        **COMMON,
        **MOE,
        head_dim=8,
        num_experts=4,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
    ),
    "deepseek-v3": lambda: t.DeepseekV3Config(
        **COMMON | {"num_key_value_heads": 4},
        **MOE,
        moe_intermediate_size=16,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_group=1,
        topk_group=1,
    ),
    "phimoe": lambda: t.PhimoeConfig(**COMMON, num_local_experts=4),
    "llama4-text": lambda: t.Llama4TextConfig(
        **COMMON, head_dim=8, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=64
    ),
    "jamba": lambda: t.JambaConfig(
        **COMMON,
        **SSM,
        mamba_d_conv=4,
        num_experts=2,
        num_experts_per_tok=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "falcon-h1": lambda: t.FalconH1Config(
        **COMMON,
        **SSM,
        head_dim=8,
        mamba_d_ssm=64,
        mamba_n_heads=8,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_chunk_size=16,
    ),
    "zamba2": lambda: t.Zamba2Config(
        **COMMON,
        **SSM,
        n_mamba_heads=8,
        mamba_ngroups=1,
        mamba_headdim=8,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        chunk_size=16,
    ),
    "lfm2": lambda: t.Lfm2Config(**COMMON, full_attn_idxs=[1, 3]),
    "qwen2-5-vl-multimodal": lambda: t.Qwen2_5_VLConfig(
        text_config={**COMMON, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    ),
    "llava-multimodal": lambda: t.LlavaConfig(
        text_config=t.LlamaConfig(**COMMON, head_dim=8),
        vision_config=t.CLIPVisionConfig(**VISION, projection_dim=16),
        image_token_index=5,
    ),
}
# These carry along what the attention mask hides.
CARRY_PADDING = {
    "recurrent-gemma": lambda: t.RecurrentGemmaConfig(
        **COMMON, lru_width=32, attention_window_size=6
    ),
    "rwkv": lambda: t.RwkvConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=4,
        attention_hidden_size=32,
        context_length=64,
    ),
}
ORDINARY = (*NEWER, "gpt-oss", "qwen3-next")
NEW = [
    n if n in ORDINARY else pytest.param(n, marks=pytest.mark.slow)
    for n in NEWER | NEWEST
    if n != "mamba2"
]


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


@pytest.mark.parametrize("name", NEW)
def test_newer_families_read_steer_and_write(name):
    m = make(name, (NEWER | NEWEST)[name]())
    assert m.n_layers == 4
    assert m.lens_exact
    assert m.ignores_padding
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


@pytest.mark.parametrize("name", CARRY_PADDING)
def test_a_model_that_carries_padding_along_is_given_none(name):
    m = make(name, CARRY_PADDING[name]())
    assert not m.ignores_padding
    got = capture(m, TEXTS, "all", "last")["resid_post"][:, :, 0]
    want = torch.stack([naive(m, text)[0][:, -1] for text in TEXTS])
    assert close(got, want, torch.float32)
    # The wrong answer: the last layer of the batch that transformers makes of the texts.
    given = m.tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="left")
    seen = []
    handle = m.layers[-1].register_forward_hook(lambda _, __, out: seen.append(first_tensor(out)))
    try:
        with torch.no_grad():
            m.hf(**given)
    finally:
        handle.remove()
    assert not close(seen[0][:, -1], want[:, -1], torch.bfloat16)
    with pytest.raises(ModelError, match=r"keeps no key-value cache.*m\.hf"):
        generate(m, TEXTS[0], raw=True, max_new_tokens=2)


def test_a_stream_of_several_copies_says_that_its_layers_are_not_residual():
    config = t.Gemma3nTextConfig(
        **COMMON,
        head_dim=8,
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        altup_num_inputs=2,
        laurel_rank=4,
        num_kv_shared_layers=0,
        sliding_window=6,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 4,
    )
    with pytest.raises(StructureUnknown, match=r"Gemma3nForCausalLM.*do not put out.*layers="):
        make("gemma3n", config)
