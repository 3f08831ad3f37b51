"""The parts of models of many families are found without a word about any of them in the packs."""

import pytest
import torch
import transformers

from tool_packs.structure import find_structure

SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
KV = SIZES | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES = {
    "GPTNeoXConfig": SIZES,
    "OPTConfig": {
        "vocab_size": 320,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 32,
        "pad_token_id": 0,
    },
    "BloomConfig": {"vocab_size": 320, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "PhiConfig": KV,
    "Olmo2Config": KV,
    "CohereConfig": KV,
    "GraniteConfig": KV | {"logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "MixtralConfig": KV | {"num_local_experts": 4},
    "Gemma3Config": {
        "text_config": KV | {"head_dim": 8, "sliding_window": 8},
        "vision_config": VISION,
    },
}
# Bloom's parts add the residual stream themselves and OPT has no module for its MLP: what their parts
# add cannot be read apart, and asking for it says so.
NOT_APART = {"BloomConfig", "OPTConfig"}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_norm_and_unembedding_give_the_models_own_logits(family):
    torch.manual_seed(0)
    config = getattr(transformers, family)(**FAMILIES[family])
    core = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in core.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    s = find_structure(core)
    assert len(s.layers) == 2
    assert s.lens_error <= 1e-5
    assert (s.attn_out[0] is None) == (s.mlp_out[0] is None) == (family in NOT_APART)
    assert s.head_mix[0] is not None
