"""Garbage on a kernel host's socket: the host goes on serving everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ..faults.stub_kernel import stub_python
from ..support import Lab, open_lab, processes_of
from .mutate import ODD, cases, damaged, report

pytestmark = pytest.mark.anyio
HANG = 20.0
# Not "stop" and "restart": what these do is no accident.
GOOD: tuple[dict[str, Any], ...] = (
    {"id": 1, "op": "ping"},
    {"id": 2, "op": "status"},
    {"id": 3, "op": "subscribe", "from": 1},
    {"id": 4, "op": "run", "runs": [{"run": "rx", "code": "garbage"}], "stop_on_error": True},
    {"id": 5, "op": "runs", "runs": ["rx", "ry"]},
    {"id": 6, "op": "interrupt", "run": "rx", "everything": False},
    {"id": 7, "op": "read_file", "path": "x", "offset": 0, "limit": 10},
    {"id": 8, "op": "write_file", "path": "sub/x", "data": "aGk=", "append": False},
    {"id": 9, "op": "list_files", "path": "."},
    {"id": 10, "op": "command", "run": "cx", "command": "true"},
    {"id": 11, "op": "__init__"},
    {"id": 12, "op": "nothing"},
)


def garbage(random: Random) -> bytes:
    kind = random.random()
    if kind < 0.1:
        return random.randbytes(random.choice((1, 100, 70_000)))
    if kind < 0.2:
        return random.choice(
            (b"\n" * 500, b"[" * 20_000 + b"\n", b"null\n", b"5\n", b'"x"\n', b"[]\n")
        )
    request = dict(random.choice(GOOD))
    for _ in range(random.choice((0, 1, 1, 2))):
        request[random.choice([*request, "more"])] = random.choice(ODD)
    if "runs" in request and isinstance(request["runs"], list) and random.random() < 0.5:
        runs = [random.choice((*ODD, {"run": random.choice(ODD), "code": random.choice(ODD)}))]
        request["runs"] = runs * random.choice((1, 2))
    line = json.dumps(request).encode() + b"\n"
    return damaged(random, line) if random.random() < 0.4 else line


async def throw(socket: str, data: bytes) -> None:
    """Say it, look whether something comes back, and go."""
    reader, writer = await asyncio.open_unix_connection(socket)
    writer.write(data)
    with contextlib.suppress(ConnectionError):
        async with asyncio.timeout(HANG):
            await writer.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.01):
                await reader.read(100)
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def serves(lab: Lab, handle: str, text: str) -> None:
    async with asyncio.timeout(HANG):
        result = await lab.cell(handle, text)
    assert not result.is_error, result
    assert result.meta["seer/run"]["state"] == "complete"


async def fuzz(folder: Path, count: int) -> dict[str, int]:
    async with open_lab(folder, python=str(stub_python(folder))) as lab:
        handle = await lab.start(name="host")
        state = folder / "state" / "sandboxes" / handle / "record.json"
        socket = json.loads(state.read_text())["sandbox"]["socket"]
        pids = {p.pid for p in processes_of(handle)}
        checks = 0
        for name, random in cases("host", count):
            data = b"".join(garbage(random) for _ in range(random.randrange(1, 4)))
            try:
                await throw(socket, data)
                if checks < count // 5 and random.random() < 0.25:
                    checks += 1
                    await serves(lab, handle, f"still here {name}")
            except BaseException as error:
                error.add_note(f"case {name}: {data[:3000]!r}")
                raise
        await serves(lab, handle, "at the end")
        assert {p.pid for p in processes_of(handle)} >= pids, "a process of the sandbox ended"
        return {"cases": count, "cells run between": checks, "failures": 0}


async def test_garbage_on_the_socket_of_a_host(tmp_path: Path) -> None:
    told = await fuzz(tmp_path, 150)
    assert told["cells run between"] > 10


async def test_a_line_of_a_hundred_megabytes_and_half_a_request(tmp_path: Path) -> None:
    async with open_lab(tmp_path, python=str(stub_python(tmp_path))) as lab:
        handle = await lab.start(name="host")
        state = tmp_path / "state" / "sandboxes" / handle / "record.json"
        socket = json.loads(state.read_text())["sandbox"]["socket"]
        silent = [await asyncio.open_unix_connection(socket) for _ in range(50)]
        for _, writer in silent:
            writer.write(b'{"id": 1, "op": "sta')
        _, large = await asyncio.open_unix_connection(socket)
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                large.write(b"x" * 1_000_000)
                async with asyncio.timeout(HANG):
                    await large.drain()
        await serves(lab, handle, "meanwhile")
        assert time.monotonic() - began < HANG
        host = min(processes_of(handle), key=lambda p: p.create_time())
        assert host.memory_info().rss < 300_000_000
        for _, writer in [*silent, (None, large)]:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def test_one_run_named_twice_in_a_request_runs_once(tmp_path: Path) -> None:
    async with open_lab(tmp_path, python=str(stub_python(tmp_path))) as lab:
        handle = await lab.start(name="host")
        folder = tmp_path / "state" / "sandboxes" / handle
        socket = json.loads((folder / "record.json").read_text())["sandbox"]["socket"]
        reader, writer = await asyncio.open_unix_connection(socket)
        runs = [{"run": "r1", "code": "once"}, {"run": "r1", "code": "once"}]
        for number in (1, 2):
            writer.write((json.dumps({"id": number, "op": "run", "runs": runs}) + "\n").encode())
            assert json.loads(await reader.readline())["ok"]
        await serves(lab, handle, "after it")
        made = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]
        assert [e["type"] for e in made if e.get("run") == "r1"].count("start") == 1
        writer.close()


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_a_thousand_pieces_of_garbage(tmp_path: Path) -> None:
    report("garbage to a host", await fuzz(tmp_path, 1000))
