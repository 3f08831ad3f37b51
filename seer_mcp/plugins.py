"""What other installed packages bring, by entry points: tool packs and backends. None is imported here."""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

PACKS = "seer_mcp.packs"
BACKENDS = "seer_mcp.backends"


@cache
def pack_folders() -> tuple[Path, ...]:
    """The folders of all packages that an entry point of the group seer_mcp.packs names.

    The entry point's value is a top-level package, which is not imported: it is found only.
    """
    found = (_folder(point) for point in entry_points(group=PACKS))
    return tuple(sorted({folder for folder in found if folder is not None}))


def _folder(point: EntryPoint) -> Path | None:
    """None where its package is not there any more, or is no package."""
    name = point.value.partition(":")[0].strip()
    if "." in name:
        return None  # to find what lies inside a package means to import that package
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


@cache
def backends() -> dict[str, str]:
    """Name -> "module:class" of the entry points of the group seer_mcp.backends."""
    return {point.name: point.value for point in entry_points(group=BACKENDS)}
