"""The book of what was spent: a line for each time that a sandbox was known to cost money.

One file for all servers of a state folder; lines are only ever added. A line says of one sandbox
since when, until when and at what price; a later line of the same sandbox takes the place of the
earlier. So a line that is written twice, or not at all because a server was killed, does no harm:
a sandbox whose end is not in the book counts on at its price until the end that it cannot outlive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from .audit import take_turn
from .logs import add_line, as_line, open_for_lines
from .money import Allowance, Price, Spent, Verdict


@dataclass(frozen=True)
class Entry:
    """What the book says of one sandbox. Times are seconds since 1970."""

    sandbox: str
    owner: str
    began: float
    until: float
    """The last moment at which it was known to cost money."""
    per_second: float
    gpus: int
    ends_by: float | None
    """When it ends whatever happens, if it has such a limit."""
    closed: bool

    def spent(self, since: float, now: float) -> Spent:
        """What it cost between two moments; while it is not closed, as if it still ran."""
        until = self.until if self.closed else max(self.until, now)
        if not self.closed and self.ends_by is not None:
            until = min(until, max(self.ends_by, self.until))
        seconds = max(0.0, min(until, now) - max(self.began, since))
        return Spent(self.per_second * seconds, self.gpus * seconds / 60)

    def burns(self, now: float) -> bool:
        return not self.closed and (self.ends_by is None or now < self.ends_by)


class SpendBook:
    """`path` is in the state folder. Reading is cheap: only what was added is read again."""

    def __init__(self, path: Path, instance: str = "") -> None:
        self.path = path
        self._instance = instance
        self._entries: dict[str, Entry] = {}
        self._read = 0
        self._file = (0, 0)
        self.damaged = 0
        """Lines that could not be read."""

    def note(
        self,
        sandbox: str,
        price: Price,
        began: float,
        until: float,
        *,
        owner: str = "",
        ends_by: float | None = None,
        closed: bool = False,
    ) -> None:
        """Write what is known of a sandbox now: at its start, every few minutes, and at its end.

        For the start call it before the machine is asked for, with until = began. Raises OSError;
        what is in the book already then stays, and counts on.
        """
        line = as_line(
            {
                "sandbox": sandbox,
                "owner": owner,
                "began": round(began, 3),
                "until": round(max(began, until), 3),  # a clock may have been set back
                "per_second": price.per_second,
                "gpus": price.gpus,
                "ends_by": None if ends_by is None else round(ends_by, 3),
                "closed": closed or None,
                "server": self._instance or None,
            }
        )
        descriptor = open_for_lines(self.path)
        try:
            take_turn(descriptor)
            add_line(descriptor, line)
        finally:
            os.close(descriptor)

    def entries(self) -> dict[str, Entry]:
        """The latest of each sandbox. Raises OSError if there is a book that cannot be read."""
        try:
            with self.path.open("rb") as file:
                info = os.fstat(file.fileno())
                if (info.st_dev, info.st_ino) != self._file or info.st_size < self._read:
                    self._file = (info.st_dev, info.st_ino)
                    self._entries, self._read, self.damaged = {}, 0, 0
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # somebody is just writing it
                    self._read += len(line)
                    self._take(line)
        except FileNotFoundError:
            self._entries, self._read, self._file, self.damaged = {}, 0, (0, 0), 0
        return self._entries

    def _take(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            entry = parse_entry(json.loads(line))
        except (ValueError, RecursionError):
            self.damaged += 1
            return
        known = self._entries.get(entry.sandbox)
        if known is None or not known.closed or entry.closed:
            self._entries[entry.sandbox] = entry

    def spent(self, since: float, now: float, owner: str | None = None) -> Spent:
        """By all sandboxes together (of one owner), from `since` on."""
        total = Spent()
        for entry in self.entries().values():
            if owner is None or entry.owner == owner:
                total += entry.spent(since, now)
        return total

    def by_day(self, days: int, now: float) -> list[tuple[str, str, Spent]]:
        """What each owner spent on each of the last days (local time): day, owner, sum; the newest first."""
        today = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
        found: list[tuple[str, str, Spent]] = []
        for back in range(days):
            begin, end = today - timedelta(days=back), today - timedelta(days=back - 1)
            sums: dict[str, Spent] = {}
            for entry in self.entries().values():
                of_day = entry.spent(begin.timestamp(), min(now, end.timestamp()))
                if of_day.dollars or of_day.gpu_minutes:
                    sums[entry.owner] = sums.get(entry.owner, Spent()) + of_day
            found += [(f"{begin:%Y-%m-%d}", owner, spent) for owner, spent in sorted(sums.items())]
        return found

    def of(self, sandbox: str, now: float) -> Spent:
        entry = self.entries().get(sandbox)
        return Spent() if entry is None else entry.spent(0.0, now)

    def closed(self, sandbox: str) -> float | None:
        """When it stopped to cost money, if that is in the book."""
        entry = self.entries().get(sandbox)
        return entry.until if entry is not None and entry.closed else None

    def burning(self, now: float, owner: str | None = None) -> Price | None:
        """What runs (of one owner) and costs money, as one price."""
        entries = self.entries().values()
        live = [e for e in entries if e.burns(now) and owner in (None, e.owner)]
        parts = {e.sandbox: e.per_second for e in live}
        return Price(parts, "the book", sum(e.gpus for e in live)) if live else None

    def admit(
        self, allowances: Sequence[Allowance], price: Price, now: float, owner: str | None = None
    ) -> float | None:
        """Seconds that a new sandbox may live under all allowances, or None. Raises BudgetSpent.

        With `owner` they are those of that owner alone.
        """
        burning = self.burning(now, owner)
        allowed = [
            a.admit(price, self.spent(a.began(now), now, owner), burning, owner is not None)
            for a in allowances
        ]
        return min((s for s in allowed if s is not None), default=None)

    def verdicts(
        self, allowances: Sequence[Allowance], now: float, owner: str | None = None
    ) -> list[Verdict]:
        """What must be said of the allowances (of one owner): those of which much or all is used."""
        owned = owner is not None
        told = (a.verdict(self.spent(a.began(now), now, owner), owned) for a in allowances)
        return [verdict for verdict in told if verdict.level != "fine"]

    def damage(self) -> str:
        """What of the book could not be read, as a sentence; "" if all could."""
        if not self.damaged:
            return ""
        lines = "1 line" if self.damaged == 1 else f"{self.damaged:,} lines"
        return (
            f"{lines} of the book of what was spent ({self.path}) could not be read: "
            "sums may be too small."
        )


def parse_entry(found: Any) -> Entry:
    """Raises ValueError for what is no line of a book."""
    if not isinstance(found, dict) or not isinstance(found.get("sandbox"), str):
        raise ValueError("not an entry")
    began, until = number(found.get("began")), number(found.get("until"))
    ends_by = found.get("ends_by")
    gpus = found.get("gpus")
    if isinstance(gpus, bool) or not isinstance(gpus, int) or not 0 <= gpus <= 1000:
        raise ValueError("not a number of GPUs")
    if until < began:
        raise ValueError("it ended before it began")
    return Entry(
        found["sandbox"],
        str(found.get("owner") or ""),
        began,
        until,
        number(found.get("per_second")),
        gpus,
        None if ends_by is None else number(ends_by),
        found.get("closed") is True,
    )


def number(value: object) -> float:
    """A time or a price. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("not a number")
    if not 0 <= value < 1e12:  # nor NaN
        raise ValueError("no time and no price")
    return float(value)
