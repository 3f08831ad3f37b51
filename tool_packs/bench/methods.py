"""All methods, by name."""

from __future__ import annotations

from tool_packs.bench import behaviour, change, reading
from tool_packs.bench.method import Method

__all__ = ["METHODS"]

METHODS: dict[str, Method] = {
    method.name: method for method in (*behaviour.METHODS, *reading.METHODS, *change.METHODS)
}
