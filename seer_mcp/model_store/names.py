"""What a model is called on the hub, where it is kept, and how a kernel finds it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..environment import ModelSpec

MODELS_VARIABLE = "SEER_MODELS"
"""In a kernel's environment: a JSON object, the name of a model -> the folder that it lies in. Read by
tool_packs' load_model."""
ORGANISM = "organism:"
FIRST_SEED = "1"  # of the organisms: the one that a name alone stands for
MAIN = "main"


@dataclass(frozen=True)
class HubModel:
    """A model or an adapter of the hub, at a revision."""

    name: str
    revision: str = ""
    """A branch, tag or commit; "" is the main branch as it was when it was fetched."""

    @property
    def label(self) -> str:
        return f"{self.name}@{self.revision}" if self.revision else self.name

    @property
    def key(self) -> str:
        """The name of its folder. It says nothing about the model, to who does not know it."""
        return hashlib.sha256(f"hub\0{self.name}\0{self.revision}".encode()).hexdigest()[:20]

    @property
    def volume(self) -> str:
        """The name of its volume in a cloud, the same for all users of a workspace."""
        return f"seer-model-{self.key}"


def hub_model(name: str, revision: str = "", here: Path | None = None) -> HubModel | None:
    """The model that has to be fetched for a name; None for a local folder or an organism.

    `here` is the folder that a relative path may start from.
    """
    if name.startswith((ORGANISM, ".", "/", "~")) or name.count("/") > 1:
        return None
    if here is not None and (here / name).is_dir():
        return None
    return HubModel(name, "" if revision == MAIN else revision)


def hub_models(spec: ModelSpec, here: Path | None = None) -> list[HubModel]:
    """All that has to be fetched for a model of an environment, as far as its names tell.

    An adapter given as `name` names its base only in its files: Manifest.base, once it is fetched.
    """
    asked = [
        (spec.name, spec.revision),
        (spec.adapter, spec.adapter_revision),
        (spec.base, ""),
    ]
    found = [hub_model(name, revision, here) for name, revision in asked if name]
    return list(dict.fromkeys(model for model in found if model is not None))


def kernel_map(found: Mapping[HubModel, tuple[str, str]]) -> dict[str, str]:
    """What MODELS_VARIABLE tells a kernel of models, given as (commit, folder in the sandbox).

    Each is found under its name with the revision that was asked for, with its commit, and under its
    name alone, which is how an adapter is named in load_model(adapter=...).
    """
    told = {model.label: folder for model, (_, folder) in found.items()}
    for model, (commit, folder) in found.items():
        told.setdefault(f"{model.name}@{model.revision or MAIN}", folder)
        told.setdefault(f"{model.name}@{commit}", folder)
        told.setdefault(model.name, folder)
    return told
