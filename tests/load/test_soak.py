"""L03: work that goes on for long under faults of all kinds loses no line and takes no more room."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from .soak import FAULTS, Report, soak, table
from .work import Planned, verdict

pytestmark = pytest.mark.anyio


def holds(report: Report) -> None:
    """The promises that do not depend on how long it took."""
    sys.stdout.write(f"L03: {table(report)}\n")
    assert report.problems == []
    assert report.lost == 0
    assert report.twice == 0
    assert report.left_over == []
    assert report.lines > 10 * report.runs
    assert set(report.faults) == set(FAULTS), "every kind of fault came"


@pytest.mark.timeout(240)
async def test_l03_twelve_seconds_of_every_fault(tmp_path: Path) -> None:
    report = await soak(
        tmp_path, minutes=12 / 60, runs=24, seed=7, sandboxes=3, fault_every=12 / len(FAULTS) / 1.3
    )
    holds(report)


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_l03_half_an_hour_and_5000_runs(tmp_path: Path) -> None:
    report = await soak(tmp_path, minutes=30, runs=5000, seed=1)
    holds(report)
    assert report.runs >= 5000
    assert report.stretch["seconds"] >= 600
    assert report.stretch["growth"] < 0.10
    for name in ("descriptors", "threads"):
        assert abs(report.stretch[name]["end"] - report.stretch[name]["warm"]) <= 3, report.stretch


# -- the judge itself -------------------------------------------------------------------------


def judged(
    tmp_path: Path, said: str, kept: str, state: str = "complete", **of_run: str
) -> list[str]:
    """What the judge finds wrong with a run that wrote `said` and whose notebook holds `kept`."""
    truth = tmp_path / "truth"
    truth.write_text(said)
    run = Planned(7, "s", of_run.get("kind", "plain"), truth)
    cell = {
        "cell_type": "code",
        "source": run.source,
        "metadata": {"seer": {"state": state}},
        "outputs": [{"output_type": "stream", "name": "stdout", "text": kept}],
    }
    assert json.dumps(cell)
    return verdict(run, tmp_path / "n.ipynb", [cell], kept).problems


def test_the_judge_sees_what_is_lost_repeated_or_untrue(tmp_path: Path) -> None:
    whole = "line 7 0 \nline 7 1 \nline 7 2 \n"
    said = "begin\n0\n1\n2\nend\n"
    assert judged(tmp_path, said, whole) == []
    assert judged(tmp_path, said, whole, state="kernel_died")
    assert any("lacks 1 lines" in p for p in judged(tmp_path, said, whole[:-10]))
    assert any("twice" in p for p in judged(tmp_path, said, whole + whole))
    assert any("ran 2 times" in p for p in judged(tmp_path, said + said, whole))
    assert any("reach its end" in p for p in judged(tmp_path, said[:-4], whole))
    assert judged(tmp_path, said[:-4], whole, state="kernel_died", kind="exit") == []
    truth = tmp_path / "truth"
    run = Planned(7, "s", "plain", truth)
    assert verdict(run, tmp_path / "n.ipynb", [], None).lost == 3
