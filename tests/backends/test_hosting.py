"""What all backends bring to a machine: the bundle, the host's configuration, the bridge, what is kept."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tarfile
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from seer_mcp.backends import Place, hosting
from seer_mcp.backends.hosting import There
from seer_mcp.environment import SandboxSpec
from seer_mcp.errors import BadInput
from seer_mcp.kernel import Event, Link

from ..support import config_for

pytestmark = pytest.mark.anyio
SECRET = "of-a-secret-77c1"
PACKAGE = Path(hosting.__file__).parent.parent


# -- the bundle -----------------------------------------------------------------------------------


def two_packs(folder: Path) -> dict[str, Path]:
    (folder / "single.py").write_text("ANSWER = 42\n")
    whole = folder / "whole"
    (whole / "inner" / "__pycache__").mkdir(parents=True)
    (whole / "__init__.py").write_text("from .inner import WORD\n")
    (whole / "inner" / "__init__.py").write_text("WORD = 'deep'\n")
    (whole / "inner" / "__pycache__" / "x.pyc").write_bytes(b"stale")
    return {"single": folder / "single.py", "whole": whole}


def test_a_bundle_names_what_a_machine_needs(tmp_path: Path) -> None:
    assert "kernel_host/host.py" in (code := hosting.code_files())
    assert all(path.suffix == ".py" for path in code.values())
    assert sorted(hosting.pack_files(two_packs(tmp_path))) == [
        "packs/single.py",
        "packs/whole/__init__.py",
        "packs/whole/inner/__init__.py",
    ]


def test_a_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    packs = two_packs(tmp_path)
    before = hosting.digest(hosting.pack_files(packs))
    os.utime(packs["single"], (1, 1))
    assert hosting.digest(hosting.pack_files(packs)) == before
    packs["single"].write_text("ANSWER = 43\n")
    changed = hosting.digest(hosting.pack_files(packs))
    (tmp_path / "whole" / "more.txt").write_text("")
    assert len({before, changed, hosting.digest(hosting.pack_files(packs))}) == 3


def test_what_is_packed_is_its_owners_alone(tmp_path: Path) -> None:
    files = hosting.pack_files(two_packs(tmp_path))
    (tmp_path / "single.py").chmod(0o666)
    with tarfile.open(fileobj=io.BytesIO(hosting.packed(files))) as tar:
        assert {info.name: info.mode for info in tar} == dict.fromkeys(files, 0o600)
        assert (deep := tar.extractfile("packs/whole/inner/__init__.py")) is not None
        assert deep.read() == b"WORD = 'deep'\n"


def test_a_wish_that_cannot_be_met_is_refused() -> None:
    reasons = {"gpu": "it has none", "env": "not here"}
    hosting.refuse(SandboxSpec(memory=100), "local", reasons)
    with pytest.raises(BadInput, match=r"gpu = 'A100': it has none \(backend local\)"):
        hosting.refuse(SandboxSpec(gpu="A100"), "local", reasons)
    with pytest.raises(BadInput, match="env"):
        hosting.refuse(SandboxSpec(env={"A": "b"}), "local", reasons)


# -- a host from a bundle -------------------------------------------------------------------------


class Machine:
    """A folder that has only what a backend brings, and a host started from it."""

    def __init__(self, folder: Path, runtime: Path) -> None:
        self.folder = folder
        self.events: list[Event] = []
        root = folder / "root"
        files = hosting.code_files() | hosting.pack_files(two_packs(folder))
        with tarfile.open(fileobj=io.BytesIO(hosting.packed(files))) as tar:
            tar.extractall(root, filter="data")
        self.directory = root / "box"
        for path in (self.directory, folder / "work"):
            path.mkdir()
        self.there = There(
            str(self.directory), str(runtime), str(folder / "work"), str(root / "packs")
        )
        self.root = root

    @asynccontextmanager
    async def host(self, **more: Any) -> AsyncIterator[Link]:
        spec = SandboxSpec(
            env={"PLAIN": "value"}, secrets=("TOKEN",), lifetime=more.pop("lifetime", None)
        )
        place = Place(
            "h-1",
            Path("/unused"),
            Path("/unused"),
            Path("/unused"),
            (),
            {},
            "me",
            {"TOKEN": SECRET},
        )
        config = hosting.host_config(config_for(self.folder), spec, place, self.there, **more)
        Path(self.there.config).write_text(json.dumps(config))
        with open(self.there.log, "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-B",
                "-m",
                "kernel_host",
                self.there.config,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    "PATH": os.environ["PATH"],
                    "HOME": str(self.folder),
                    "OF_THE_MACHINE": "yes",
                    "TOKEN": SECRET,
                    "PYTHONPATH": str(self.root),
                },
            )

        async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            while True:
                try:
                    return await asyncio.open_unix_connection(self.there.socket, limit=1 << 28)
                except OSError:
                    await asyncio.sleep(0.02)

        async def is_gone() -> str | None:
            return None

        link = Link(dial, 1, self.events.append, lambda *_: None, is_gone, lambda _: None)
        link.open()
        try:
            await until(lambda: any(e.get("state") == "ready" for e in self.events))
            yield link
        finally:
            await link.close()
            if self.process.returncode is None:
                self.process.terminate()
            await asyncio.wait_for(self.process.wait(), 20)

    async def run(self, link: Link, source: str) -> str:
        await link.request("run", runs=[{"run": "r1", "code": source}])
        await until(lambda: any(e["type"] == "end" for e in self.events))
        return "".join(e["text"] for e in self.events if e["type"] == "stream")


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    runtime = Path(tempfile.mkdtemp(prefix="seer-h-"))
    try:
        yield Machine(tmp_path, runtime)
    finally:
        shutil.rmtree(runtime, ignore_errors=True)


LOOK = """
import os, sys, json, single, whole
print(json.dumps([dict(os.environ), single.ANSWER, whole.WORD]))
"""


async def test_a_kernel_has_the_machines_environment_the_specs_and_the_secrets(
    machine: Machine,
) -> None:
    async with machine.host(keep=str(machine.folder / "kept")) as link:
        env, answer, word = json.loads(await machine.run(link, LOOK))
        status = await link.request("status")
    assert (answer, word) == (42, "deep")
    assert (env["OF_THE_MACHINE"], env["PLAIN"], env["TOKEN"]) == ("yes", "value", SECRET)
    assert env[hosting.MARK] == "h-1" and env["PATH"].split(":")[0] == os.path.dirname(
        sys.executable
    )
    written = [p for p in machine.folder.rglob("*") if p.is_file() and p.name != "journal.jsonl"]
    assert len(written) > 10 and not [p for p in written if SECRET.encode() in p.read_bytes()]
    assert SECRET not in json.dumps(status)


async def stop(machine: Machine, link: Link) -> None:
    await link.request("stop")


async def signal_it(machine: Machine, link: Link) -> None:
    machine.process.send_signal(signal.SIGTERM)


async def end_its_lifetime(machine: Machine, link: Link) -> None:
    await link.request("extend", lifetime=0.1)


async def leave_it_idle(machine: Machine, link: Link) -> None:
    await link.request("extend", idle_limit=0.1)


ENDINGS = [stop, signal_it, end_its_lifetime, leave_it_idle]


@pytest.mark.parametrize("end", ENDINGS, ids=lambda e: e.__name__)
async def test_the_journal_is_kept_whatever_ends_the_host(
    machine: Machine, end: Callable[[Machine, Link], Awaitable[None]]
) -> None:
    kept = machine.folder / "volume" / "h-1"
    async with machine.host(keep=str(kept)) as link:
        await machine.run(link, "print('to be kept')")
        await end(machine, link)
        await asyncio.wait_for(machine.process.wait(), 20)
    journal = (kept / "journal.jsonl").read_bytes()
    assert journal == Path(machine.there.journal).read_bytes()
    lines = [json.loads(line) for line in journal.splitlines()]
    assert lines[-1]["type"] == "closing" and "to be kept\n" in [e.get("text") for e in lines]
    assert sorted(p.name for p in kept.iterdir()) == ["host.log", "journal.jsonl"]
    assert stat.S_IMODE((kept / "journal.jsonl").stat().st_mode) == 0o600


async def test_a_journal_that_cannot_be_kept_is_said_in_the_log_and_hinders_no_end(
    machine: Machine,
) -> None:
    (machine.folder / "file").write_text("")
    async with machine.host(keep=str(machine.folder / "file" / "below")) as link:
        await link.request("stop")
        assert await asyncio.wait_for(machine.process.wait(), 20) == 0
    log = Path(machine.there.log).read_text()
    assert "journal.jsonl could not be kept in" in log and "may not be safe there" in log


async def test_what_is_kept_is_synced_after_it_is_there(machine: Machine) -> None:
    kept, seen = machine.folder / "kept", machine.folder / "seen"
    programs = machine.folder / "programs"
    programs.mkdir()
    sync = programs / "sync"
    sync.write_text(f'#!/bin/sh\n(echo "$@"; ls "$1") > {seen}\n')
    sync.chmod(0o755)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{programs}:{path}"
    try:
        async with machine.host(keep=str(kept)) as link:
            await link.request("stop")
            await asyncio.wait_for(machine.process.wait(), 20)
    finally:
        os.environ["PATH"] = path
    assert seen.read_text().split() == [str(kept), "host.log", "journal.jsonl"]


async def test_no_extension_goes_beyond_the_end_of_the_machine(machine: Machine) -> None:
    async with machine.host(hard_end_at=9e9, lifetime=50) as link:
        first = await link.request("status")
        assert first["hard_end_at"] == 9e9 and first["end_at"] < first["now"] + 51
        assert (await link.request("extend", end_at=9e10))["end_at"] == 9e9
        assert (await link.request("extend", lifetime=70))["end_at"] < first["now"] + 80


# -- the bridge -----------------------------------------------------------------------------------

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def bridge(
    folder: Path, serve: Serve, silence: float = 30.0, **streams: Any
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A bridge to a host that does what `serve` says."""
    writers: list[asyncio.StreamWriter] = []

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass

    address = os.path.relpath(folder / "s")  # a whole path may be too long for a socket
    server = await asyncio.start_unix_server(client, address, limit=1 << 20)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kernel_host.attach",
        address,
        str(silence),
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        limit=1 << 20,
        **{"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, **streams},
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        server.close()
        for writer in writers:
            writer.close()
        await asyncio.sleep(0)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()


async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"x" * (1 << 16))
        await writer.drain()


