"""The model that techniques are timed on: random weights, a word a token. Needs torch and transformers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 4096


@dataclass(frozen=True)
class Size:
    layers: int
    width: int
    mlp: int
    heads: int
    dtype: torch.dtype
    device: str


SMALL = Size(layers=8, width=256, mlp=704, heads=8, dtype=torch.float32, device="cpu")
LARGE = Size(layers=16, width=2304, mlp=6144, heads=18, dtype=torch.bfloat16, device="cuda")


def make_model(size: Size, seed: int = 0) -> Any:
    """A Llama with random weights, the same for the same seed and device."""
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    torch.manual_seed(seed)
    with torch.device(size.device):
        return LlamaForCausalLM(config).to(size.dtype).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The words w3, w4, … are the tokens 3, 4, …; a BOS stands before a text."""
    special = ["<bos>", "<eos>", "<pad>"]
    names = [*special, *(f"w{i}" for i in range(len(special), WORDS))]
    raw = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="w3"))
    raw.pre_tokenizer = WhitespaceSplit()
    raw.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        name_or_path="tiny",
        add_bos_token=True,
    )


def words(count: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    return [f"w{int(i)}" for i in torch.randint(100, WORDS, (count,), generator=generator)]


def text(count: int, seed: int) -> str:
    """`count` random words."""
    return " ".join(words(count, seed))


def pair(count: int, common: int, seed: int = 0) -> tuple[str, str]:
    """Two texts of `count` words that have the first `common` in common and differ in the next one."""
    clean = words(count, seed)
    corrupt = list(clean)
    corrupt[common] = "w99"
    return " ".join(clean), " ".join(corrupt)


ANSWERS = (24, 25)
SWEEP = (29, 0)
"""Words of the pair of the exact sweep, and how many of them begin alike."""
