"""Models whose names must not be learnt: their parts, the names, and their nameless copies."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..environment import ModelSpec, hidden_name
from ..errors import BadInput, ModelUnavailable
from . import staging
from .names import FIRST_SEED, MAIN, ORGANISM, HubModel

COMMON = 8  # characters of an organism's or folder's name, or it must have a "_": else it is a word


@dataclass(frozen=True)
class Part:
    """A model, an adapter or a base that is hidden."""

    alias: str
    """What the kernel knows it by: model_1, model_1_adapter, model_1_base."""
    folder: str
    """Where it lies, on the machine that copies it."""


@dataclass(frozen=True)
class Prepared:
    """What kernels have to be told of models that are there."""

    told: dict[str, str] = field(default_factory=dict[str, str])
    """Name -> folder in the sandbox; a hidden one by its alias."""
    names: tuple[str, ...] = ()
    """What must not be learnt."""
    copies: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Of the hidden ones, by alias: the files of the copy and their digests."""
    seconds: float = 0.0
    """That the copies took."""


def parts_of(
    number: int,
    spec: ModelSpec,
    found: Mapping[HubModel, tuple[str, str]],
    packs: str,
    base: str = "",
) -> list[Part]:
    """What of a hidden model has to be copied; `base`: what its manifest says that it goes on."""
    asked = [("", spec.name, spec.revision), ("adapter", spec.adapter, spec.adapter_revision)]
    asked.append(("base", spec.base or base, ""))
    parts: list[Part] = []
    for part, name, revision in asked:
        if name:
            folder = _folder(name, revision, found, packs)
            if folder is None:
                raise ModelUnavailable(
                    f"model {number}",
                    "not_hidden",
                    f"the folder of its {part or 'weights'} is not on this machine, so no copy without names can be "
                    "made; name one that is there, or a hub id",
                )
            parts.append(Part(hidden_name(number, part), folder))
    return parts


def with_base(number: int, parts: list[Part], packs: str) -> list[Part]:
    """Also the base that a local adapter names in its own files (an organism's is beside it)."""
    first = Path(parts[0].folder)
    alias = hidden_name(number, "base")
    whole = (first / "config.json").is_file()
    if whole or any(part.alias == alias for part in parts):
        return parts
    if not (first / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"model {number}",
            "not_a_model",
            "its folder has neither config.json nor adapter_config.json",
        )
    named = json.loads((first / "adapter_config.json").read_text()).get("base_model_name_or_path")
    named = str(named or "")
    if named.startswith(ORGANISM):
        places = [first.parent / named.removeprefix(ORGANISM).partition("@")[0]]
    else:
        places = [first / named, Path(named)]
    for place in places:
        if named and (place / "config.json").is_file():
            return [*parts, Part(alias, str(place.resolve()))]
    raise BadInput(
        "models",
        f"model {number}",
        "it is an adapter, and what it says of its base is no folder here; write base = … beside its name",
    )


def names_of(spec: ModelSpec, parts: Sequence[Part] = (), base: str = "") -> list[str]:
    """Every text that says which model this is."""
    names: list[str] = []
    for name in (spec.name, spec.adapter, spec.base, base):
        if not name:
            continue
        names.append(name)
        bare = name.removeprefix(ORGANISM) if name.startswith(ORGANISM) else ""
        if name.startswith(("/", ".", "~")):
            names.append(os.path.realpath(os.path.expanduser(name)))
            bare = Path(name).name
        if bare and ((len(bare) >= COMMON and not bare.isalpha()) or "_" in bare):
            names.append(bare)
    for part in parts:
        names += [part.folder, *staging.names_in(part.folder)]
    return list(dict.fromkeys(names))


def copy_here(parts: Sequence[Part], names: Sequence[str], place: Path) -> Prepared:
    """Nameless copies in numbered folders under `place`. Raises ModelUnavailable."""
    told: dict[str, str] = {}
    copies: dict[str, dict[str, Any]] = {}
    made: dict[str, str] = {}
    began = time.monotonic()
    for part in parts:
        if part.folder in made:  # the base of several adapters
            told[part.alias] = made[part.folder]
            continue
        target = made[part.folder] = str(place / str(len(made) + 1))
        try:
            copies[part.alias] = staging.Staging(part.folder, target, names, part.alias).make()
        except staging.NotHidden as error:
            raise not_hidden(part.alias, str(error)) from error
        except OSError as error:
            raise ModelUnavailable(
                part.alias, "folder", f"its copy could not be made ({error.strerror})"
            ) from error
        told[part.alias] = target
    return Prepared(told, tuple(names), copies, time.monotonic() - began)


def not_hidden(alias: str, why: str) -> ModelUnavailable:
    return ModelUnavailable(
        alias,
        "not_hidden",
        f"no copy without names can be made of it: {why}. Take `hidden` out, or use another copy of the model",
    )


def _folder(
    name: str, revision: str, found: Mapping[HubModel, tuple[str, str]], packs: str
) -> str | None:
    if name.startswith(ORGANISM):
        organism, _, seed = name.removeprefix(ORGANISM).partition("@")
        place = f"{packs}/tool_packs/organisms/weights"
        folder = (
            f"{place}/{organism}" if seed in ("", FIRST_SEED) else f"{place}/seed{seed}/{organism}"
        )
        return folder if os.path.isdir(folder) else None
    model = HubModel(name, "" if revision == MAIN else revision)
    if model in found:
        return found[model][1]
    path = os.path.realpath(os.path.expanduser(name))
    return path if os.path.isdir(path) else None
