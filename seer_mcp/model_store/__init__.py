"""Models, fetched once: one folder (or volume) per model and revision, complete or not used.

What a model is called, and where it goes, is in names.py; the program that fetches one, wherever it
runs, is fetch.py; what it says is understood in follow.py; the models on this machine's disk are
store.py; `seer-mcp models` is command.py.
"""

from .follow import FetchProgress, Manifest, follow, program, request, unnamed
from .hidden import Part, Prepared, copy_here, names_of, not_hidden, parts_of, with_base
from .names import MODELS_VARIABLE, HubModel, hub_model, hub_models, kernel_map
from .store import ModelStore

__all__ = [
    "MODELS_VARIABLE",
    "FetchProgress",
    "HubModel",
    "Manifest",
    "ModelStore",
    "Part",
    "Prepared",
    "copy_here",
    "follow",
    "hub_model",
    "hub_models",
    "kernel_map",
    "names_of",
    "not_hidden",
    "parts_of",
    "program",
    "request",
    "unnamed",
    "with_base",
]
