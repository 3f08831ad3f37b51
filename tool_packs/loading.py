"""From a name to weights and a tokenizer: folders, the hub, adapters, organisms."""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tool_packs.errors import ModelError, ModelNotFound, WeightsIncomplete

__all__: list[str] = []

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
ORGANISM = "organism:"


def adapter_name(name: str, path: str) -> str:
    """The name an adapter gets from its hub id or folder: PEFT allows no dots in it."""
    source = path if name.startswith(ORGANISM) else name
    return Path(source.rstrip("/")).name.replace(".", "_")


def provided(name: str, revision: str | None) -> str | None:
    """The folder of a hub model that was put in place before this process started.

    SEER_MODELS in the environment is a JSON object: NAME or NAME@REVISION -> folder.
    """
    folders = json.loads(os.environ.get("SEER_MODELS", "{}"))
    return folders.get(f"{name}@{revision}" if revision else name)


def torch_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown: 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]


def resolve_name(name: str, revision: str | None = None) -> str:
    """A folder or a hub id; organisms and hub models that are in place become their folder.

    Raises:
        ModelNotFound: a path that does not exist, or holds no model.
    """
    if not isinstance(name, str) or not name.strip():
        raise ModelNotFound(f"{name!r} is no name: give a folder, a hub id or 'organism:NAME'")
    if name.startswith(ORGANISM):
        return _organism(name.removeprefix(ORGANISM))
    path = Path(name).expanduser()
    if path.is_dir():
        if not ({p.name for p in path.iterdir()} & {"config.json", "adapter_config.json"}):
            inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
            raise ModelNotFound(
                f"{path} is no model folder: it has neither config.json nor adapter_config.json, "
                f"but {inside}"
            )
        return str(path)
    if path.is_file():
        raise ModelNotFound(f"{path} is a file: give the folder that holds config.json")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.4)
        hint = (
            f"; near it: {', '.join(near)}"
            if near
            else f"; {path.parent} has {len(beside)} entries"
        )
        raise ModelNotFound(f"no folder {path}{hint}")
    return provided(name, revision) or name


def _organism(name: str) -> str:
    """The folder of a shipped organism. Imported here: it is not needed for any other model."""
    try:
        from tool_packs import organisms

        folder = Path(organisms.path(name))
    except (ImportError, AttributeError) as error:
        raise ModelNotFound(f"this installation ships no organisms ({error})") from error
    except ValueError as error:
        raise ModelNotFound(str(error)) from error
    if not folder.is_dir():
        raise ModelNotFound(f"the weights of the organism {name!r} are not installed at {folder}")
    return str(folder)


def named_adapters(adapter: str | list[str] | dict[str, str] | None) -> dict[str, str]:
    if adapter is None:
        return {}
    if isinstance(adapter, str):
        adapter = [adapter]
    if isinstance(adapter, dict):
        named = {name: resolve_name(path) for name, path in adapter.items()}
    else:
        named = {adapter_name(name, path := resolve_name(name)): path for name in adapter}
        if len(named) < len(adapter):
            raise ModelError(f"two adapters share a folder name in {adapter}: give a dict of names")
    for name in named:
        if "." in name or not name:
            raise ModelError(f"adapter name {name!r}: PEFT allows no dots in it")
    return named


def base_of_adapter(path: str, revision: str | None) -> str | None:
    """What the adapter at `path` names as its base; None where `path` is no adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    folder = Path(path)
    if folder.is_dir() and (folder / "config.json").is_file():
        return None
    try:
        found = find_adapter_config_file(path, revision=revision)
    except OSError as error:
        raise _not_found(path, error) from error
    if found is None:
        return None
    return json.loads(Path(found).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""


def resolve_base(adapter: str, base: str) -> str:
    """The base an adapter names: as it stands, or relative to the adapter's folder."""
    if not base:
        raise ModelError(f"the adapter {adapter} does not name its base: load_model(..., base=...)")
    relative = Path(adapter) / base
    if Path(adapter).is_dir() and not Path(base).is_dir() and relative.is_dir():
        return str(relative.resolve())
    try:
        return resolve_name(base)
    except ModelNotFound as error:
        raise ModelNotFound(
            f"the adapter {adapter} names the base {base!r}, which is not here ({error}): "
            "give base=..."
        ) from error


