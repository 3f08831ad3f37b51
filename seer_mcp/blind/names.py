"""The names of hidden models, to look for in texts and to take out of them."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from urllib.parse import quote

from ..model_store.staging import parts, pattern, spelled
from ..redact import MIN_CHARACTERS


class HiddenNames:
    """Whole names, their parts, and the forms that they can have in a text."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = list(names)
        self._spelled = spelled(self._names)
        self._pattern = pattern(self._spelled)
        long = [name for name in self._spelled if len(name) >= MIN_CHARACTERS]
        self._encoded = sorted({form for name in long for form in encoded(name)})

    def __bool__(self) -> bool:
        return bool(self._spelled)

    def are_in(self, text: str) -> bool:
        """Whether a text says one of them: in any case, backwards, encoded."""
        if self._pattern is None:
            return False
        return (
            self._pattern.search(text) is not None
            or self._pattern.search(text[::-1]) is not None
            or any(form in text for form in self._encoded)
        )

    @property
    def values(self) -> list[str]:
        """What a redactor takes out: whole names and the parts of hub ids, not words that may mean anything."""
        whole = [name for name in self._names if "/" in name or ":" in name]
        cased = {text for name in whole for text in (name, *parts(name))}
        return sorted(cased | {text.lower() for text in cased})


def encoded(name: str) -> set[str]:
    """Forms of a name that the plain search does not find."""
    data = name.encode()
    found = {quote(name, safe=""), data.hex()}
    for before in range(3):
        first, last = (0, 2, 3)[before], (before + len(data)) * 8 // 6
        found.add(base64.b64encode(b"\0" * before + data)[first:last].decode("ascii"))
    return found - {name}
