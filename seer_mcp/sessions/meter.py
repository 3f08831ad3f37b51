"""What one sandbox costs: noted in the book while it runs, said in its status and its notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..money import Allowance, Budget, Price, Spent, Verdict, so_far
from ..spend import SpendBook


class Meter:
    def __init__(
        self,
        book: SpendBook,
        allowances: Sequence[Allowance],
        handle: str,
        owner: str,
        price: Price,
        began: float,
        ends_by: float | None,
        budget: Budget,
        owner_allowances: Sequence[Allowance] = (),
    ) -> None:
        self._book = book
        self._allowances = allowances
        self._owner_allowances = owner_allowances
        self._handle = handle
        self._owner = owner
        self.price = price
        self.began = began
        self.ends_by = ends_by
        self.budget = budget
        self.closed: float | None = None
        self.trouble = ""
        """Why the last entry is not in the book, or ""."""

    def note(self, closed: bool = False) -> None:
        """Write into the book what it cost up to now; `closed`: it costs nothing more."""
        now = time.time()
        if closed and self.closed is None:
            self.closed = now
        try:
            self._book.note(
                self._handle,
                self.price,
                self.began,
                self.closed or now,
                owner=self._owner,
                ends_by=self.ends_by,
                closed=self.closed is not None,
            )
        except OSError as error:
            self.trouble = f"what this sandbox costs could not be noted ({error.strerror or error})"
        else:
            self.trouble = ""

    @property
    def seconds(self) -> float:
        return max(0.0, (self.closed or time.time()) - self.began)

    def spent(self) -> Spent:
        return self.price.spent(self.seconds)

    def so_far(self) -> str:
        return so_far(self.price, self.seconds, self.budget or None)

    def verdicts(self) -> list[Verdict]:
        """Of its own budget, of its owner's and of what all sandboxes share."""
        now, book = time.time(), self._book
        owners = book.verdicts(self._owner_allowances, now, self._owner)
        return [self.budget.verdict(self.spent()), *owners, *book.verdicts(self._allowances, now)]

    def warnings(self) -> list[str]:
        said = [f"BUDGET: {verdict.says}" for verdict in self.verdicts() if verdict.level != "fine"]
        return [*said, *([f"NOTE: {self.trouble}."] if self.trouble else [])]

    def kept(self) -> dict[str, Any]:
        """For the record: what another server needs to go on."""
        return {
            "parts": dict(self.price.parts),
            "source": self.price.source,
            "gpus": self.price.gpus,
            "began": self.began,
            "ends_by": self.ends_by,
            "budget": asdict(self.budget),
        }


def taken_up(
    book: SpendBook,
    allowances: Sequence[Allowance],
    handle: str,
    owner: str,
    kept: Any,
    owner_allowances: Sequence[Allowance] = (),
) -> Meter | None:
    """The meter of a record. Raises KeyError, TypeError or ValueError for what is none."""
    if kept is None:
        return None
    parts = {str(name): float(rate) for name, rate in kept["parts"].items()}
    price = Price(parts, str(kept["source"]), int(kept["gpus"]))
    ends_by = None if kept["ends_by"] is None else float(kept["ends_by"])
    budget = Budget(**kept["budget"])
    began = float(kept["began"])
    return Meter(book, allowances, handle, owner, price, began, ends_by, budget, owner_allowances)
