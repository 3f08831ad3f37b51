"""What the operator sees: figures for Prometheus behind the scope admin, and costs of each day and owner."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from seer_mcp.cli import main
from seer_mcp.http.tokens import SCOPES, TokenFile
from seer_mcp.money import Price
from seer_mcp.spend import SpendBook

from ..faults.ground import Ground, http_server


@pytest.mark.anyio
async def test_metrics_count_what_was_done_and_name_nobody(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    operator, _ = users.create("olga", ["admin"], 1)
    config = place.config(team=True, team_backends=("local",))
    async with (
        http_server(config, users=users) as server,
        server.lab("auto", anna) as lab,
        httpx2.AsyncClient(base_url=server.url.removesuffix("/mcp")) as http,
    ):
        handle = await lab.start(name="quiet")
        await lab.cell(handle, "print('x' * 1000)")
        await lab.cell(handle, "1/0")
        await lab.no("read_notebook", sandbox="nobody")
        for bad in ({}, {"Authorization": "Bearer guess-guess-guess-guess"}):
            assert (await http.get("/metrics", headers=bad)).status_code == 401
        hers = await http.get("/metrics", headers={"Authorization": f"Bearer {anna}"})
        assert hers.status_code == 403 and "seer_" not in hers.text
        answer = await http.get("/metrics", headers={"Authorization": f"Bearer {operator}"})
        assert answer.status_code == 200
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return values[(name, *sorted(labels.items()))]

    assert value("seer_call_seconds_count", tool="create_cell", outcome="ok") == 1
    assert value("seer_call_seconds_count", tool="create_cell", outcome="error") == 1
    assert value("seer_call_seconds_count", tool="read_notebook", outcome="error") == 1
    assert value("seer_run_seconds_count", kind="cell", state="complete") == 1
    assert value("seer_run_seconds_count", kind="cell", state="error") == 1
    assert value("seer_run_output_bytes_total", kind="cell") >= 1001
    assert value("seer_sandboxes", backend="local", state="ready") == 1
    assert value("seer_spent_dollars_total") == 0
    for private in ("anna", "olga", handle, "quiet", str(place.folder)):
        assert private not in answer.text


def test_costs_are_told_for_each_owner_and_day(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = datetime.fromtimestamp(time.time()).replace(hour=12).timestamp()
    monkeypatch.setattr(time, "time", lambda: now)
    midnight = datetime.fromtimestamp(now).replace(hour=0, minute=0, second=0, microsecond=0)
    book = SpendBook(tmp_path / "spend.jsonl", "")
    price = Price({"gpu": 0.001}, "the table", 1)
    begin = midnight.timestamp() - 3600  # an hour before midnight, two after
    book.note("a-1", price, begin, begin + 3 * 3600, owner="anna", closed=True)
    book.note("b-1", price, now - 600, now, owner="ben", closed=True)
    assert main(["sandboxes", "costs", "--json", "--state", str(tmp_path)]) == 0
    told = json.loads(capsys.readouterr().out)["costs"]
    today, yesterday = f"{midnight:%Y-%m-%d}", f"{datetime.fromtimestamp(begin):%Y-%m-%d}"
    assert [(t["day"], t["owner"], t["dollars"], round(t["gpu_minutes"], 3)) for t in told] == [
        (today, "anna", 7.2, 120.0),
        (today, "ben", 0.6, 10.0),
        (yesterday, "anna", 3.6, 60.0),
    ]
    assert main(["sandboxes", "costs", "--days", "1", "--state", str(tmp_path)]) == 0
    assert yesterday not in (shown := capsys.readouterr().out) and "$7.20" in shown
