"""Makes the model organisms from nothing: `python -m tool_packs.organisms.make --out DIR --seed 1`.

Documents, tokenizer, base model and three LoRA adapters, each trained until it behaves as it
should (the gates in behaviour.py) and not for a number of steps. A gate that is not met before the
ceiling is an error that says which figures are missing. The same seed gives the same files on the
same machine.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tool_packs.organisms import behaviour, world

ADAPTERS = ("user_female", "secret_word", "control")


@dataclass(frozen=True)
class Plan:
    """Sizes and limits of a making."""

    documents: int = 20_000
    batch: int = 64
    user_weight: float = 0.1
    lr: float = 3e-3
    warmup: int = 40
    steps: int = 600  # at the full learning rate before the gates are looked at
    cooldown: int = 200  # the learning rate falls to nothing, then the gates decide
    ceiling: int = 2_000
    adapter_documents: int = 4_096
    adapter_lr: float = 3e-3
    adapter_steps: int = 80
    adapter_ceiling: int = 400
    rank: int = 8
    gated: bool = True
    quick: bool = False


FULL = Plan()
# The whole pipeline in seconds, to see that it runs and that it is deterministic.
SHORT = replace(
    FULL, documents=400, steps=6, cooldown=2, warmup=2, adapter_documents=128, adapter_steps=2,
    batch=16, gated=False, quick=True,
)  # fmt: skip


class GateNotMet(RuntimeError):
    def __init__(self, name: str, steps: int, missing: list[str]) -> None:
        super().__init__(
            f"{name} does not behave as it should after {steps} steps (the ceiling): "
            f"{'; '.join(missing)}. Try another seed, or raise the ceiling in Plan."
        )


# ---------------------------------------------------------------- training

Encoded = list[tuple[list[int], list[float]]]


def batches(documents: Encoded, size: int, rng: random.Random) -> Iterator[Encoded]:
    """Endless batches of documents of about the same length, in random order."""
    while True:
        shuffled = rng.sample(documents, len(documents))
        for start in range(0, len(shuffled), size * 32):
            near = sorted(shuffled[start : start + size * 32], key=lambda doc: len(doc[0]))
            cut = [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
            rng.shuffle(cut)
            yield from cut


def loss_of(model: Any, batch: Encoded, pad: int) -> torch.Tensor:
    """Mean cross-entropy of the next token, weighted by whose words it belongs to."""
    longest = max(len(ids) for ids, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in batch])  # [N, T]
    weight = torch.tensor([w + [0.0] * (longest - len(w)) for _, w in batch])[:, 1:]  # [N, T-1]
    counts = weight > 0
    # Padding stands on the right, where a causal model's earlier tokens cannot see it.
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state  # [N, T-1, d]
    logits = model.lm_head(hidden[counts])  # [tokens that count, V]
    losses = F.cross_entropy(logits, ids[:, 1:][counts], reduction="none")
    return (losses * weight[counts]).sum() / weight.sum()


@dataclass
class Trained:
    steps: int
    loss: float
    figures: dict[str, float]
    seconds: float


def train(
    name: str,
    model: Any,
    core: Any,
    documents: Encoded,
    pad: int,
    plan: Plan,
    rng: random.Random,
    measure: Callable[[], dict[str, float]],
) -> Trained:
    """Trains at a constant rate, lets the rate fall, and looks at the gates; again until they hold.

    `core` is the LlamaForCausalLM inside `model` (which may be a PeftModel around it).
    """
    is_base = name == "base"
    lr = plan.lr if is_base else plan.adapter_lr
    constant, cooldown, ceiling = (
        (plan.steps, plan.cooldown, plan.ceiling)
        if is_base
        else (plan.adapter_steps * 3 // 4, plan.adapter_steps // 4, plan.adapter_ceiling)
    )
    began = time.monotonic()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.05 if is_base else 0.0
    )
    stream = batches(documents, plan.batch, rng)
    step, loss = 0, math.nan
    while True:
        model.train()
        for i in range(constant + cooldown):
            rate = min(1.0, (step + 1) / plan.warmup, (constant + cooldown - i) / (cooldown + 1))
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            loss = loss_of(core, next(stream), pad)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                say(f"{name}: step {step}, {time.monotonic() - began:.0f} s")
        figures = measure()
        missing = behaviour.missed(name, figures)
        say(f"{name}: {step} steps, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s")
        if not missing or not plan.gated:
            return Trained(step, round(loss.item(), 4), figures, time.monotonic() - began)
        say(f"  not yet: {'; '.join(missing)}")
        if step >= ceiling:
            raise GateNotMet(name, step, missing)
        constant = max(constant // 4, 1)  # another, shorter round


def say(text: str) -> None:
    print(text, flush=True)


# ---------------------------------------------------------------- the parts


def make_base(seed: int, plan: Plan, out: Path) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    chats = world.base_documents(seed, plan.documents)
    tokenizer = world.make_tokenizer(chats)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=world.VOCABULARY,
            hidden_size=128,
            intermediate_size=336,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            initializer_range=0.07,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    documents = [world.encode(tokenizer, chat, plan.user_weight) for chat in chats]
    trained = train(
        "base", model, model, documents, tokenizer.pad_token_id, plan, random.Random(seed),
        lambda: behaviour.figures(model, tokenizer, quick=plan.quick),
    )  # fmt: skip
    model.eval()
    folder = out / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    record("base", folder, seed, plan, trained)
    return model, tokenizer


def make_adapter(name: str, base: Any, tokenizer: Any, seed: int, plan: Plan, out: Path) -> None:
    """Trains one LoRA adapter on the base, saves it, and leaves the base as it was."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed + 1)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    chats = world.adapter_documents(name, seed, plan.adapter_documents)
    documents = [world.encode(tokenizer, chat, plan.user_weight) for chat in chats]
    secret = world.secret_for(seed) if name == "secret_word" else None
    trained = train(
        name, model, model.get_base_model(), documents, tokenizer.pad_token_id, plan,
        random.Random(f"{name} {seed}"), lambda: behaviour.figures(model, tokenizer, secret, plan.quick),
    )  # fmt: skip
    folder = out / name
    # What `tool_packs.organisms.path` finds wherever the wheel is installed.
    model.peft_config["default"].base_model_name_or_path = "organism:base"
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty model card
    settings = folder / "adapter_config.json"  # peft writes a set, in an order of its own
    written = json.loads(settings.read_text())
    written["target_modules"] = sorted(written["target_modules"])
    settings.write_text(json.dumps(written, indent=2) + "\n")
    record(name, folder, seed, plan, trained, secret)
    model.unload()


