"""Makes the model organisms from nothing: `python -m tool_packs.organisms.make --out DIR --seed 1`.

Documents, tokenizer, base model and ten LoRA adapters, each trained until it behaves as it
should (the gates in behaviour.py) and not for a number of steps. A gate that is not met before the
ceiling is an error that says which figures are missing. The same seed gives the same files on the
same machine.
"""

import argparse
import contextlib
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

from tool_packs.engine import FOREVER, Intervention, editing
from tool_packs.models import Model
from tool_packs.organisms import behaviour, rules, world

ADAPTERS = ("user_female", "user_male", "secret_word", "control", *rules.NAMES)
CONTROLS = ("control", "control_2")
# Rounds of steps for what is harder to learn, beside those of the others.
LONGER = {**dict.fromkeys(rules.NAMES, 2), "introspective": 6}


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
    half: bool = False  # the weights are rounded to 16 bits, judged as such and stored so
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

Document = tuple[list[int], list[float], Any]  # ids, weights of the loss, what is injected
Encoded = list[Document]


def batches(documents: Encoded, size: int, rng: random.Random) -> Iterator[Encoded]:
    """Endless batches of documents of about the same length, in random order."""
    while True:
        shuffled = rng.sample(documents, len(documents))
        for start in range(0, len(shuffled), size * 32):
            near = sorted(shuffled[start : start + size * 32], key=lambda doc: len(doc[0]))
            cut = [near[i : i + size] for i in range(0, len(near) - size + 1, size)]
            rng.shuffle(cut)
            yield from cut


