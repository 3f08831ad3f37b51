"""Reads the files in which sparse autoencoders are published; each format by its own key names."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tool_packs.errors import ModelError, ModelNotFound
from tool_packs.sae_model import HOOKS, SAE

__all__: list[str] = []

FORMATS = (
    "cfg.json + sae_weights.safetensors (sae-lens), params.npz or params.safetensors "
    "(Gemma Scope), cfg.json + sae.safetensors (sparsify), a .pt or .pth with encoder_linear "
    "(Goodfire)"
)
Weights = dict[str, Tensor]


def find(path: str, revision: str | None = None) -> Path:
    """The local file or folder of `path`, fetched from the hub where it is "owner/repo[/folder]".

    Raises:
        ModelNotFound: nothing there.
    """
    local = Path(path).expanduser()
    if local.exists():
        return local
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or len(parts) < 2 or not all(parts):
        raise ModelNotFound(f"no file or folder {path!r}; an SAE is kept as {FORMATS}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo, inside = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [inside, f"{inside}/*"] if inside else None
    try:
        root = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelNotFound(
            f"{path!r} is no local path, and the hub gives no {repo!r}: {reason}"
        ) from error
    if not (root / inside).exists():
        raise ModelNotFound(f"{repo!r} on the hub has no {inside!r}")
    return root / inside


def open_sae(path: Path, layer: int | None, site: str | None) -> SAE:
    """The SAE at a local path. `layer` and `site` stand where the files do not tell.

    Raises:
        ModelNotFound: no format known here.
        ModelError: a format that is known with contents that are not, or no layer told anywhere.
    """
    if path.is_file() and path.suffix in (".pt", ".pth"):
        parts, told = _goodfire(path)
    elif path.is_file() and path.name in ("params.npz", "params.safetensors"):
        parts, told = _gemma_scope(path)
    elif path.is_dir() and (path / "sae_weights.safetensors").is_file():
        parts, told = _sae_lens(path)
    elif path.is_dir() and (path / "sae.safetensors").is_file():
        parts, told = _sparsify(path)
    elif path.is_dir() and (path / "params.npz").is_file():
        parts, told = _gemma_scope(path / "params.npz")
    elif path.is_dir() and (path / "params.safetensors").is_file():
        parts, told = _gemma_scope(path / "params.safetensors")
    else:
        names = sorted(p.name for p in path.iterdir())[:8] if path.is_dir() else [path.name]
        raise ModelNotFound(
            f"{path} holds {', '.join(names) or 'nothing'}, and no SAE: one is kept as {FORMATS}"
        )
    for key, asked in (("layer", layer), ("site", site)):
        if asked is None:
            continue
        if told.get(key) not in (None, asked):
            raise ModelError(
                f"{key}={asked!r}, and {path} says that the SAE was made for {told['site']} "
                f"of layer {told['layer']}"
            )
        told[key] = asked
    if told.get("layer") is None:
        raise ModelError(f"{path} does not tell its layer: give layer=")
    told.setdefault("site", "resid_post")
    return SAE(**{name: t.float() for name, t in parts.items()}, **told)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ModelNotFound(f"no {file.name} in {file.parent}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is no JSON ({error})") from error


def _safetensors(file: Path) -> Weights:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except SafetensorError as error:
        raise ModelError(f"{file} is no safetensors file ({error})") from error


def _take(
    weights: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]], file: Path
) -> Weights:
    """Our names for the tensors, the first of each that is there."""
    out = {}
    for ours, theirs in names.items():
        found = next((key for key in theirs if key in weights), None)
        if found is None:
            raise ModelError(
                f"{file} has no {' or '.join(theirs)}: its tensors are {', '.join(sorted(weights))}"
            )
        out[ours] = weights[found]
    return out


def _hook(name: str) -> dict[str, Any]:
    """Layer and site of a TransformerLens hook name, as blocks.5.hook_resid_post."""
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    sites = {hook: site for site, hook in HOOKS.items()}
    if match is None or match[2] not in sites:
        known = ", ".join(f"blocks.N.{hook}" for hook in HOOKS.values())
        raise ModelError(f"hook {name!r} is no place that can be read here: {known}")
    return {"layer": int(match[1]), "site": sites[match[2]]}


def _sae_lens(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """sae-lens, from version 2 to 6: the configuration moved, the weights' names stayed."""
    config = _json(folder / "cfg.json")
    file = folder / "sae_weights.safetensors"
    weights = _safetensors(file)
    metadata = config.get("metadata") or {}
    hook = metadata.get("hook_name") or config.get("hook_name") or config.get("hook_point")
    told: dict[str, Any] = _hook(hook) if hook else {}
    told["name"] = metadata.get("model_name") or config.get("model_name") or ""
    told["first"] = int(metadata.get("first", 1))
    architecture = config.get("architecture", "standard")
    options = config.get("activation_fn_kwargs") or {}
    if (config.get("activation_fn") or config.get("activation_fn_str")) == "topk":
        architecture = "topk"
    parts = _take(weights, {n: (n,) for n in ("W_enc", "b_enc", "W_dec", "b_dec")}, file)
    if architecture == "topk":
        told |= {"activation": "topk", "k": config.get("k", options.get("k"))}
        told["rescale"] = bool(config.get("rescale_acts_by_decoder_norm", False))
    elif architecture == "jumprelu":
        told["activation"] = "jumprelu"
        parts |= _take(weights, {"threshold": ("threshold",)}, file)
    elif architecture == "standard":
        told["activation"] = "relu"
    else:
        raise ModelError(
            f"{folder} is an SAE of architecture {architecture!r}: topk, jumprelu and standard "
            "are read (a trained batchtopk is saved as jumprelu)"
        )
    scaling = weights.get("scaling_factor")
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise ModelError(f"{file} holds a scaling_factor that was not folded into the weights")
    told["subtract"] = bool(config.get("apply_b_dec_to_input", True))
    normalize = config.get("normalize_activations") or "none"
    if normalize not in ("none", "layer_norm", "constant_norm_rescale"):
        raise ModelError(
            f"{folder} normalises activations by {normalize!r}, a factor that its files do not "
            "hold: fold it into the weights with sae-lens and save again"
        )
    told["normalize"] = normalize
    if (folder / "peak.safetensors").is_file():
        parts["peak"] = _safetensors(folder / "peak.safetensors")["peak"]
    return parts, told