def _quantization(kind: str | None) -> Any:
    if kind is None:
        return None
    if kind not in ("4bit", "8bit"):
        raise ModelError(f"quantization {kind!r} is unknown: '4bit' or '8bit'")
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ModelError(
            f"quantization={kind!r} needs bitsandbytes, which is not installed: "
            "pip install bitsandbytes, or leave quantization out"
        )
    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def load_weights(
    path: str,
    *,
    revision: str | None,
    dtype: str | torch.dtype,
    device_map: str | dict[str, Any] | None,
    quantization: str | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, tuple[str, ...]]:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    if (config := _quantization(quantization)) is not None:
        options["quantization_config"] = config
    if device_map is None:
        device_map = "cuda" if torch.cuda.is_available() else None
    if device_map is not None:
        options["device_map"] = device_map
    try:
        hf, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise _not_found(path, error) from error
    except (AssertionError, RuntimeError) as error:  # torch's words for a device that is not there
        if device_map is None:
            raise
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ModelError(
            f"the model cannot be put on device_map={device_map!r} ({' '.join(str(error).split())[:200]}); "
            f"this machine has: {', '.join(there)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise WeightsIncomplete(
            f"{path} lacks {len(missing)} of the model's weights, which would have been random: "
            f"{', '.join(missing[:5])}. Is it another architecture, or a partial download?"
        )
    unexpected = sorted(info["unexpected_keys"])
    notes = ()
    if unexpected:
        notes = (f"not used: {len(unexpected)} weights in the files, as {unexpected[0]}",)
    return hf, notes


def _not_found(path: str, error: Exception) -> ModelError:
    """The reason of transformers' refusal, in one sentence, with the next step."""
    reason = " ".join(str(error).split())[:400]
    if Path(path).is_dir():
        return ModelError(f"the model in {path} cannot be loaded: {reason}")
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
    if offline:
        return ModelNotFound(
            f"{path!r} is no folder here and not in the hub's cache, and the hub is switched off "
            "(HF_HUB_OFFLINE is set): give a local folder, or unset it"
        )
    return ModelNotFound(
        f"{path!r} is no folder here and could not be had from the hub: {reason} "
        "Check the spelling (owner/name), the network, and HF_TOKEN where the repository is gated."
    )


def put_adapters(hf: nn.Module, adapters: dict[str, str], *, revision: str | None = None) -> Any:
    """The model with these adapters on it, the first one active where it had none."""
    from peft import PeftModel
    from safetensors import SafetensorError

    first = not hasattr(hf, "peft_config")
    options = {"revision": revision} if revision is not None else {}
    peft: Any = hf
    for name, path in adapters.items():
        try:
            with quiet_peft():
                if hasattr(peft, "peft_config"):
                    peft.load_adapter(path, adapter_name=name, **options)
                else:
                    peft = PeftModel.from_pretrained(hf, path, adapter_name=name, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:400]
            raise ModelError(
                f"the adapter {path} does not go on {type(hf).__name__}: {reason} "
                "Is it made for another base? Give base=..."
            ) from error
        if peft.peft_config[name].is_prompt_learning:
            raise ModelError(
                f"the adapter {path} learns prompts ({peft.peft_config[name].peft_type.value}); "
                "the packs run the layers themselves and would drop it: use a weight adapter (LoRA)"
            )
    if first:
        peft.set_adapter(next(iter(adapters)))
    return peft


@contextlib.contextmanager
def quiet_peft() -> Iterator[None]:
    """Within this, PEFT's use of a property that transformers has renamed is not warned about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def load_tokenizer(
    sources: list[str], hf: nn.Module, revision: str | None, trust_remote_code: bool
) -> Any:
    """The first of `sources` that has a tokenizer: an adapter may bring its own."""
    from transformers import AutoTokenizer

    *adapters, model = sources
    for path in adapters:
        if (Path(path) / "tokenizer_config.json").is_file():
            return AutoTokenizer.from_pretrained(path)
    try:
        return AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{model} has no tokenizer that can be read: {reason} "
            "Save one beside the weights: tokenizer.save_pretrained(folder)"
        ) from error


def hide_names(hf: Any, tokenizer: Any, alias: str) -> None:
    """Puts `alias` wherever transformers and PEFT keep the names that a model was loaded by.

    The attributes are those that print themselves in a notebook; the files on disk keep theirs.
    """
    from transformers import PretrainedConfig

    configs: list[Any] = []
    for module in hf.modules():
        configs += [getattr(module, key, None) for key in ("config", "generation_config")]
        for key in ("name_or_path", "_name_or_path"):
            if isinstance(vars(module).get(key), str):
                setattr(module, key, alias)
    seen: set[int] = set()
    while configs:
        config = configs.pop()
        if config is None or isinstance(config, dict) or id(config) in seen:
            continue
        seen.add(id(config))
        for key in ("_name_or_path", "name_or_path"):
            if isinstance(getattr(config, key, None), str):
                setattr(config, key, alias)
        for key in ("_commit_hash", "_original_object_hash"):
            if getattr(config, key, None):
                setattr(config, key, None)
        configs.extend(c for c in vars(config).values() if isinstance(c, PretrainedConfig))
    for adapter in getattr(hf, "peft_config", {}).values():
        adapter.base_model_name_or_path = alias
        adapter.revision = None
    tokenizer.name_or_path = alias
    for key, value in list(tokenizer.init_kwargs.items()):
        if key.endswith(("_or_path", "_file", "_hash")) and value:
            tokenizer.init_kwargs[key] = alias
    for key, value in list(vars(tokenizer).items()):
        if key.endswith("_file") and isinstance(value, str):
            setattr(tokenizer, key, alias)
