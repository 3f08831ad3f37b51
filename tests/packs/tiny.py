"""Recipes of the tiny models that the tests of the packs run on."""

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from tool_packs.loading import quiet_peft

VOCABULARY = 320
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<turn>{{ message['role'] }}\n{{ message['content'] | trim }}</turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
CORPUS = [
    "the cat sat on the mat and the dog said that she is here",
    "user assistant system Who are you? Name a city. Paris London he she",
    "The doctor said that the nurse is in the house on the hill",
]
TEXTS = [
    "the cat",
    "the dog said that she is here and the cat",
    "Paris",
    "on the mat the nurse sat",
]

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
ARCHITECTURES = {
    "llama": lambda: LlamaConfig(**COMMON, head_dim=8, tie_word_embeddings=True),
    "gemma2": lambda: Gemma2Config(
        **COMMON,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=6,
        final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON, head_dim=8, query_pre_attn_scalar=8, sliding_window=6
    ),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=False),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=4,
        n_head=4,
        n_positions=256,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    ),
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that adds a BOS of its own, as Llama's and Gemma's do."""
    raw = Tokenizer(BPE())
    raw.pre_tokenizer = ByteLevel(add_prefix_space=False)
    raw.decoder = ByteLevelDecoder()
    special = ["<bos>", "<eos>", "<pad>", "<turn>", "</turn>"]
    trainer = BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS * 4, trainer)
    raw.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_folder(path, architecture, seed=0):
    """A model folder with random weights, norms included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at constants, which would hide errors
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_adapter(path, base, seed):
    """A LoRA folder on `base` with both matrices random, so that it does change the model."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    fan = model.config.model_type == "gpt2"
    targets = ["c_attn", "c_proj"] if fan else ["q_proj", "v_proj", "o_proj", "down_proj"]
    config = LoraConfig(r=4, target_modules=targets, fan_in_fan_out=fan, task_type="CAUSAL_LM")
    with quiet_peft():
        peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    peft.save_pretrained(path)
    return path
