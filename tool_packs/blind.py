"""What a kernel can read of a model's names: sixty and more small probes, and what each of them found.

The kernel does not know the names, so it cannot judge: `observe` hands over what it read, and whoever
knows the names looks for them. See docs/blind.md.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

from tool_packs import blind_places, blind_things
from tool_packs.models import Model

__all__: list[str] = []

MIME = "application/vnd.seer.observed+json"
CHARACTERS = 200_000  # of what one probe found

Probe = Callable[[list[Model]], Any]
PROBES: dict[str, Probe] = {**blind_things.PROBES, **blind_places.PROBES}
"""By name, "group: what is read". Each gets the models and gives texts, lists or dictionaries."""


def observe(*models: Model) -> None:
    """Takes every probe and hands over what it found. Nothing of it stays in the notebook.

    A probe that fails says so in place of what it would have found: its failure is read as well.
    """
    from IPython.display import publish_display_data

    began = time.perf_counter()
    found = {name: found_by(probe, list(models)) for name, probe in PROBES.items()}
    seconds = time.perf_counter() - began
    publish_display_data({MIME: {"found": found, "seconds": seconds}, "text/plain": ""})
    sys.stdout.write(f"{len(found)} probes taken\n")


def found_by(probe: Probe, models: list[Model]) -> str:
    """What a probe found, as text."""
    try:
        return as_text(probe(models))[:CHARACTERS]
    except Exception as error:  # noqa: BLE001 (whatever a probe meets is what a client would meet)
        return f"{type(error).__name__}: {error}"


def as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=repr, ensure_ascii=False)
