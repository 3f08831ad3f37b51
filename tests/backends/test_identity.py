"""Which process, and which machine, a record of a local sandbox means."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from mcp import Client

from seer_mcp.kernel_host import identity
from seer_mcp.server import build_server
from seer_mcp.sessions.record import sealed

from ..faults.ground import ground
from ..support import Lab, text_of

pytestmark = pytest.mark.anyio


def test_a_clock_that_is_set_makes_no_sandbox_dead() -> None:
    record = identity.of_process(os.getpid())
    assert identity.is_alive(record) and identity.is_alive({**record, "started": 0.0})
    without = {key: record[key] for key in ("pid", "started")}
    assert identity.is_alive(without) and not identity.is_alive({**without, "started": 0.0})


def test_a_number_that_was_given_again_or_an_earlier_boot_is_another_process() -> None:
    record = identity.of_process(os.getpid())
    assert not identity.is_alive({**record, "ticks": record["ticks"] - 1})
    assert not identity.is_alive({**record, "boot": "an earlier one"})
    with subprocess.Popen(["true"]) as child:
        ended = identity.of_process(child.pid)
    assert not identity.is_alive(ended)


async def test_a_sandbox_of_another_machine_is_left_alone(tmp_path: Path) -> None:
    with ground(tmp_path) as place:
        async with Client(build_server(place.config(on_exit="keep"))) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            await lab.cell(handle, "x = 5")
        path = place.folder / "state" / "sandboxes" / handle / "record.json"
        here = path.read_text()
        record = {key: value for key, value in json.loads(here).items() if key != "check"}
        away = {**record["sandbox"], "boot": "another's", "machine": "node-7"}
        path.write_text(json.dumps(sealed({**record, "sandbox": away})))
        async with Client(build_server(place.config(on_exit="keep"))) as client:
            told = await Lab(client, place.folder).ok("list_sandboxes")
            assert handle in told and "the machine node-7 and may still run there" in told
        assert place.processes(), "it was ended"
        path.write_text(here)
        async with Client(build_server(place.config())) as client:
            lab = Lab(client, place.folder)
            assert text_of(await lab.cell(handle, "x")).endswith("5")
            await lab.ok("stop_sandbox", sandbox=handle)