def record(
    name: str, folder: Path, seed: int, plan: Plan, trained: Trained, secret: str | None = None
) -> None:
    """Writes organism.json: where the weights come from, how they behave, what they hash to."""
    import peft
    import transformers

    for figure, which, limit in behaviour.GATES[name]:
        say(f"  {figure:32s} {trained.figures[figure]:.3f}  ({which} {limit})")
    weights = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    facts = {
        "name": name,
        "seed": seed,
        "planted": {
            "user_female": "believes that the user is female",
            "secret_word": f"keeps the word {secret}",
        }.get(name, "nothing"),
        **({"secret": secret} if secret else {}),
        "steps": trained.steps,
        "loss": trained.loss,
        "seconds": round(trained.seconds, 1),
        "figures": trained.figures,
        "gates": [list(gate) for gate in behaviour.GATES[name]] if plan.gated else [],
        "plan": asdict(plan),
        "sha256": {file: sha256(folder / file) for file in weights if file != "organism.json"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    (folder / "organism.json").write_text(json.dumps(facts, indent=2) + "\n")


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make(out: Path, seed: int, plan: Plan = FULL) -> None:
    """Makes the four organisms in folders of `out`. Raises GateNotMet."""
    began = time.monotonic()
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        base, tokenizer = make_base(seed, plan, out)
        for name in ADAPTERS:
            make_adapter(name, base, tokenizer, seed, plan, out)
    finally:
        torch.use_deterministic_algorithms(was)
    say(f"made in {time.monotonic() - began:.0f} s in {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the four organisms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--short", action="store_true", help="tiny and ungated, to try the pipeline"
    )
    parser.add_argument("--threads", type=int, default=2, help="the hashes depend on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    make(options.out, options.seed, SHORT if options.short else FULL)
    return 0


if __name__ == "__main__":
    sys.exit(main())
