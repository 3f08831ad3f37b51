"""What a machine costs, part by part, and what may be spent on it.

Two units: dollars, and GPU-minutes for those whose institute counts these. The book of what was
spent is in spend.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from .errors import BadInput, BudgetSpent

WARN_AT = 0.8  # of a budget
SHORTEST_SECONDS = 60.0  # a sandbox that a budget lets live for less is not started

# What is asked for, and paid, where a spec leaves it open. More that is used is paid as well.
CORES, MEBIBYTES = 2.0, 4096
CORES_PER_GPU, MEBIBYTES_PER_GPU = 2.0, 16384


class Machine(Protocol):
    """What has a price: a SandboxSpec."""

    @property
    def gpu(self) -> str | None: ...
    @property
    def gpu_count(self) -> int: ...
    @property
    def cpu(self) -> float | None: ...
    @property
    def memory(self) -> int | None: ...


def cores_of(machine: Machine) -> float:
    """Physical cores that are asked for."""
    if machine.cpu is not None:
        return machine.cpu
    return CORES_PER_GPU * machine.gpu_count if machine.gpu else CORES


def mebibytes_of(machine: Machine) -> int:
    """MiB of memory that are asked for."""
    if machine.memory is not None:
        return machine.memory
    return MEBIBYTES_PER_GPU * machine.gpu_count if machine.gpu else MEBIBYTES


# -- rates ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """Dollars per second, of sandboxes: their cores and memory cost three times those of functions."""

    gpus: Mapping[str, float]
    core: float
    """A physical core (two virtual ones)."""
    gib: float
    source: str


TABLE = Rates(
    {
        "T4": 0.000164,
        "L4": 0.000222,
        "A10": 0.000306,
        "L40S": 0.000542,
        "A100-40GB": 0.000583,
        "A100-80GB": 0.000694,
        "RTX-PRO-6000": 0.000842,
        "H100": 0.001097,
        "H200": 0.001261,
        "B200": 0.001736,
    },
    core=0.00003942,
    gib=0.00000667,
    source="Modal's price page of July 2026",
)

# As `modal billing rates --json` named them in September 2026: dollars per hour.
_CORE, _GIB, _GPU = "cpu_hour_cost_sandbox", "mem_gib_hour_cost_sandbox", "gpu_hour_cost_"
_GPU_KEYS = {
    **{name: name.lower().replace("-", "_") for name in TABLE.gpus},
    "A10": "a10g",
    "RTX-PRO-6000": "rtx6000",
}


def workspace_rates(given: Mapping[str, Any], table: Rates = TABLE) -> Rates:
    """What `Workspace.from_context().billing.rates()` says; `table` for what it does not say.

    The mapping is only iterated: asking it for a deprecated key makes modal warn.
    """
    found = {key: amount for key, value in given.items() if (amount := _hourly(value))}
    missing: list[str] = []

    def rate(key: str, name: str, known: float) -> float:
        if key not in found:
            missing.append(name)
            return known
        return found[key] / 3600

    core, gib = rate(_CORE, "cores", table.core), rate(_GIB, "memory", table.gib)
    gpus = {name: rate(_GPU + _GPU_KEYS[name], name, known) for name, known in table.gpus.items()}
    if len(missing) == len(gpus) + 2:
        return table
    rest = f"; {', '.join(missing)}: {table.source}" if missing else ""
    return Rates(gpus, core, gib, f"the workspace's rates{rest}")


def _hourly(value: object) -> float | None:
    """A positive amount, or None."""
    try:
        amount = float(str(value))
    except ValueError:
        return None
    return amount if math.isfinite(amount) and amount > 0 else None


def priced_as(gpu: str) -> str:
    """The name in a table of prices: H100! is paid as H100, B200+ as B200, A100 as its smaller one."""
    name = gpu.rstrip("!+")
    return "A100-40GB" if name == "A100" else name


@dataclass(frozen=True)
class Price:
    """What a running sandbox costs, whether it is used or not."""

    parts: Mapping[str, float]
    """What is paid for ("1 × H100", "8 cores", "64 GiB") -> dollars per second."""
    source: str
    """Where the rates are from: the workspace, or our table and its date."""
    gpus: int = 0

    @property
    def per_second(self) -> float:
        return sum(self.parts.values())

    def dollars(self, seconds: float) -> float:
        return self.per_second * seconds

    def spent(self, seconds: float) -> Spent:
        return Spent(self.dollars(seconds), self.gpus * seconds / 60)

    def sentence(self) -> str:
        """≈ $4.62/h: 1 × H100 $3.95/h, 2 cores $0.28/h, 16 GiB $0.38/h (source)."""
        parts = ", ".join(f"{name} {hourly(rate)}" for name, rate in self.parts.items())
        return f"≈ {hourly(self.per_second)}: {parts} ({self.source})"


def estimate(
    machine: Machine, rates: Rates = TABLE, used_cores: float = 0.0, used_gib: float = 0.0
) -> Price:
    """What such a machine costs. Of cores and memory the larger is paid: what is asked for, or used."""
    parts: dict[str, float] = {}
    gpus = machine.gpu_count if machine.gpu else 0
    if machine.gpu:
        name = priced_as(machine.gpu)
        if name not in rates.gpus:
            raise BadInput("gpu", machine.gpu, f"no price is known ({rates.source})")
        parts[f"{gpus} × {machine.gpu}"] = gpus * rates.gpus[name]
    cores = max(cores_of(machine), used_cores)
    gib = max(mebibytes_of(machine) / 1024, used_gib)
    parts["1 core" if cores == 1 else f"{cores:g} cores"] = cores * rates.core
    parts[f"{gib:.3g} GiB"] = gib * rates.gib
    return Price(parts, rates.source, gpus)


# -- budgets ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spent:
    dollars: float = 0.0
    gpu_minutes: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(self.dollars + other.dollars, self.gpu_minutes + other.gpu_minutes)


Level = Literal["fine", "warn", "spent"]


@dataclass(frozen=True)
class Verdict:
    level: Level
    says: str
    """A sentence, or "" if all is fine."""


@dataclass(frozen=True)
class Budget:
    """What may be spent, in either unit or both; None sets no limit."""

    dollars: float | None = None
    gpu_minutes: float | None = None

    def __bool__(self) -> bool:
        return self.dollars is not None or self.gpu_minutes is not None

    def share(self, spent: Spent) -> float:
        """How much of it is used: 1.0 is all."""
        pairs = ((spent.dollars, self.dollars), (spent.gpu_minutes, self.gpu_minutes))
        return max(
            (used / limit if limit else 1.0 for used, limit in pairs if limit is not None),
            default=0.0,
        )

    def seconds(self, price: Price, spent: Spent | None = None) -> float | None:
        """How long it lasts at that price; 0 if it is used up, None if it never will be."""
        spent = spent or Spent()
        lasts: list[float] = []
        if self.dollars is not None and price.per_second:
            lasts.append((self.dollars - spent.dollars) / price.per_second)
        if self.gpu_minutes is not None and price.gpus:
            lasts.append((self.gpu_minutes - spent.gpu_minutes) * 60 / price.gpus)
        return max(0.0, min(lasts)) if lasts else None

    def verdict(self, spent: Spent, of: str = "this sandbox") -> Verdict:
        share = self.share(spent)
        if not self or share < WARN_AT:
            return Verdict("fine", "")
        if share < 1:
            return Verdict(
                "warn",
                f"{share:.0%} of the budget of {of} is used ({self.used(spent)}); at 100% it is stopped.",
            )
        return Verdict("spent", f"the budget of {of} is used up ({self.used(spent)})")

    def used(self, spent: Spent) -> str:
        """$4.10 of $5.00, 62 of 60 GPU-minutes"""
        told: list[str] = []
        if self.dollars is not None:
            told.append(f"{money(spent.dollars)} of {money(self.dollars)}")
        if self.gpu_minutes is not None:
            told.append(f"{spent.gpu_minutes:.3g} of {self.gpu_minutes:g} GPU-minutes")
        return ", ".join(told)

    def __str__(self) -> str:
        dollars = [] if self.dollars is None else [money(self.dollars)]
        minutes = [] if self.gpu_minutes is None else [f"{self.gpu_minutes:g} GPU-minutes"]
        return " or ".join(dollars + minutes) or "no limit"


Period = Literal["day", "month", "ever"]
ALL, OWNERS, YOURS = "all sandboxes", "the owner's sandboxes", "your own sandboxes"


@dataclass(frozen=True)
class Allowance:
    """A budget for all sandboxes of a state folder or of an owner together, by day or month of UTC, or for ever."""

    budget: Budget
    period: Period

    def began(self, now: float) -> float:
        """When the period of that moment began."""
        if self.period == "ever":
            return 0.0
        at = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        return (at.replace(day=1) if self.period == "month" else at).timestamp()

    def __str__(self) -> str:
        return str(self.budget) + ("" if self.period == "ever" else f" a {self.period}")

    def of(self, whose: str) -> str:
        """What it is a budget of, for sentences."""
        return f"{whose}{'' if self.period == 'ever' else f' of this {self.period} (UTC)'}"

    def verdict(self, spent: Spent, owned: bool = False) -> Verdict:
        """`owned`: it is the budget of one owner, not of all sandboxes."""
        return self.budget.verdict(spent, self.of(OWNERS if owned else ALL))

    def admit(
        self, price: Price, spent: Spent, burning: Price | None = None, owned: bool = False
    ) -> float | None:
        """Seconds that a new sandbox may live beside what runs, or None. Raises BudgetSpent.

        `burning`: what runs now, as one price; the budget is used up together. `owned`: it is the
        budget of one owner, not of all sandboxes.
        """
        together = Price(
            {"new": price.per_second, "running": burning.per_second if burning else 0.0},
            price.source,
            price.gpus + (burning.gpus if burning else 0),
        )
        seconds = self.budget.seconds(together, spent)
        if seconds is not None and seconds < SHORTEST_SECONDS:
            raise BudgetSpent(
                self.of(YOURS if owned else ALL),
                self.budget.used(spent),
                "--owner-budget" if owned else "--budget",
                str(self),
                "" if self.period == "ever" else self.period,
            )
        return seconds


_AMOUNT = re.compile(
    r"\s*(?P<dollar>\$|USD\s)?\s*(?P<number>\d+(?:\.\d+)?)\s*"
    r"(?P<unit>\$|USD|dollars?|GPU[- ]?min(?:ute)?s?|GPU[- ]?h(?:ours?)?)?"
    r"(?:\s*(?:a|per|/)\s*(?P<period>day|month))?\s*",
    re.IGNORECASE,
)


def parse_allowance(text: str) -> Allowance:
    """ "$20 a day", "300 GPU-minutes a month", "50". Raises BadInput."""
    found = _AMOUNT.fullmatch(text)
    unit = (found["unit"] or "").lower() if found else ""
    if not found or not float(found["number"]) or (found["dollar"] and unit.startswith("gpu")):
        raise BadInput(
            "budget",
            text,
            'write dollars or GPU-minutes: "$20 a day", "$200 a month", "600 GPU-minutes a month", "$50"',
        )
    number = float(found["number"])
    if unit.startswith("gpu"):
        hours = unit.removeprefix("gpu").lstrip("- ").startswith("h")
        budget = Budget(gpu_minutes=number * 60 if hours else number)
    else:
        budget = Budget(dollars=number)
    period = (found["period"] or "ever").lower()
    return Allowance(budget, "day" if period == "day" else "month" if period == "month" else "ever")


# -- sentences --------------------------------------------------------------------------------


def hard_stop(
    price: Price | None, lifetime: float | None, budget: Budget, most: float | None = None
) -> float | None:
    """Seconds after which the machine must end, whoever watches: its lifetime, its budget, or `most`.

    Given to the cloud as the machine's own time limit, a budget holds although our server is dead.
    """
    by_budget = budget.seconds(price) if price else None
    return min((s for s in (lifetime, by_budget, most) if s is not None), default=None)


def terms(price: Price | None, seconds: float | None, budget: Budget | None = None) -> str:
    """What a start will cost, said before it: by the hour and at most. `seconds`: its hard stop."""
    if price is None:
        return "Nothing is billed for it."
    sentence = price.sentence()
    if seconds is None:
        return f"{sentence}; no lifetime and no budget limit it."
    most = f"at most {money(price.dollars(seconds))} in {duration(seconds)}"
    by_budget = budget.seconds(price) if budget else None
    if by_budget is not None and by_budget <= seconds:
        most += f", when its budget of {budget} is used up"
    return f"{sentence}; {most}."


def so_far(price: Price, seconds: float, budget: Budget | None = None) -> str:
    """$1.23 so far (18 min at $3.95/h), 25% of its budget of $5.00"""
    spent = price.spent(seconds)
    minutes = f", {spent.gpu_minutes:.3g} GPU-minutes" if price.gpus else ""
    told = f"{money(spent.dollars)} so far ({duration(seconds)} at {hourly(price.per_second)}{minutes})"
    return told + (f", {budget.share(spent):.0%} of its budget of {budget}" if budget else "")


def money(dollars: float) -> str:
    if 0 < dollars < 0.1:
        return f"${dollars:.3f}" if dollars >= 0.0005 else "less than $0.001"
    return f"${dollars:,.2f}"


def hourly(per_second: float) -> str:
    return f"{money(per_second * 3600)}/h"


def duration(seconds: float) -> str:
    """90 s, 45 min, 1 h 30 min, 2 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours >= 48 and not minutes and hours % 24 == 0:
        return f"{hours // 24} days"
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
