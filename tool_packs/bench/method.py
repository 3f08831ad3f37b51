"""What a method is: a technique that makes one number a prompt of an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tool_packs.bench.subject import Subject

__all__ = ["LAYERS", "Method"]

LAYERS = (1, 3, 5)  # of six, which look much alike


@dataclass(frozen=True)
class Method:
    """`score(subject, setting)` gives one number for each prompt [N]: larger is more suspicious.

    A method knows the hypothesis (the words of the case, and in which chats the base has the
    concept) and never whether the adapter is the planted one. `settings` are what an investigator
    would have to choose; the runner chooses among them on other seeds.
    """

    name: str
    technique: str  # of which pack
    says: str  # what the number is
    settings: tuple[Any, ...]
    score: Callable[[Subject, Any], Tensor]
