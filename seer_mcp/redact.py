"""Values of secrets and names of hidden models are taken out of whatever leaves: events, answers, logs, the audit.

This stops accidents: a printed environment, a traceback, a library that logs its headers. It does
not stop code that wants to get a value out (it can spell it backwards), so a sandbox should be
given no secret that its user may not have.
"""

from __future__ import annotations

import asyncio
import base64
import html
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, quote_plus
from weakref import WeakSet

MIN_CHARACTERS = 8  # a shorter value would be found in ordinary text
LINE_CHARACTERS = 16  # a line of a value of several lines, which counts by itself
HOLD_SECONDS = 0.5  # that the end of a piece of output is held back if a value could begin there
HIDDEN = ""  # stands for the name of a hidden model, which has no name itself
IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")

Event = dict[str, Any]


def forms(value: str) -> set[str]:
    """How a value can stand in a text: as it is, escaped, encoded, and its lines."""
    lines = [line for line in value.splitlines() if not line.startswith("-----")]
    plain = {value, *(line for line in lines if len(line) >= LINE_CHARACTERS)}
    found = set(plain)
    for text in plain:
        found |= {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
        found |= {repr(text)[1:-1], ascii(text)[1:-1], html.escape(text)}
        found |= {quote(text, safe=""), quote(text), quote_plus(text)}
    data = value.encode("utf-8", "surrogatepass")
    for before in range(3):  # a value within something longer begins at any of three places
        # Of the first and last characters some bits belong to the neighbours.
        first, last = (0, 2, 3)[before], (before + len(data)) * 8 // 6
        core = base64.b64encode(b"\0" * before + data)[first:last].decode("ascii")
        found |= {core, core.translate(str.maketrans("+/", "-_"))}
    return {form for form in found if len(form) >= MIN_CHARACTERS}


class Redactor:
    """Replaces every known value by [secret NAME] or [hidden name]. Costs nothing as long as it knows none."""

    def __init__(self, secrets: Mapping[str, str] | None = None) -> None:
        self._names: dict[str, str] = {}  # form -> name, the longest form first
        self._characters: frozenset[str] = frozenset()
        self._children: WeakSet[Redactor] = WeakSet()
        self.know(secrets or {})

    def child(self) -> Redactor:
        """One that knows what this one knows and will know, and can know more: of one sandbox, say."""
        made = Redactor()
        made._learn(dict(self._names))
        self._children.add(made)
        return made

    def __bool__(self) -> bool:
        return bool(self._names)

    def know(self, secrets: Mapping[str, str]) -> None:
        """From now on these too. A value that is too short is passed over."""
        self._learn(
            {
                form: name
                for name, value in secrets.items()
                if len(value) >= MIN_CHARACTERS
                for form in forms(value)
            }
        )

    def hide(self, names: Iterable[str]) -> None:
        """From now on these names of models too. They do not count as `found`: who writes one knows it."""
        long = [name for name in names if len(name) >= MIN_CHARACTERS]
        self._learn({form: HIDDEN for name in long for form in forms(name)})

    def _learn(self, new: dict[str, str]) -> None:
        for child in self._children:
            child._learn(new)
        if new.keys() <= self._names.keys():
            return
        both = {**new, **self._names}
        self._names = dict(sorted(both.items(), key=lambda item: -len(item[0])))
        self._characters = frozenset("".join(both))

    def text(self, text: str) -> str:
        return self.split(text, hold=False)[0] if self._names else text

    def value(self, value: Any) -> Any:
        """The same with every text in it redacted; the very object if there was nothing to do."""
        if not self._names:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            pairs = [(key, held, self.value(key), self.value(held)) for key, held in value.items()]
            if all(key is k and held is h for key, held, k, h in pairs):
                return value
            return {k: h for _, _, k, h in pairs}
        if isinstance(value, (list, tuple)):
            items = [self.value(item) for item in value]
            if all(new is old for new, old in zip(items, value, strict=True)):
                return value
            return type(value)(items)
        return value

    def found(self, value: Any) -> list[str]:
        """Names of the secrets whose values are in a text, list or dictionary."""
        names: set[str] = set()
        pending = [value] if self._names else []
        while pending:
            item = pending.pop()
            if isinstance(item, str):
                names.update(name for form, name in self._names.items() if name and form in item)
            elif isinstance(item, dict):
                pending += [*item.keys(), *item.values()]
            elif isinstance(item, (list, tuple)):
                pending += item
        return sorted(names)

    def split(self, text: str, shown: int = 0, hold: bool = True) -> tuple[str, str]:
        """What of a text can go out, redacted, and the rest, which could be the beginning of a value.

        The first `shown` characters went out before; of a value that they begin, the name goes out
        for what follows.
        """
        next_at = {form: at for form in self._names if (at := text.find(form)) >= 0}
        end = self._begun(text, 0) if hold else len(text)
        pieces: list[str] = []
        done = 0
        while next_at:
            # The leftmost, and of several there the longest (they are in that order).
            form = min(next_at, key=next_at.__getitem__)
            start = next_at[form]
            if start >= end:
                break
            pieces.append(text[max(done, shown) : start])
            done = start + len(form)
            if done > shown:
                name = self._names[form]
                pieces.append(f"[secret {name}]" if name else "[hidden name]")
            if done > end:
                end = self._begun(text, done)
            for other in [other for other, at in next_at.items() if at < done]:
                at = text.find(other, done)
                if at < 0:
                    del next_at[other]
                else:
                    next_at[other] = at
        return "".join(pieces) + text[max(done, shown) : end], text[end:]

    def _begun(self, text: str, start: int) -> int:
        """Where the end of a text begins that could be the beginning of a value."""
        found = len(text)
        if not text or text[-1] not in self._characters:
            return found
        for form in self._names:
            at = text.find(form[0], max(start, len(text) - len(form) + 1), found)
            while at >= 0:
                if form.startswith(text[at:]):
                    found = at
                    break
                at = text.find(form[0], at + 1, found)
        return found


@dataclass
class Tail:
    """The end of a run's output so far, if a value could begin there."""

    event: Event
    text: str
    shown: int
    """How much of it went out already, because nothing followed in time."""
    timer: asyncio.TimerHandle | None = None


class EventRedactor:
    """Stands before the folding of one sandbox's events: `take` instead of `fold`.

    Everything passes in order. Only the end of a piece of output that could be the beginning of a
    value waits: for the next event of its run, at most HOLD_SECONDS. What comes after a run's end
    waits for nothing.
    """

    def __init__(self, redactor: Redactor, fold: Callable[[Event], None]) -> None:
        self._redactor = redactor
        self._fold = fold
        self._tails: dict[str, Tail] = {}

    def take(self, event: Event) -> None:
        if not self._redactor:
            self._fold(event)
            return
        run: str | None = event.get("run")
        tail = None if run is None else self._tails.pop(run, None)
        if tail is not None and tail.timer is not None:
            tail.timer.cancel()
        if run is not None and event["type"] == "stream":
            if tail is not None and tail.event["name"] != event["name"]:
                self._put_out(tail)
                tail = None
            self._stream(run, event, tail)
            return
        if tail is not None:
            self._put_out(tail)
        self._fold(self._redacted(event))

    def flush(self) -> None:
        """Nothing more will come: what was held back goes out."""
        tails, self._tails = self._tails, {}
        for tail in tails.values():
            if tail.timer is not None:
                tail.timer.cancel()
            self._put_out(tail)

    def _stream(self, run: str, event: Event, tail: Tail | None) -> None:
        before, shown = (tail.text, tail.shown) if tail else ("", 0)
        text = before + event["text"]
        out, rest = self._redactor.split(text, shown)
        seen = max(0, shown - (len(text) - len(rest)))
        if event.get("late"):  # folding counts such an event as done: it cannot come in two parts
            more, _ = self._redactor.split(rest, seen, hold=False)
            out, seen = out + more, len(rest)
        if rest:
            kept = self._tails[run] = Tail(event, rest, seen)
            if seen < len(rest):
                loop = asyncio.get_running_loop()
                kept.timer = loop.call_later(HOLD_SECONDS, self._release, run)
        if out or not rest:
            self._fold({**event, "text": out})

    def _release(self, run: str) -> None:
        """It took too long: what is held goes out, and is remembered."""
        tail = self._tails[run]
        out, _ = self._redactor.split(tail.text, tail.shown, hold=False)
        tail.shown, tail.timer = len(tail.text), None
        self._fold({**tail.event, "text": out})

    def _put_out(self, tail: Tail) -> None:
        out, _ = self._redactor.split(tail.text, tail.shown, hold=False)
        if out:
            self._fold({**tail.event, "text": out})

    def _redacted(self, event: Event) -> Event:
        data = event.get("data")
        if not isinstance(data, dict):
            return self._redactor.value(event)
        images = {mime: data[mime] for mime in IMAGES if mime in data}
        others = {mime: held for mime, held in data.items() if mime not in images}
        return {
            **self._redactor.value({**event, "data": others}),
            "data": {**self._redactor.value(others), **images},
        }
