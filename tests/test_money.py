"""Prices, budgets, and the book of what was spent."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

import pytest

from seer_mcp.errors import BadInput, BudgetSpent
from seer_mcp.money import (
    TABLE,
    Allowance,
    Budget,
    Price,
    Spent,
    duration,
    estimate,
    hard_stop,
    money,
    parse_allowance,
    so_far,
    terms,
    workspace_rates,
)
from seer_mcp.spend import SpendBook

NOW = 1_790_000_000.0  # 2026-09-21, 14:13:20 UTC
HOUR = 3600.0

# As `modal billing rates --json` of September 2026 names them.
WORKSPACE = {
    "cpu_hour_cost": "0.04730",
    "cpu_hour_cost_sandbox": "0.141900",
    "mem_gib_hour_cost": "0.00800",
    "mem_gib_hour_cost_sandbox": "0.024000",
    "gpu_hour_cost_t4": "0.59",
    "gpu_hour_cost_l4": "0.80",
    "gpu_hour_cost_a10g": "1.10",
    "gpu_hour_cost_l40s": "1.95",
    "gpu_hour_cost_a100_40gb": "2.10",
    "gpu_hour_cost_a100_80gb": "2.50",
    "gpu_hour_cost_rtx6000": "3.03",
    "gpu_hour_cost_h100": "3.95",
    "gpu_hour_cost_h200": "4.54",
    "gpu_hour_cost_b200": "6.25",
    "gpu_hour_cost_b300": "7.10",
}


@dataclass(frozen=True)
class Machine:
    gpu: str | None = None
    gpu_count: int = 1
    cpu: float | None = None
    memory: int | None = None


H100 = Price({"1 × H100": 3.60 / HOUR}, "a test", 1)


# -- prices -----------------------------------------------------------------------------------


def test_every_part_of_a_machine_is_priced() -> None:
    price = estimate(Machine("H100", 2, cpu=8, memory=65536))
    assert price.parts == pytest.approx(
        {"2 × H100": 2 * 0.001097, "8 cores": 8 * 0.00003942, "64 GiB": 64 * 0.00000667}
    )
    assert price.gpus == 2
    assert price.sentence() == (
        "≈ $10.57/h: 2 × H100 $7.90/h, 8 cores $1.14/h, 64 GiB $1.54/h (Modal's price page of July 2026)"
    )


def test_eight_cores_and_64_gib_cost_more_than_an_a100() -> None:
    assert estimate(Machine(cpu=8, memory=65536)).per_second > TABLE.gpus["A100-80GB"]


def test_what_is_left_open_is_priced_as_it_is_asked_for() -> None:
    assert list(estimate(Machine()).parts) == ["2 cores", "4 GiB"]
    assert list(estimate(Machine("A100", 4)).parts) == ["4 × A100", "8 cores", "64 GiB"]


def test_the_larger_of_what_is_asked_for_and_used_is_paid() -> None:
    asked = Machine(cpu=2, memory=4096)
    assert estimate(asked, used_cores=1, used_gib=1) == estimate(asked)
    assert list(estimate(asked, used_cores=5.5, used_gib=20).parts) == ["5.5 cores", "20 GiB"]


@pytest.mark.parametrize(
    ("gpu", "as_"), [("H100!", "H100"), ("B200+", "B200"), ("A100", "A100-40GB")]
)
def test_variants_are_paid_as_their_kind(gpu: str, as_: str) -> None:
    assert estimate(Machine(gpu)).parts[f"1 × {gpu}"] == TABLE.gpus[as_]


def test_a_gpu_without_a_price_is_refused() -> None:
    with pytest.raises(BadInput, match="no price is known"):
        estimate(Machine("X1"))


def test_the_workspaces_rates_are_used_when_they_can_be_had() -> None:
    rates = workspace_rates({name: Decimal(value) for name, value in WORKSPACE.items()})
    assert rates.source == "the workspace's rates"
    assert rates.gpus["RTX-PRO-6000"] == pytest.approx(3.03 / HOUR)
    # The table is a transcription of the same prices: it must be near.
    assert rates.gpus == pytest.approx(dict(TABLE.gpus), rel=0.002)
    assert (rates.core, rates.gib) == pytest.approx((TABLE.core, TABLE.gib), rel=0.002)


def test_what_the_workspace_does_not_say_is_taken_from_the_table_and_named() -> None:
    given = {**WORKSPACE, "gpu_hour_cost_t4": "free", "cpu_hour_cost_sandbox": "NaN"}
    del given["gpu_hour_cost_h100"]
    rates = workspace_rates(given)
    assert (rates.gpus["H100"], rates.core) == (TABLE.gpus["H100"], TABLE.core)
    assert rates.source == f"the workspace's rates; cores, T4, H100: {TABLE.source}"
    assert workspace_rates({"other": 1}) == TABLE


def test_modals_own_mapping_of_rates_can_be_read() -> None:
    from modal._workspace import _WorkspaceBillingRates

    given = {**WORKSPACE, "cpu_hour_cost": "0.1"}
    theirs = _WorkspaceBillingRates(given, {"cpu_hour_cost": "old"}, {"gpu_hour_cost_t4": "x"}, "")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rates = workspace_rates(theirs)
    assert rates.source == f"the workspace's rates; T4: {TABLE.source}"
    assert rates.gpus["H100"] == pytest.approx(3.95 / HOUR)


# -- budgets ----------------------------------------------------------------------------------


def test_a_budget_warns_before_it_stops() -> None:
    budget = Budget(dollars=5)
    assert budget.verdict(Spent(3.99)).level == "fine"
    warned = budget.verdict(Spent(4.2))
    assert warned.level == "warn" and "84%" in warned.says and "$4.20 of $5.00" in warned.says
    assert budget.verdict(Spent(5.0)).level == "spent"
    assert Budget().verdict(Spent(1e9)).level == "fine"


def test_the_unit_that_is_used_up_first_counts() -> None:
    budget = Budget(dollars=100, gpu_minutes=60)
    assert budget.verdict(Spent(dollars=6.6, gpu_minutes=66)).level == "spent"
    assert budget.seconds(H100) == pytest.approx(HOUR)
    assert Budget(dollars=1.8, gpu_minutes=60).seconds(H100) == pytest.approx(HOUR / 2)
    assert budget.seconds(H100, Spent(0, 45)) == pytest.approx(HOUR / 4)
    assert budget.seconds(H100, Spent(0, 70)) == 0
    cheap = Price({"1 core": 0.1 / HOUR}, "a test")
    assert Budget(gpu_minutes=60).seconds(cheap) is None


def test_a_budget_becomes_the_machines_own_time_limit() -> None:
    assert hard_stop(H100, 4 * HOUR, Budget(dollars=1.8)) == pytest.approx(HOUR / 2)
    assert hard_stop(H100, 4 * HOUR, Budget(dollars=50)) == 4 * HOUR
    assert hard_stop(H100, None, Budget()) is None
    assert hard_stop(None, None, Budget(dollars=1), most=24 * HOUR) == 24 * HOUR


def test_what_a_start_will_cost_is_said_before_it() -> None:
    assert terms(H100, 4 * HOUR) == ("≈ $3.60/h: 1 × H100 $3.60/h (a test); at most $14.40 in 4 h.")
    budget = Budget(dollars=1.8)
    seconds = hard_stop(H100, 4 * HOUR, budget)
    assert terms(H100, seconds, budget).endswith(
        "at most $1.80 in 30 min, when its budget of $1.80 is used up."
    )
    assert "no lifetime and no budget" in terms(H100, None)
    assert terms(None, None) == "Nothing is billed for it."


def test_the_cost_so_far_is_said() -> None:
    assert so_far(H100, 1200, Budget(dollars=4.8)) == (
        "$1.20 so far (20 min at $3.60/h, 20 GPU-minutes), 25% of its budget of $4.80"
    )


@pytest.mark.parametrize(
    ("text", "budget", "period"),
    [
        ("$20 a day", Budget(dollars=20), "day"),
        ("200 dollars per month", Budget(dollars=200), "month"),
        ("12.5", Budget(dollars=12.5), "ever"),
        ("USD 5/day", Budget(dollars=5), "day"),
        ("600 GPU-minutes a month", Budget(gpu_minutes=600), "month"),
        ("10 gpu hours", Budget(gpu_minutes=600), "ever"),
    ],
)
def test_a_budget_is_written_as_one_says_it(text: str, budget: Budget, period: str) -> None:
    assert parse_allowance(text) == Allowance(budget, period)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "0", "-5", "lots", "$5 GPU-minutes", "5 a week", "$", "1e9"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="GPU-minutes"):
        parse_allowance(text)


def test_periods_begin_at_midnight_and_on_the_first_in_utc() -> None:
    assert parse_allowance("$1 a day").began(NOW) == NOW - (14 * 3600 + 13 * 60 + 20)
    assert (
        parse_allowance("$1 a month").began(NOW)
        == parse_allowance("$1 a day").began(NOW) - 20 * 86400
    )
    assert parse_allowance("$1").began(NOW) == 0


def test_an_allowance_admits_what_it_can_pay_for() -> None:
    allowance = parse_allowance("$10 a day")
    assert allowance.admit(H100, Spent(6.4)) == pytest.approx(HOUR)
    # What runs already uses the same budget up.
    assert allowance.admit(H100, Spent(6.4), burning=H100) == pytest.approx(HOUR / 2)
    with pytest.raises(BudgetSpent, match=r"\$9\.99 of \$10\.00.*--budget"):
        allowance.admit(H100, Spent(9.99))


@pytest.mark.parametrize("owner", [None, "anna"])
@pytest.mark.parametrize("limit", ["$10 a day", "$10"])
def test_a_spent_budget_says_whose_it_is_and_what_to_do(
    book: SpendBook, owner: str | None, limit: str
) -> None:
    book.note("a", H100, NOW - 3 * HOUR, NOW, owner="anna", closed=True)
    with pytest.raises(BudgetSpent) as caught:
        book.admit([parse_allowance(limit)], H100, NOW, owner)
    said = str(caught.value)
    of_day = " of this day (UTC)" if "day" in limit else ""
    whose = "your own sandboxes" if owner else "all sandboxes"
    assert f"the budget of {whose}{of_day} is used up ($10.80 of $10.00)" in said
    assert ("wait for the next day (UTC)" in said) == ("day" in limit)
    flag = "--owner-budget" if owner else "--budget"
    assert f"({flag}, now '{limit.replace('10', '10.00')}')" in said
    (verdict,) = book.verdicts([parse_allowance(limit)], NOW, owner)
    of = "the owner's sandboxes" if owner else "all sandboxes"
    assert verdict.says == f"the budget of {of}{of_day} is used up ($10.80 of $10.00)"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(90, "90 s"), (2700, "45 min"), (5400, "1 h 30 min"), (7199, "2 h"), (172800, "2 days")],
)
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


def test_small_and_large_amounts() -> None:
    assert [money(x) for x in (0, 0.0001, 0.0123, 3.949, 12345.6)] == [
        "$0.00",
        "less than $0.001",
        "$0.012",
        "$3.95",
        "$12,345.60",
    ]


# -- the book ---------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path: Path) -> SpendBook:
    return SpendBook(tmp_path / "spend.jsonl", "server1")


def test_a_closed_sandbox_costs_what_it_ran(book: SpendBook) -> None:
    book.note("a", H100, NOW, NOW, owner="ann")
    book.note("a", H100, NOW, NOW + 1800, owner="ann", closed=True)
    assert book.of("a", NOW + 9999).dollars == pytest.approx(1.8)
    assert book.spent(0, NOW + 9999) == Spent(pytest.approx(1.8), pytest.approx(30))
    assert book.spent(0, NOW + 9999, owner="bob") == Spent()
    assert book.burning(NOW + 9999) is None
    assert book.path.stat().st_mode & 0o777 == 0o600


def test_one_that_is_not_closed_costs_on_until_it_must_have_ended(book: SpendBook) -> None:
    book.note("a", H100, NOW, NOW, ends_by=NOW + 4 * HOUR)
    assert book.of("a", NOW + HOUR).dollars == pytest.approx(3.6)
    assert book.of("a", NOW + 99 * HOUR).dollars == pytest.approx(14.4)
    assert book.burning(NOW + HOUR) is not None and book.burning(NOW + 5 * HOUR) is None
    book.note("a", H100, NOW, NOW + 600, closed=True)  # it had ended long before
    assert book.of("a", NOW + 99 * HOUR).dollars == pytest.approx(0.6)


def test_a_period_holds_only_its_own_part(book: SpendBook) -> None:
    book.note("a", H100, NOW - 2 * HOUR, NOW, closed=True)
    assert book.spent(NOW - HOUR, NOW).dollars == pytest.approx(3.6)
    assert book.spent(NOW, NOW + HOUR) == Spent()


def test_lines_that_are_repeated_or_come_late_change_nothing(book: SpendBook) -> None:
    book.note("a", H100, NOW, NOW + 60)
    book.note("a", H100, NOW, NOW + 60)
    book.note("a", H100, NOW, NOW + 120, closed=True)
    book.note("a", H100, NOW, NOW + 60)  # of another server, which did not know
    assert book.of("a", NOW + HOUR).dollars == pytest.approx(0.12)


def test_damaged_lines_are_passed_over_and_said(book: SpendBook) -> None:
    book.note("a", H100, NOW, NOW + 60, closed=True)
    bad = [
        b"not json",
        b'{"sandbox": 5}',
        b"[1]",
        b'{"sandbox": "b", "began": 1e999, "until": 5, "per_second": 1, "gpus": 0}',
        b'{"sandbox": "b", "began": NaN, "until": 5, "per_second": 1, "gpus": 0}',
        b'{"sandbox": "b", "began": 9, "until": 5, "per_second": 1, "gpus": 0}',
        b'{"sandbox": "b", "began": 1, "until": 5, "per_second": -1, "gpus": 0}',
        b'{"sandbox": "b", "began": 1, "until": ' + b"9" * 400 + b', "per_second": 1, "gpus": 0}',
        b'{"sandbox": "b", "began": 1, "until": 5, "per_second": 1, "gpus": true}',
        b"[" * 100_000,
        b"\xff\xfe",
    ]
    with book.path.open("ab") as file:
        file.write(b"\n".join(bad) + b"\n\n")
    book.note("c", H100, NOW, NOW + 60, closed=True)
    assert book.spent(0, NOW + HOUR).dollars == pytest.approx(0.12)
    assert book.damaged == len(bad) and "11 lines" in book.damage()


def test_a_line_that_was_cut_short_harms_no_other(book: SpendBook) -> None:
    book.note("a", H100, NOW, NOW + 60, closed=True)
    with book.path.open("ab") as file:
        file.write(b'{"sandbox": "b", "beg')  # its server was killed here
    assert book.spent(0, NOW + HOUR).dollars == pytest.approx(0.06) and book.damage() == ""
    book.note("c", H100, NOW, NOW + 60, closed=True)
    assert book.spent(0, NOW + HOUR).dollars == pytest.approx(0.12)
    assert book.damaged == 1


def test_a_book_that_is_moved_away_begins_anew(book: SpendBook) -> None:
    assert book.spent(0, NOW) == Spent()
    book.note("a", H100, NOW, NOW + 60, closed=True)
    assert book.spent(0, NOW + HOUR).dollars == pytest.approx(0.06)
    book.path.rename(book.path.with_suffix(".old"))
    assert book.spent(0, NOW + HOUR) == Spent()
    book.note("b", H100, NOW, NOW + 120, closed=True)
    assert book.spent(0, NOW + HOUR).dollars == pytest.approx(0.12)


def test_servers_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "spend.jsonl"
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from seer_mcp.money import Price\n"
        "from seer_mcp.spend import SpendBook\n"
        "book = SpendBook(Path(sys.argv[1]))\n"
        "for i in range(200):\n"
        "    book.note(f'{sys.argv[2]}-{i}', Price({'x': 1.0}, ''), 1000.0, 1001.0, closed=True)\n"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in ("a", "b", "c")
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    book = SpendBook(path)
    assert book.spent(0, 2000).dollars == pytest.approx(600)
    assert book.damaged == 0
    assert all(json.loads(line)["closed"] for line in path.read_text().splitlines())


def test_the_book_refuses_warns_and_names_what_is_used(book: SpendBook) -> None:
    day, month = parse_allowance("$4 a day"), parse_allowance("90 GPU-minutes a month")
    book.note("a", H100, NOW - HOUR, NOW, closed=True)
    assert [v.level for v in book.verdicts([day, month], NOW)] == ["warn"]
    assert book.admit([day, month], H100, NOW) == pytest.approx(400)
    assert book.admit([], H100, NOW) is None
    book.note("b", H100, NOW, NOW, ends_by=NOW + HOUR)
    assert book.admit([day, month], H100, NOW) == pytest.approx(200)  # two use it up
    assert [v.level for v in book.verdicts([day, month], NOW + HOUR)] == ["spent", "spent"]
    with pytest.raises(BudgetSpent, match="this day"):
        book.admit([day, month], H100, NOW + HOUR)
    tomorrow = NOW + 86400
    assert [v.level for v in book.verdicts([day], tomorrow)] == []
