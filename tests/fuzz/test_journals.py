"""Damaged journals, and hosts that say anything: what can be read is read, and the rest is said."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import nbformat
import pytest

from seer_mcp.errors import SandboxUnreachable
from seer_mcp.files import Lock, private_dir
from seer_mcp.ipynb import STATES
from seer_mcp.kernel import Link
from seer_mcp.notebook import Notebook
from seer_mcp.sessions import Session

from ..support import read_cells
from .mutate import cases, damaged, report

pytestmark = pytest.mark.anyio
HANG = 20.0
RUNS = ("r0000000001", "r0000000002", "r0000000003")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def events() -> list[dict[str, Any]]:
    """What a host writes down of three runs, the last of which goes on."""
    first, second, third = ({"run": run} for run in RUNS)
    end = {"type": "end", "t": 2.0, "seconds": 0.5, "output_bytes": 20, "dropped_bytes": 0}
    shown = {"data": {"text/plain": "1", "image/png": PNG}, "metadata": {}, "display_id": "d"}
    made: list[dict[str, Any]] = [
        {"type": "kernel", "state": "starting", "generation": 1},
        {"type": "kernel", "state": "ready", "generation": 1, "how": "", "pid": 5},
        {**first, "type": "start", "t": 1.0},
        *({**first, "type": "stream", "name": "stdout", "text": f"line {i}\n"} for i in range(6)),
        {**first, "type": "display", **shown},
        {**first, "type": "clear", "wait": True},
        {**first, "type": "stream", "name": "stderr", "text": "10%\r20%\r"},
        {**first, "type": "result", **shown, "count": 1},
        {**first, **end, "state": "complete", "why": "", "count": 1},
        {**second, "type": "start", "t": 1.5},
        {**second, "type": "update", **shown},
        {**second, "type": "error", "ename": "E", "evalue": "v", "traceback": ["a", "b"]},
        {**second, **end, "state": "error", "why": "", "count": 2},
        {**first, "type": "stream", "name": "stdout", "text": "late\n", "late": True},
        {"type": "lost", "bytes": 7},
        {**third, "type": "start", "t": 1.7},
        *({**third, "type": "stream", "name": "stdout", "text": f"more {i}\n"} for i in range(6)),
        {**third, "type": "capped", "cap": 100},
    ]
    return [{"n": n, **event} for n, event in enumerate(made, 1)]


def lines(of: list[dict[str, Any]]) -> bytes:
    return b"".join((json.dumps(event) + "\n").encode() for event in of)


def session_in(folder: Path) -> Session:
    """A session whose three cells were running when its server died."""
    path = folder / "n.ipynb"
    path.unlink(missing_ok=True)
    document = Notebook(path)
    for run in RUNS:
        document.begin(document.insert("code", run), run)
    state = private_dir(folder / "state")
    return Session("s-1", "s", "local", "local", document, state, Lock(state / "lock"), 1.0)


async def read_left_behind(folder: Path, data: bytes) -> str:
    """Read it as a server does that finds the host gone; what came of it."""
    session = session_in(folder)
    journal = folder / "journal.jsonl"
    journal.write_bytes(data)

    async def left_behind() -> Path:
        return journal

    session._left_behind = left_behind  # type: ignore[method-assign]  # what a backend gives
    async with asyncio.timeout(HANG):
        await session._end_lost("its host is gone", 1)
    nbformat.validate(json.loads(session.notebook.path.read_text()))
    cells = read_cells(session.notebook.path)
    assert [c["metadata"]["seer"]["run"] for c in cells] == list(RUNS)
    assert all(c["metadata"]["seer"]["state"] in STATES - {"queued", "running"} for c in cells)
    assert session.ended is not None
    told = "could not be read" in session.ended
    assert told == bool(session.damaged_lines)
    if not told:
        return "whole" if data == lines(events()) else "other but sound"
    third = cells[2]["metadata"]["seer"]
    if third["state"] in ("sandbox_lost", "expired"):
        assert "could not be read" in third["why"], third
    return "damaged"


async def fuzz_left_behind(folder: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    whole = lines(events())
    assert await read_left_behind(folder, whole) == "whole"
    for name, random in cases("journal", count):
        data = damaged(random, whole)
        began = time.monotonic()
        try:
            found[await read_left_behind(folder, data)] += 1
            assert time.monotonic() - began < HANG
        except BaseException as error:
            error.add_note(f"case {name}: {data[:3000]!r}")
            raise
    return found


async def test_a_damaged_journal_of_a_host_that_is_gone(tmp_path: Path) -> None:
    found = await fuzz_left_behind(tmp_path, 100)
    assert found["damaged"] > 20


async def test_how_much_is_damaged_is_said(tmp_path: Path) -> None:
    """Two lines of nonsense and a number that is missing, in the run that goes on."""
    made = [line + b"\n" for line in lines(events()).splitlines()]
    kept = [*made[:-4], b"nonsense\n", b'{"n": 5}\n', *made[-2:]]
    session = session_in(tmp_path)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(kept) + b'{"n": 99, "ty')

    async def left_behind() -> Path:
        return tmp_path / "journal.jsonl"

    session._left_behind = left_behind  # type: ignore[method-assign]
    await session._end_lost("its host is gone", 1)
    assert session.ended == (
        "its host is gone; 3 lines of the sandbox's journal (31 bytes) could not be read, and what they "
        "said is missing here"
    )
    facts = [c["metadata"]["seer"] for c in read_cells(session.notebook.path)]
    assert [f.get("damaged") for f in facts] == [None, None, 3]
    assert "3 lines" in facts[2]["why"] and facts[2]["state"] == "sandbox_lost"


# -- a host that says anything --------------------------------------------------------------------


class Hostile:
    """A host on a real socket: the first connections get garbage, the later ones the truth."""

    def __init__(self, random: Random, bad: list[bytes], stay: bool) -> None:
        self._random = random
        self._bad = bad
        self._stay = stay
        self.dials = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.dials += 1
        try:
            garbage = self._bad.pop(0) if self._bad else None
            if garbage is not None:
                writer.write(garbage + (b"\n" if self._stay else b""))
                await writer.drain()
                if not self._stay:
                    return
            while line := await reader.readline():
                asked = json.loads(line)
                if asked["op"] == "subscribe":
                    answer = {"last": len(events())}
                    writer.write((json.dumps({"id": 0, "ok": True, **answer}) + "\n").encode())
                    writer.write(lines([e for e in events() if e["n"] >= asked["from"]]))
                elif asked["op"] == "runs":
                    writer.write(
                        (json.dumps({"id": asked["id"], "ok": True, "runs": []}) + "\n").encode()
                    )
                await writer.drain()
        except (ConnectionError, ValueError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def hostile(path: Path, host: Hostile) -> AsyncIterator[None]:
    path.unlink(missing_ok=True)
    server = await asyncio.start_unix_server(host.talk, str(path), limit=2**20)
    try:
        yield
    finally:
        server.close()


async def follow(folder: Path, host: Hostile) -> tuple[list[int], int]:
    """Follow a host until it makes sense: the numbers of its events, and how many lines were damaged."""
    numbers: list[int] = []
    damage: list[int] = []
    path = folder / "h"

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(path), limit=2**18)

    async def is_gone() -> str | None:
        return None

    def gone(why: str) -> None:
        raise AssertionError(why)

    async with hostile(path, host):
        link = Link(
            dial,
            1,
            lambda event: numbers.append(event["n"]),
            lambda count, size: damage.append(count),
            is_gone,
            gone,
        )
        link.open()
        try:
            assert (await link.request("runs", timeout=HANG, runs=[]))["runs"] == []
            await asyncio.wait_for(link.caught_up(), HANG)
        finally:
            await link.close()
        with pytest.raises(SandboxUnreachable):
            await link.request("runs", runs=[])
    return numbers, sum(damage)


async def fuzz_link(folder: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    whole = b'{"id": 0, "ok": true, "last": 24}\n' + lines(events())
    odd = (b"", b"\n" * 1000, b"x" * 600_000, b"[" * 100_000 + b"\n", b"\0" * 5000, whole * 3)
    for name, random in cases("link", count):
        stay = random.random() < 0.5
        bad = [
            damaged(random, whole) if random.random() < 0.8 else random.choice(odd)
            for _ in range(random.choice((1, 1, 2)))
        ]
        host = Hostile(random, list(bad), stay)
        try:
            numbers, damage = await follow(folder, host)
            assert numbers == sorted(set(numbers)), f"not each once in order: {numbers}"
            assert host.dials <= len(bad) + 2, f"dialled {host.dials} times"
            expected = len(events())
            assert damage or len(numbers) >= expected, "something is missing and nobody says so"
            found["damage said" if damage else "nothing lost"] += 1
        except BaseException as error:
            error.add_note(f"case {name}, stays {stay}: {[b[:2000] for b in bad]!r}")
            raise
    return found


async def test_a_host_that_says_anything(tmp_path: Path) -> None:
    found = await fuzz_link(tmp_path, 60)
    assert found["damage said"] > 10


async def test_a_host_that_never_makes_sense_is_not_dialled_in_a_loop(tmp_path: Path) -> None:
    host = Hostile(Random(1), [b"nonsense\n"] * 1000, stay=False)
    damage: list[int] = []

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(str(tmp_path / "h"))

    async def is_gone() -> str | None:
        return None

    async with hostile(tmp_path / "h", host):
        link = Link(dial, 1, print, lambda n, size: damage.append(n), is_gone, print)
        link.open()
        with pytest.raises(SandboxUnreachable, match="no answer to 'status'"):
            await link.request("status", timeout=1.5)
        await link.close()
    assert 2 <= host.dials <= 8 and sum(damage) >= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_thousand_damaged_journals(tmp_path: Path) -> None:
    left = await fuzz_left_behind(tmp_path, 1000)
    report("journals left behind", {"cases": left.total(), **left, "failures": 0})
    said = await fuzz_link(tmp_path, 1000)
    report("hosts that say anything", {"cases": said.total(), **said, "failures": 0})
