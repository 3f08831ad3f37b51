"""Environments as code: what a sandbox is made of, and the investigation.toml that says so."""

from .gpus import GPUS, parse_gpu
from .investigation import Investigation, read_investigation
from .schema import schema
from .spec import ModelSpec, Repo, SandboxSettings, SandboxSpec, Strict

__all__ = [
    "GPUS",
    "Investigation",
    "ModelSpec",
    "Repo",
    "SandboxSettings",
    "SandboxSpec",
    "Strict",
    "parse_gpu",
    "read_investigation",
    "schema",
]
