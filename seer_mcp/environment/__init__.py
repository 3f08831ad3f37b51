"""Environments as code: what a sandbox is made of, and the investigation.toml that says so."""

from .gpus import GPUS, parse_gpu
from .investigation import BUILTIN_PACKS, Investigation, read_investigation, read_scope
from .opening import Opening, hidden_name, opening_cells
from .schema import schema
from .shelf import Investigations, Shelf, Shelved
from .skills import Skill
from .spec import ModelSpec, Repo, SandboxSettings, SandboxSpec, Strict

__all__ = [
    "BUILTIN_PACKS",
    "GPUS",
    "Investigation",
    "Investigations",
    "ModelSpec",
    "Opening",
    "Repo",
    "SandboxSettings",
    "SandboxSpec",
    "Shelf",
    "Shelved",
    "Skill",
    "Strict",
    "hidden_name",
    "opening_cells",
    "parse_gpu",
    "read_investigation",
    "read_scope",
    "schema",
]
