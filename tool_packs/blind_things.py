"""Probes of what is in the kernel's memory: model, configurations, adapters, tokenizer."""

from __future__ import annotations

import gc
import json
import pickle
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tool_packs.models import Model

__all__: list[str] = []

PLAIN = (str, int, float, bool, type(None), list, tuple, dict, set)
NAMING = ("name_or_path", "_name_or_path", "base_model_name_or_path", "_commit_hash", "repo_id",
          "pretrained_model_name_or_path", "_original_object_hash", "revision")  # fmt: skip


def plain(thing: Any) -> dict[str, Any]:
    """Attributes of an object that are no objects of their own."""
    return {k: v for k, v in vars(thing).items() if isinstance(v, PLAIN)}


def each(read: Callable[[Model], Any]) -> Callable[[list[Model]], Any]:
    return lambda models: [read(m) for m in models]


def modules(m: Model) -> Iterator[tuple[str, Any]]:
    yield from m.hf.named_modules()


def configs(m: Model) -> list[Any]:
    """The configuration of every module, and those within configurations."""
    from transformers import PretrainedConfig

    found: dict[int, Any] = {}
    pending = [c for _, module in modules(m) if (c := getattr(module, "config", None)) is not None]
    while pending:
        config = pending.pop()
        if id(config) in found or not isinstance(config, PretrainedConfig):
            continue
        found[id(config)] = config
        pending += vars(config).values()
    return list(found.values())


def generation(m: Model) -> list[Any]:
    found = {id(g): g for _, x in modules(m) if (g := getattr(x, "generation_config", None))}
    return list(found.values())


def adapters(m: Model) -> dict[str, Any]:
    return dict(getattr(m.hf, "peft_config", {}))


def saved(things: list[Any]) -> dict[str, str]:
    """Small files that are written when these are saved."""
    with tempfile.TemporaryDirectory() as folder:
        for at, thing in enumerate(things):
            thing.save_pretrained(f"{folder}/{at}")
        small = (p for p in Path(folder).rglob("*") if p.is_file() and p.stat().st_size < 50_000)
        return {p.name: p.read_text(errors="replace") for p in small}


def card(m: Model) -> Any:
    """The model card that PEFT writes for an adapter."""
    if not adapters(m):
        return "no adapter"
    with tempfile.TemporaryDirectory() as folder:
        m.hf.create_or_update_model_card(folder)
        return [p.read_text() for p in Path(folder).iterdir()]


def backend(m: Model) -> Any:
    """The fast tokenizer's own description, without ordinary tokens."""
    inner = getattr(m.tokenizer, "backend_tokenizer", None)
    if inner is None:
        return "none"
    told = json.loads(inner.to_str())
    model = told.pop("model", {})
    return {**told, "model": {k: v for k, v in model.items() if k not in ("vocab", "merges")}}


def printed(m: Model) -> str:
    return "\n".join(f"{thing}" for thing in (m, m.hf, m.tokenizer, m.config))


def named_dicts(models: list[Model]) -> list[str]:
    """Whatever is called a name or a commit in any dictionary that lives."""
    found: set[str] = set()
    for thing in gc.get_objects():
        if type(thing) is dict:
            for key in NAMING:
                value = thing.get(key)
                if type(value) is str and len(value) < 500:
                    found.add(f"{key}={value}")
    return sorted(found)


def chat(m: Model) -> str:
    if not m.tokenizer.chat_template:
        return "none"
    return m.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


PROBES: dict[str, Callable[[list[Model]], Any]] = {
    "config: _name_or_path": each(lambda m: [getattr(c, "_name_or_path", "") for c in configs(m)]),
    "config: name_or_path": each(lambda m: [getattr(c, "name_or_path", "") for c in configs(m)]),
    "config: as a dictionary": each(lambda m: [c.to_dict() for c in configs(m)]),
    "config: what differs from the default": each(lambda m: [c.to_diff_dict() for c in configs(m)]),
    "config: repr": each(lambda m: [repr(c) for c in configs(m)]),
    "config: attributes": each(lambda m: [plain(c) for c in configs(m)]),
    "config: commit": each(lambda m: [getattr(c, "_commit_hash", "") for c in configs(m)]),
    "config: pickled": each(lambda m: pickle.dumps(m.config).decode("latin-1")),
    "config: saved": each(lambda m: saved(configs(m))),
    "generation config: attributes": each(lambda m: [plain(g) for g in generation(m)]),
    "generation config: repr": each(lambda m: [repr(g) for g in generation(m)]),
    "generation config: saved": each(lambda m: saved(generation(m))),
    "model: name_or_path": each(lambda m: getattr(m.hf, "name_or_path", "")),
    "model: name_or_path of every module": each(
        lambda m: [n for _, x in modules(m) if (n := getattr(x, "name_or_path", None))]
    ),
    "model: attributes": each(lambda m: [plain(m.hf), plain(m.core)]),
    "model: attributes of every module": each(
        lambda m: sorted({repr(t) for _, x in modules(m) for t in plain(x).values() if t})[:2000]
    ),
    "model: names of modules": each(lambda m: [name for name, _ in modules(m)]),
    "model: classes": each(lambda m: sorted({repr(type(x)) for _, x in modules(m)})),
    "model: names of weights": each(lambda m: list(m.hf.state_dict())),
    "model: repr": each(lambda m: repr(m.hf)),
    "model: tags": each(lambda m: getattr(m.core, "model_tags", None)),
    "model: quantization and devices": each(
        lambda m: [getattr(m.core, k, None) for k in ("hf_quantizer", "hf_device_map")]
    ),
    "adapter: configuration": each(lambda m: {k: plain(c) for k, c in adapters(m).items()}),
    "adapter: as a dictionary": each(lambda m: {k: c.to_dict() for k, c in adapters(m).items()}),
    "adapter: repr": each(lambda m: repr(adapters(m))),
    "adapter: names": each(lambda m: list(adapters(m))),
    "adapter: saved": each(lambda m: saved(list(adapters(m).values()))),
    "adapter: the card it would get": each(card),
    "handle: name": each(lambda m: m.name),
    "handle: report": each(lambda m: m.describe()),
    "handle: attributes": each(lambda m: plain(m)),
    "handle: printed": each(printed),
    "tokenizer: name_or_path": each(lambda m: m.tokenizer.name_or_path),
    "tokenizer: init_kwargs": each(lambda m: m.tokenizer.init_kwargs),
    "tokenizer: repr": each(lambda m: repr(m.tokenizer)),
    "tokenizer: files": each(
        lambda m: {k: repr(v) for k, v in vars(m.tokenizer).items() if "file" in k}
    ),
    "tokenizer: attributes": each(
        lambda m: {k: v for k, v in plain(m.tokenizer).items() if "vocab" not in k}
    ),
    "tokenizer: chat template": each(lambda m: m.tokenizer.chat_template),
    "tokenizer: a chat": each(chat),
    "tokenizer: special tokens": each(lambda m: m.tokenizer.special_tokens_map),
    "tokenizer: added tokens": each(lambda m: repr(m.tokenizer.added_tokens_decoder)),
    "tokenizer: its backend": each(backend),
    "tokenizer: saved": each(lambda m: saved([m.tokenizer])),
    "memory: what is called a name": named_dicts,
}