async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(60)


async def short(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"last words\n" * 10_000)
    await writer.drain()
    writer.close()


async def ends(process: asyncio.subprocess.Process) -> int:
    return await asyncio.wait_for(process.wait(), 20)


async def test_a_bridge_ends_when_its_client_closes(tmp_path: Path) -> None:
    async with bridge(tmp_path, echo) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"there\n")
        assert await process.stdout.readline() == b"there\n"
        process.stdin.close()
        assert await ends(process) == 0


async def test_a_bridge_ends_when_the_host_goes_and_loses_nothing_before(tmp_path: Path) -> None:
    async with bridge(tmp_path, short) as process:
        assert process.stdout
        assert await process.stdout.read() == b"last words\n" * 10_000
        assert await ends(process) == 0


async def test_a_bridge_ends_after_silence_though_the_host_speaks(tmp_path: Path) -> None:
    async with bridge(tmp_path, flood, 0.5) as process:
        assert process.stdout
        async with asyncio.timeout(20):
            while await process.stdout.read(1 << 20):  # to its end
                pass
        assert await ends(process) == 0


async def test_a_bridge_whose_reader_is_stuck_ends_after_silence(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        async with bridge(tmp_path, flood, 0.5, stdout=writing) as process:
            assert await ends(process) == 0
    finally:
        os.close(reading)
        os.close(writing)


async def test_a_bridge_to_a_host_that_takes_nothing_ends_after_silence(tmp_path: Path) -> None:
    async with bridge(tmp_path, deaf, 0.5) as process:
        assert process.stdin
        process.stdin.write(b"x" * 8_000_000)
        assert await ends(process) == 0


async def test_a_bridge_says_that_there_is_no_host(tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kernel_host.attach",
        str(tmp_path / "nowhere"),
        env={**os.environ, "PYTHONPATH": str(PACKAGE)},
        stdin=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 3 and b"no kernel host at" in said


def blob() -> bytes:
    return os.urandom(1 << 20) * 20


async def test_much_goes_both_ways_at_once(tmp_path: Path) -> None:
    async with bridge(tmp_path, echo) as process:
        assert process.stdin and process.stdout
        data = blob()
        process.stdin.write(data)
        back = await asyncio.wait_for(process.stdout.readexactly(len(data)), 30)
        assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()


async def test_one_socket_may_be_stdin_and_stdout(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    async with bridge(tmp_path, echo, stdin=theirs, stdout=theirs):
        theirs.close()
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 20)
        data = blob()
        writer.write(data)
        await asyncio.sleep(0.5)  # it fills up: the bridge finds no room to write
        back = await asyncio.wait_for(reader.readexactly(len(data)), 30)
        assert hashlib.sha256(back).digest() == hashlib.sha256(data).digest()
        writer.close()
