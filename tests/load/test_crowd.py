"""benchmarks/load.py in small: what it counts is what it should count."""

import time
from pathlib import Path

import pytest

from benchmarks.load import Seen, client, crowd, rows

pytestmark = pytest.mark.anyio


async def test_ten_clients_of_three_owners_get_only_their_own(tmp_path: Path) -> None:
    seen = (await crowd(tmp_path, 10, seconds=3, think=0.2)).report()
    assert (seen["errors"], seen["crossed"]) == (0, 0), seen["examples"]
    assert seen["sandboxes"] == 3 and seen["calls"] >= 60
    assert seen["strangers_refused"] >= 10
    assert 0 < seen["status_p50_ms"] <= seen["status_p99_ms"] < 2000
    (row,) = rows([seen])
    assert row[0] == "10 on 3 stub kernels"


class Mixed:
    """A server that gives everybody the same answers."""

    async def call(self, tool: str, /, **arguments: str) -> dict:
        text = {"list_sandboxes": "mine theirs"}.get(tool, "marker 7 7")
        return {
            "content": [{"type": "text", "text": text}],
            "_meta": {"seer/run": {"cell": "c"}},
        }


async def test_what_is_crossed_is_counted() -> None:
    seen = Seen("stub", 1)
    await client(seen, Mixed(), 1, "mine", "theirs", time.monotonic() + 0.05, 0.01)
    assert len(seen.crossed) >= 4 and seen.strangers == 0