def _gemma_scope(file: Path) -> tuple[Weights, dict[str, Any]]:
    """Gemma Scope (params.npz) and its successor (params.safetensors, lower-case names)."""
    if file.suffix == ".npz":
        import numpy as np

        with np.load(file, allow_pickle=False) as data:
            weights = {key: torch.from_numpy(data[key]) for key in data.files}
    else:
        weights = _safetensors(file)
    names = {
        "W_enc": ("W_enc", "w_enc"),
        "b_enc": ("b_enc",),
        "W_dec": ("W_dec", "w_dec"),
        "b_dec": ("b_dec",),
        "threshold": ("threshold",),
    }
    parts = _take(weights, names, file)
    if "affine_skip_connection" in weights:
        raise ModelError(f"{file} is a transcoder with a skip connection, not an autoencoder")
    # The place stands in the path only: gemma-scope-2b-pt-res/layer_12/width_16k/...
    path = str(file.resolve())
    told: dict[str, Any] = {"activation": "jumprelu", "subtract": False}
    if layer := re.findall(r"layer_(\d+)", path):
        told["layer"] = int(layer[-1])
    folders = {part.lower() for part in file.resolve().parts}
    for kind, site in (("res", "resid_post"), ("mlp", "mlp_out"), ("att", "head")):
        if any(re.search(rf"gemma-scope.*-{kind}\b", part) for part in folders):
            told["site"] = site
    for kind, site in (("resid_post", "resid_post"), ("mlp_out", "mlp_out"), ("attn_out", "head")):
        if kind in folders:
            told["site"] = site
    if any("transcoder" in part for part in folders):
        raise ModelError(f"{file} is a transcoder, from one site to another, not an autoencoder")
    return parts, told


def _sparsify(folder: Path) -> tuple[Weights, dict[str, Any]]:
    """EleutherAI's sparsify: the folder's name is the hookpoint, as layers.5 or layers.5.mlp."""
    config = _json(folder / "cfg.json")
    file = folder / "sae.safetensors"
    weights = _safetensors(file)
    if config.get("transcode") or config.get("skip_connection") or "W_skip" in weights:
        raise ModelError(f"{folder} is a transcoder, from one site to another, not an autoencoder")
    if (kind := config.get("activation", "topk")) != "topk":
        raise ModelError(f"{folder} has the activation {kind!r}: of sparsify, topk is read")
    names = {
        "W_enc": ("encoder.weight",),
        "b_enc": ("encoder.bias",),
        "W_dec": ("W_dec",),
        "b_dec": ("b_dec",),
    }
    parts = _take(weights, names, file)  # W_enc and W_dec both [F, d]
    parts["W_enc"] = parts["W_enc"].T
    told: dict[str, Any] = {"activation": "topk", "k": config.get("k"), "subtract": True}
    told["first"] = 0
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d+)(\.mlp|\.self_attn|\.attn)?", folder.name)
    if match is not None:
        told["layer"] = int(match[1])
        told["site"] = {None: "resid_post", ".mlp": "mlp_out"}.get(match[2], "attn_out")
    return parts, told


def _goodfire(file: Path) -> tuple[Weights, dict[str, Any]]:
    """Goodfire: a state dict of two linear layers; the name ends with the layer, as -l19."""
    from pickle import UnpicklingError

    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(f"{file} is no file of tensors alone ({reason})") from error
    if not isinstance(weights, dict):
        raise ModelError(f"{file} holds a {type(weights).__name__}, not tensors by name")
    names = {
        "W_enc": ("encoder_linear.weight",),
        "b_enc": ("encoder_linear.bias",),
        "W_dec": ("decoder_linear.weight",),
        "b_dec": ("decoder_linear.bias",),
    }
    parts = _take(weights, names, file)
    parts["W_enc"], parts["W_dec"] = parts["W_enc"].T, parts["W_dec"].T
    told: dict[str, Any] = {"activation": "relu", "subtract": False, "site": "resid_post"}
    if match := re.search(r"-l(\d+)$", file.stem):
        told["layer"] = int(match[1])
    return parts, told
