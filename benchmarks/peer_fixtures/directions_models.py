"""The tiny models and texts on which directions are compared with steering-vectors and repeng.

Nothing is downloaded: a configuration, a seed and a checksum stand for a model, in the scripts that
write the fixtures and in the test that reads them (tests/packs/test_peers_directions.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

FIXTURES = Path(__file__).parents[2] / "tests" / "packs" / "fixtures"
VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 16,
    "n_layer": 5,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON | {"head_dim": 4}),
    "qwen3": ("Qwen3Config", COMMON | {"head_dim": 8}),
    "gpt2": ("GPT2Config", GPT2),
}
SEED = 7
# Partners differ in one word, and the texts in length: w5 against w6, with one to four words around.
POS = [f"w{10 + i} w5" + f" w{20 + i}" * (i % 4) + f" w{40 + i % 5}" for i in range(14)]
NEG = [text.replace("w5 ", "w6 ") for text in POS]
PROMPT = "w9 w12 w33 w5 w48 w7"


def make_model(kind: str, arguments: dict[str, Any], seed: int) -> Any:
    """A model of this configuration, its weights drawn in the order of their names."""
    config = getattr(transformers, kind)(**arguments)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(hf.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(0.25 * noise)
    return hf


def checksum(hf: Any) -> float:
    """A number that changes with the weights, their order included."""
    total = 0.0
    for _, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().double().flatten()
        total += float((flat * torch.linspace(1, 2, flat.numel(), dtype=torch.float64)).sum())
    return total


def make_tokenizer() -> Any:
    """Words w3 to w63 are the tokens 3 to 63; <bos> is put before a text.

    It gives no token_type_ids: GPT-2 would add the embedding of token 0 to every token.
    """
    words = {"<bos>": 0, "<eos>": 1, "<pad>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="w3"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_input_names=["input_ids", "attention_mask"],
    )


def write(peer: str, version: str, cases: dict[str, Any]) -> None:
    """The fixture of this peer: for each model what makes it and what the peer says of it."""
    for name, case in cases.items():
        kind, arguments = CONFIGS[name]
        hf = make_model(kind, arguments, SEED)
        case |= {"kind": kind, "arguments": arguments, "seed": SEED, "checksum": checksum(hf)}
    document = {
        peer: version,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pos": POS,
        "neg": NEG,
        "prompt": PROMPT,
        "models": cases,
    }
    FIXTURES.mkdir(exist_ok=True)
    path = FIXTURES / f"{peer}.json"
    path.write_text(json.dumps(rounded(document)) + "\n", encoding="utf-8")
    print(f"{path.name}: {', '.join(cases)}; {path.stat().st_size / 1000:.0f} kB")


def rounded(value: Any) -> Any:
    """Floats to the nine digits that a float32 has; a checksum keeps its own."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {k: v if k == "checksum" else rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
