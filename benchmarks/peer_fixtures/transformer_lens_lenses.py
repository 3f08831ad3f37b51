"""Makes tests/packs/fixtures/transformer_lens_lenses.json: the lenses and DLA of TransformerLens 4.3.

    uv venv --python 3.11 PEER
    uv pip install --python PEER/bin/python transformer-lens==4.3.0
    PEER/bin/python -P benchmarks/peer_fixtures/transformer_lens_lenses.py

(-P: or else Python would look for packages beside this file.) The models are random ones, whose
weights `fill` writes from a seed in the order of their names: a test builds them again and compares
`checksum` first. The fixture, for each model:

- "logit_lens": targets [prompt], logprob [prompt][layer], rank [prompt][layer] (1 is the top),
  at the last token after each layer.
- "dla", of the models that TransformerLens takes apart rightly (Gemma 2 it does not): components
  [name], values [prompt][component], heads [prompt][layer * heads + head], of WORDS.
- "jacobian": matrices [layer][d][d] fitted on LONG with SKIP; swap [prompt][V], the last token's
  logits with the coordinates of SWAP exchanged after layer 1 at every position.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

OUT = Path(__file__).parents[2] / "tests" / "packs" / "fixtures" / "transformer_lens_lenses.json"
VOCABULARY = 64
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
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
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**COMMON, "head_dim": 4, "tie_word_embeddings": False}),
    "qwen3": ("Qwen3Config", {**COMMON, "head_dim": 8, "tie_word_embeddings": False}),
    "gpt2": ("GPT2Config", GPT2),
    "gemma2": (
        "Gemma2Config",
        {**COMMON, "head_dim": 4, "query_pre_attn_scalar": 4, "final_logit_softcapping": 5.0},
    ),
}
PROMPTS = ["w7 w44 w33 w9", "w61 w52 w40 w41 w42 w8 w30"]  # not w10 to w29: w1, w2 are special
LONG = [
    "w7 w44 w33 w9 w31 w32 w5 w6 w50 w51",
    "w61 w52 w40 w41 w42 w8 w30 w43",
    "w60 w4 w45 w3 w44 w31 w32",
]
WORDS = (24, 25)  # answer and foil
SWAP = (17, 35)
SKIP = 2  # leading positions that the Jacobian is not averaged over


def make_model(name: str) -> Any:
    """A model of this configuration with the weights that `fill` writes."""
    kind, arguments = CONFIGS[name]
    config = getattr(transformers, kind)(**arguments)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    fill(hf, list(CONFIGS).index(name))
    return hf


@torch.no_grad()
def fill(hf: Any, seed: int) -> None:
    """Weights from the seed, by the order of the parameters' names; norms and biases near theirs."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(hf.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.2 * noise)
        else:
            parameter.copy_(0.25 * noise)


def checksum(hf: Any) -> float:
    """A number that changes with the weights, their order included."""
    total = 0.0
    for _, parameter in sorted(hf.named_parameters()):
        flat = parameter.detach().double().flatten()
        total += float((flat * torch.linspace(1, 2, flat.numel(), dtype=torch.float64)).sum())
    return total


def make_tokenizer() -> Any:
    """Words w0 to w63 are the tokens 0 to 63; w0 is a BOS that it puts before a text."""
    words = {f"w{i}": i for i in range(VOCABULARY)}
    raw = Tokenizer(WordLevel(words, unk_token="w3"))
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


def boot(hf: Any, tokenizer: Any) -> Any:
    """A TransformerBridge of the model, with raw weights."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers("tiny", hf_model=hf, tokenizer=tokenizer)
    bridge.cfg.default_prepend_bos = True  # it goes by the architecture (not in Qwen 3)
    return bridge


def logit_lens(bridge: Any, ids: list[list[int]]) -> dict[str, Any]:
    from transformer_lens.tools.analysis import logit_lens as lens

    out: dict[str, Any] = {"targets": [], "logprob": [], "rank": []}
    for row in ids:
        target = (row[-1] + 5) % VOCABULARY
        result = lens(bridge, torch.tensor([row]), targets=target, return_type="log_probs")
        out["targets"].append(target)
        # The first entry is before any layer; the peer's ranks begin at 0.
        out["logprob"].append(result.values.flatten().tolist()[1:])
        out["rank"].append([rank + 1 for rank in result.rank_trajectory().flatten().tolist()[1:]])
    return out


def dla(hf: Any, tokenizer: Any, ids: list[list[int]]) -> dict[str, Any]:
    from transformer_lens.tools.analysis import direct_logit_attribution

    bridge = boot(hf, tokenizer)
    # Value biases would move from the heads into the output bias, where they are not the heads'.
    bridge.enable_compatibility_mode(disable_warnings=True, fold_value_biases=False)
    out: dict[str, Any] = {"values": [], "heads": []}
    for row in ids:
        tokens = torch.tensor([row])
        with torch.no_grad():
            found = direct_logit_attribution(bridge, tokens, *WORDS, unit="component")
            heads = direct_logit_attribution(bridge, tokens, *WORDS, unit="head")
        out["components"] = found.labels
        out["values"].append(found.attribution.flatten().tolist())
        out["heads"].append(heads.attribution.flatten()[:-1].tolist())  # the last is the remainder
    return out


def jacobian(bridge: Any, ids: list[list[int]]) -> dict[str, Any]:
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    lens = JacobianLens.fit(
        bridge, LONG, corpus="words", dim_batch=5, skip_first_positions=SKIP, show_progress=False
    )
    logits = []
    for row in ids:
        hooks = lens.swap_hooks(bridge, *SWAP, layers=[1])
        with torch.no_grad(), bridge.hooks(fwd_hooks=hooks):
            logits.append(bridge(torch.tensor([row]))[0, -1].tolist())
    return {
        "matrices": [lens.jacobians[layer].tolist() for layer in sorted(lens.jacobians)],
        "swap": logits,
    }


def case(name: str) -> dict[str, Any]:
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    hf = make_model(name)
    found: dict[str, Any] = {"checksum": checksum(hf)}  # before the peer takes the model apart
    bridge = boot(hf, tokenizer)
    for text in (*PROMPTS, *LONG):
        if bridge.to_tokens(text)[0].tolist() != tokenizer(text)["input_ids"]:
            raise SystemExit(f"{text!r} has other tokens in the peer")
    found["logit_lens"] = logit_lens(bridge, ids)
    found["jacobian"] = jacobian(bridge, ids)
    if name != "gemma2":
        found["dla"] = dla(make_model(name), tokenizer, ids)
    return found


if __name__ == "__main__":
    fixture: dict[str, Any] = {"transformer_lens": version("transformer_lens")}
    fixture |= {name: case(name) for name in CONFIGS}
    OUT.write_text(json.dumps(fixture) + "\n")
