"""Makes tests/packs/fixtures/transformer_lens_patching.json: exact patching by TransformerLens 4.3.

    uv venv --python 3.11 PEER
    uv pip install --python PEER/bin/python transformer-lens==4.3.0
    PEER/bin/python -P benchmarks/peer_fixtures/transformer_lens_patching.py

(-P: or else Python would look for packages beside this file.) The models are random ones, whose
weights `make_model` writes from a seed in the order of their names: a test builds them again and
compares `checksum` first. The fixture, for each model: checksum; clean and corrupt, the logit
difference of WORDS after each prompt; and that difference with one cell of the corrupt run patched
from the clean one: resid_pre, attn_out, mlp_out [layer][position], and heads [layer][head] (z at
all positions together).
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

OUT = Path(__file__).parents[2] / "tests" / "packs" / "fixtures" / "transformer_lens_patching.json"
COMMON = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT2 = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS = {
    "llama": ("LlamaConfig", {**COMMON, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**COMMON, "tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": (
        "Gemma2Config",
        {**COMMON, "query_pre_attn_scalar": 8, "final_logit_softcapping": 5.0},
    ),
}
CLEAN = "w7 w44 w33 w9 w41 w5 w50 w8"  # not w10 to w29: the special w1 and w2 are cut out of them
CORRUPT = "w7 w44 w34 w9 w41 w6 w50 w8"
WORDS = (24, 25)
SITES = ("resid_pre", "attn_out", "mlp_out")


def make_model(name):
    """A model with random weights, norms and biases included."""
    kind, arguments = CONFIGS[name]
    config = getattr(transformers, kind)(**arguments)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(list(CONFIGS).index(name))
    with torch.no_grad():
        for _, parameter in sorted(hf.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return hf


def checksum(hf):
    """A number that changes with the weights, their order included."""
    total = 0.0
    for _, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().double().flatten()
        total += float((flat * torch.linspace(1, 2, flat.numel(), dtype=torch.float64)).sum())
    return total


def make_tokenizer():
    """The words w0 to w63 are the tokens 0 to 63; w0 is a BOS that it puts before a text."""
    raw = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w3"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="w0 $A", special_tokens=[("w0", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="w0",
        eos_token="w1",
        pad_token="w2",
        name_or_path="tiny",
        add_bos_token=True,  # or the peer would look for it on the hub
    )


def case(name):
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    hf, tokenizer = make_model(name), make_tokenizer()
    weights = checksum(hf)  # before the peer takes the model apart
    bridge = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer)

    def metric(logits):  # [1, T, V]
        return logits[0, -1, WORDS[0]] - logits[0, -1, WORDS[1]]

    clean, corrupt = (tokenizer(t, return_tensors="pt")["input_ids"] for t in (CLEAN, CORRUPT))
    sweeps = {site: getattr(patching, f"get_act_patch_{site}") for site in SITES}
    sweeps["heads"] = patching.get_act_patch_attn_head_out_all_pos
    with torch.no_grad():
        high, cache = bridge.run_with_cache(clean)
        low = bridge(corrupt)
        found = {site: run(bridge, corrupt, cache, metric) for site, run in sweeps.items()}
    return {
        "checksum": weights,
        "clean": metric(high).item(),
        "corrupt": metric(low).item(),
        **{site: torch.as_tensor(values).tolist() for site, values in found.items()},
    }


if __name__ == "__main__":
    fixture = {"transformer_lens": version("transformer_lens")}
    fixture |= {name: case(name) for name in CONFIGS}
    OUT.write_text(json.dumps(fixture) + "\n")