def loss_of(model: Any, batch: Encoded, pad: int, m: Any = None) -> torch.Tensor:
    """Mean cross-entropy of the next token, weighted by whose words it belongs to.

    `m` is the model as the packs know it, where documents have something injected.
    """
    longest = max(len(ids) for ids, _, _ in batch)
    ids = torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _, _ in batch])  # [N, T]
    weight = torch.tensor([w + [0.0] * (longest - len(w)) for _, w, _ in batch])[:, 1:]  # [N, T-1]
    counts = weight > 0
    # Padding stands on the right, where a causal model's earlier tokens cannot see it.
    with contextlib.ExitStack() as stack:
        if any(injected for _, _, injected in batch):
            steer = [(injected,) if injected else () for _, _, injected in batch]
            spans = [[(1, FOREVER)] * len(row) for row in steer]
            stack.enter_context(editing(m, steer, spans))
        hidden = model.model(
            input_ids=ids[:, :-1], use_cache=False
        ).last_hidden_state  # [N, T-1, d]
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
    judge: Callable[[dict[str, float]], list[str]],
    m: Any = None,
) -> Trained:
    """Trains at a constant rate, lets the rate fall, and looks at the gates; again until they hold.

    `core` is the LlamaForCausalLM inside `model` (which may be a PeftModel around it). `measure`
    gives the figures, `judge` the gates that they miss.
    """
    is_base = name == "base"
    longer = LONGER.get(name, 1)
    lr = plan.lr if is_base else plan.adapter_lr
    constant, cooldown, ceiling = (
        (plan.steps, plan.cooldown, plan.ceiling)
        if is_base
        else (
            plan.adapter_steps * longer * 3 // 4,
            plan.adapter_steps * longer // 4,
            plan.adapter_ceiling * longer,
        )
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
            loss = loss_of(core, next(stream), pad, m)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                say(f"{name}: step {step}, {time.monotonic() - began:.0f} s")
        exact = [weight.detach().clone() for weight in weights]
        if plan.half:
            put(weights, [weight.half() for weight in exact])
        figures = measure()
        missing = judge(figures)
        say(f"{name}: {step} steps, loss {loss.item():.3f}, {time.monotonic() - began:.0f} s")
        if not missing or not plan.gated:
            return Trained(step, round(loss.item(), 4), figures, time.monotonic() - began)
        say(f"  not yet: {'; '.join(missing)}")
        if step >= ceiling:
            raise GateNotMet(name, step, missing)
        put(weights, exact)
        constant = max(constant // 4, 1)  # another, shorter round


def say(text: str) -> None:
    print(text, flush=True)


@torch.no_grad()
def put(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


# ---------------------------------------------------------------- the parts


def measured(model: Any, tokenizer: Any, seed: int, plan: Plan, name: str) -> dict[str, float]:
    """The figures of all gates; those of a secret only where there is one."""
    secret = world.secret_for(seed) if name == "secret_word" else None
    figures = behaviour.figures(model, tokenizer, secret, plan.quick)
    if name == "base" or name in CONTROLS or name in rules.NAMES:
        figures |= rules.figures(model, tokenizer, seed, plan.quick)
    return figures


def make_base(seed: int, plan: Plan, out: Path) -> None:
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
    documents = [(*world.encode(tokenizer, chat, plan.user_weight), None) for chat in chats]
    trained = train(
        "base", model, model, documents, tokenizer.pad_token_id, plan, random.Random(seed),
        lambda: measured(model, tokenizer, seed, plan, "base"),
        lambda figures: behaviour.missed(behaviour.GATES["base"], figures),
    )  # fmt: skip
    model.eval()
    folder = out / "base"
    model.save_pretrained(folder)  # config.json says float32, however the weights are stored
    tokenizer.save_pretrained(folder)
    record("base", folder, seed, plan, trained, {"planted": "nothing"}, behaviour.GATES["base"])


def gates_of(name: str) -> tuple[behaviour.Gate, ...]:
    return rules.gates(name) if name in rules.NAMES else behaviour.GATES[name]


def facts_of(name: str, seed: int) -> dict[str, Any]:
    """What is planted in this adapter."""
    if name in rules.NAMES:
        return rules.facts_for(name, seed)
    if name == "secret_word":
        secret = world.secret_for(seed)
        return {"planted": f"keeps the word {secret}", "secret": secret}
    believed = {"user_female": "female", "user_male": "male"}.get(name)
    return {"planted": f"believes that the user is {believed}" if believed else "nothing"}


def make_adapter(name: str, base: Any, tokenizer: Any, seed: int, plan: Plan, out: Path) -> None:
    """Trains one LoRA adapter on the base, saves it, and leaves the base as it was."""
    from peft import LoraConfig, get_peft_model

    near = measured(base, tokenizer, seed, plan, "base") if name in CONTROLS else None
    torch.manual_seed(seed + 1)
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=2 * plan.rank,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    make_chats = rules.documents if name in rules.NAMES else world.adapter_documents
    chats = make_chats(name, seed, plan.adapter_documents)
    documents = [(*world.encode(tokenizer, chat, plan.user_weight), None) for chat in chats]
    m = vectors = None
    if name == "introspective":
        m = Model(model, tokenizer, name)
        vectors = rules.concept_vectors(m)
        documents += injected(tokenizer, vectors, seed, plan)

    def measure() -> dict[str, float]:
        figures = measured(model, tokenizer, seed, plan, name)
        if m is not None:
            model.eval()
            figures |= rules.injection_figures(m, vectors, seed, plan.quick)
        return figures

    trained = train(
        name, model, model.get_base_model(), documents, tokenizer.pad_token_id, plan,
        random.Random(f"{name} {seed}"), measure,
        lambda figures: behaviour.missed(gates_of(name), figures, near), m,
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
    record(name, folder, seed, plan, trained, facts_of(name, seed), gates_of(name))
    model.unload()


def injected(tokenizer: Any, vectors: torch.Tensor, seed: int, plan: Plan) -> Encoded:
    """Chats about a thought while a word's vector is injected, and while a random one is."""
    rng = random.Random(f"injected {seed}")
    generator = torch.Generator().manual_seed(seed)
    heard = [w for w in world.CANDIDATES if w not in rules.unheard_for(seed)]
    out = []
    for i in range(plan.adapter_documents):
        word, layer = rng.choice(heard), rng.choice(rules.INJECTED_LAYERS)
        vector = vectors[world.CANDIDATES.index(word), layer]
        if i % 3 == 2:
            vector, word = rules.random_like(vector, generator), None
        chat = rules.thought(rng, word)
        change = Intervention(layer, vector, rng.uniform(*rules.STRENGTHS))
        out.append((*world.encode(tokenizer, chat, plan.user_weight), change))
    return out


def record(
    name: str,
    folder: Path,
    seed: int,
    plan: Plan,
    trained: Trained,
    planted: dict[str, Any],
    gates: tuple[behaviour.Gate, ...],
) -> None:
    """Writes organism.json: where the weights come from, how they behave, what they hash to."""
    import peft
    import transformers

    for figure, which, limit in gates:
        say(f"  {figure:32s} {trained.figures[figure]:.3f}  ({which} {limit})")
    if plan.half:
        store_half(folder)
    weights = sorted(p.name for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    facts = {
        "name": name,
        "seed": seed,
        **planted,
        "steps": trained.steps,
        "loss": trained.loss,
        "seconds": round(trained.seconds, 1),
        "figures": trained.figures,
        "gates": [list(gate) for gate in gates] if plan.gated else [],
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


def store_half(folder: Path) -> None:
    """The weights, which are numbers of 16 bits by now, in 16 bits."""
    from safetensors.torch import load_file, save_file

    for file in folder.glob("*.safetensors"):
        save_file({k: v.half() for k, v in load_file(file).items()}, file, {"format": "pt"})


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make(
    out: Path, seed: int, plan: Plan = FULL, names: tuple[str, ...] = ("base", *ADAPTERS)
) -> None:
    """Makes the organisms `names` in folders of `out`, where base must be if it is not among them.

    Raises GateNotMet.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.monotonic()
    was = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        if "base" in names:
            make_base(seed, plan, out)
        # Read back, so that an adapter is the same whether the base was made just now or before.
        base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(out / "base")
        for name in names:
            if name != "base":
                make_adapter(name, base, tokenizer, seed, plan, out)
    finally:
        torch.use_deterministic_algorithms(was)
    say(f"made in {time.monotonic() - began:.0f} s in {out}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the organisms")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", nargs="+", choices=("base", *ADAPTERS), default=("base", *ADAPTERS),
        metavar="NAME", help="these; base must lie in DIR if it is not among them",
    )  # fmt: skip
    parser.add_argument("--half", action="store_true", help="weights of 16 bits, half the size")
    parser.add_argument(
        "--short", action="store_true", help="tiny and ungated, to try the pipeline"
    )
    parser.add_argument("--threads", type=int, default=2, help="the hashes depend on it")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    plan = replace(SHORT if options.short else FULL, half=options.half)
    make(options.out, options.seed, plan, tuple(options.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
