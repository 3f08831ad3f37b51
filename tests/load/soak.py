"""Soak: runs in many sandboxes at once, one fault after the other, and a count of every line.

uv run python -m tests.load.soak --minutes 30 --runs 5000 --seed 1 --out soak.json

Faults: the kernel is killed, exits, is restarted, interrupted in an endless cell, asks a question,
floods, puts out a long line or a large display; the sandbox is stopped in mid-cell and its notebook
opened in a new one; the server is killed and replaced, or frozen for a while; the line between
server and kernel host is cut; a client is killed or cancels in mid-call.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil

from ..faults.ground import Ground, ground
from ..support import processes_of
from .serving import Broken, Caller, ServerProcess, memory_of, meta, request, texts
from .work import BODIES, ENDLESS, Planned, Verdict, cells_by_run, notebook_at, verdict

UNFINISHED = ("queued", "running")
OF_CELLS = [kind for kind in BODIES if kind not in ("plain", "long")]
OF_SURROUNDINGS = ["kernel killed", "server killed", "server stopped", "line cut"]
FAULTS = [*OF_CELLS, *OF_SURROUNDINGS]
QUIET_SHARE = 0.4  # of the whole time, at its end: the server is not killed, its memory is watched
QUIET_FROM = 150.0  # seconds of a soak that is long enough for that
SETTLE_SECONDS = 60.0  # after the last run was sent


class Relay:
    """Stands between the server and a kernel host, so that their line can be cut."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._behind = path.with_name("behind")
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        self._path.rename(self._behind)
        self._server = await asyncio.start_unix_server(self._serve, str(self._path))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            host_reader, host_writer = await asyncio.open_unix_connection(str(self._behind))
        except OSError:
            writer.close()
            return
        both = {writer, host_writer}
        self._writers |= both

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
            with contextlib.suppress(ConnectionError):
                while data := await source.read(65536):
                    sink.write(data)
                    await sink.drain()
            for one in both:
                one.close()

        await asyncio.gather(pump(reader, host_writer), pump(host_reader, writer))
        self._writers -= both

    @property
    def connections(self) -> int:
        return len(self._writers) // 2

    def cut(self) -> int:
        """Break every connection; how many there were."""
        cut = self.connections
        for writer in self._writers:
            writer.transport.abort()
        return cut

    async def close(self) -> None:
        if self._server is not None:
            self.cut()
            self._server.close()


@dataclass
class Sample:
    seconds: float
    generation: int
    rss: int
    descriptors: int
    threads: int
    notebooks: int
    """Bytes of all notebooks, which the server holds in its memory as well."""


@dataclass
class Report:
    """What a soak found."""

    seed: int
    minutes: float
    runs: int = 0
    lines: int = 0
    lost: int = 0
    twice: int = 0
    states: Counter[str] = field(default_factory=Counter[str])
    faults: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])
    found_again: list[float] = field(default_factory=list[float])
    """Seconds from the start of a new server until it listed every sandbox."""
    stretch: dict[str, Any] = field(default_factory=dict[str, Any])
    left_over: list[str] = field(default_factory=list[str])

    def as_json(self) -> dict[str, Any]:
        return {**self.__dict__, "load": os.getloadavg()[0]}


class Worker:
    """One client with one sandbox: run after run, and the faults that need a cell of their own."""

    def __init__(self, soak: Soak, name: str) -> None:
        self.soak = soak
        self.name = name
        self.handle = ""
        self.notebook = Path()
        self.orders: deque[str] = deque()
        self.current: Planned | None = None
        self.recent: dict[str, float] = {}

    def hit(self, by: str, seconds: float = 3.0) -> None:
        """A fault falls on the run that is on its way, and on one that is sent soon."""
        self.recent[by] = time.monotonic() + seconds
        if self.current is not None:
            self.current.hits.add(by)

    async def work(self) -> None:
        soak = self.soak
        await self.started(name=self.name)
        await soak.all_started.wait()
        while not soak.over or self.orders:
            began = time.monotonic()
            await self.one(self.orders.popleft() if self.orders else "plain")
            pause = soak.pace - (time.monotonic() - began)
            while pause > 0 and not self.orders and not soak.over:
                await asyncio.sleep(min(pause, 0.2))
                pause -= 0.2

    async def started(self, **arguments: str) -> None:
        """A new sandbox, or the one that was started by a call whose answer was lost."""
        soak = self.soak
        for _ in range(20):
            await soak.up.wait()
            try:
                result = await soak.caller.call("start_sandbox", **arguments)
                made = meta(result, "sandbox")
            except Broken:
                listed = meta(await soak.steady("list_sandboxes"), "sandboxes")
                mine = [s for s in listed if s["notebook"] == arguments.get("notebook")]
                made = next((s for s in mine if s["ended"] is None), None)
                result = {"content": []}
            if made is not None:
                self.handle, self.notebook = made["handle"], Path(made["notebook"])
                return
            assert not result.get("isError"), texts(result)
        raise AssertionError(f"{self.name} could not be started")

    async def one(self, kind: str) -> None:
        soak = self.soak
        number = soak.next_number()
        long = kind in ("long", "cancel", "client killed")
        run = Planned(
            number,
            self.name,
            kind,
            soak.truth / str(number),
            lines=100 if long else soak.chance.randrange(1, 30),
            pause=0.03 if long else soak.chance.choice((0.0, 0.002, 0.03)),
        )
        now = time.monotonic()
        run.hits |= {by for by, until in self.recent.items() if until > now}
        soak.planned[number] = run
        self.current = run
        try:
            await self.carried_out(run)
        finally:
            self.current = None
        soak.done += 1
        if kind in FAULTS:
            soak.report.faults[kind] += 1

    async def carried_out(self, run: Planned) -> None:
        """Send the run, do what its kind asks for, and wait until it is over."""
        cell = await self.sent(run)
        if cell is None:
            return
        if run.kind in ENDLESS:
            await self.begun(run)
            await asyncio.sleep(0.3)
        if run.kind in ("interrupt", "endless"):
            await self.interrupted(cell)
        elif run.kind == "restart":
            await self.restarted()
        elif run.kind == "stop":
            await self.stopped()
        state = await self.over(cell)
        if state in ("kernel_died", "sandbox_lost"):
            await self.restarted()

    async def sent(self, run: Planned) -> str | None:
        """Write and run the cell; its id, also if the answer never came. None: it was not taken."""
        soak = self.soak
        await soak.up.wait()
        waits = 0 if run.kind in ENDLESS else 20
        arguments = {"sandbox": self.handle, "source": run.source, "wait": waits}
        try:
            if run.kind == "cancel":
                return await self.cancelled(run, arguments)
            if run.kind == "client killed":
                return await self.killed_client(run, arguments)
            result = await soak.caller.call("create_cell", **arguments)
        except Broken:
            run.hits.add("server killed")
            await soak.up.wait()
            return await self.cell_of(run, 1.0)
        if found := meta(result, "run"):
            return found["cell"]
        text = "\n".join(texts(result))
        if "restart_kernel" in text:
            run.hits.add("refused")
            await self.restarted()
            return None
        # The call came while a fault was on: the cell may be there all the same.
        run.hits.add("refused")
        soak.strange(run, f"create_cell said: {text[:300]}")
        return await self.cell_of(run, 1.0)

    async def cancelled(self, run: Planned, arguments: dict[str, Any]) -> str | None:
        call = asyncio.create_task(self.soak.caller.call("create_cell", **arguments))
        await self.begun(run)
        call.cancel()
        outcome = (await asyncio.gather(call, return_exceptions=True))[0]
        if isinstance(outcome, Broken):
            raise outcome
        run.hits.add("cancelled")
        return await self.cell_of(run, 5.0)

    async def killed_client(self, run: Planned, arguments: dict[str, Any]) -> str | None:
        body, headers = request(1, "create_cell", arguments)
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", str(Path(__file__).with_name("one_call.py"))),
            str(self.soak.server.port),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert client.stdin is not None
        client.stdin.write(json.dumps({"body": body, "headers": headers}).encode())
        client.stdin.close()
        await self.begun(run)
        if client.returncode is None:
            client.kill()
        await client.wait()
        run.hits.add("cancelled")
        await self.soak.up.wait()
        return await self.cell_of(run, 5.0)

    async def begun(self, run: Planned) -> None:
        """Wait until the cell runs, or a fault has plainly prevented it."""
        end = time.monotonic() + 8
        while not run.truth.exists() and time.monotonic() < end:
            await asyncio.sleep(0.02)

    async def cell_of(self, run: Planned, seconds: float) -> str | None:
        """The id of a run's cell, from the file: what a client does that lost its answer."""
        end = time.monotonic() + seconds
        while True:
            found = cells_by_run(notebook_at(self.notebook)).get(run.number)
            if found or time.monotonic() > end:
                return found[0]["id"] if found else None
            await asyncio.sleep(0.1)

    async def interrupted(self, cell: str) -> None:
        for _ in range(20):
            result = await self.soak.steady("interrupt", sandbox=self.handle)
            text = texts(result)[0]
            if "nothing was running" not in text and "did not stop" not in text:
                return
            if await self.over(cell, 0) not in UNFINISHED:
                return
        self.soak.problem(f"{self.name}: cell {cell} could not be interrupted: {text}")

    async def restarted(self) -> None:
        self.hit("restarted", 0.0)
        for _ in range(20):
            result = await self.soak.steady("restart_kernel", sandbox=self.handle)
            if not result.get("isError"):
                return
            await asyncio.sleep(0.5)
        self.soak.problem(f"{self.name}: restart_kernel: {texts(result)[0][:300]}")

    async def stopped(self) -> None:
        """End the sandbox and open its notebook in a new one."""
        relay = self.soak.relays.pop(self.handle)
        result = await self.soak.steady("stop_sandbox", sandbox=self.handle)
        if result.get("isError") and "has ended already" not in texts(result)[0]:
            self.soak.problem(f"{self.name}: stop_sandbox: {texts(result)[0][:300]}")
        await relay.close()
        await self.started(notebook=str(self.notebook))
        await self.soak.place_relay(self.handle)

    async def over(self, cell: str, wait: float = 20) -> str:
        """Wait for the end of a cell's run; its state."""
        end = time.monotonic() + 90
        while True:
            result = await self.soak.steady(
                "read_outputs", sandbox=self.handle, cell=cell, wait=wait
            )
            found = meta(result, "run")
            state = found["state"] if found else ""
            if (state and state not in UNFINISHED) or not wait:
                return state
            if time.monotonic() > end:
                self.soak.problem(f"{self.name}: cell {cell} is {state!r} after 90 s")
                return state
            await asyncio.sleep(0.1)


class Soak:
    def __init__(
        self,
        place: Ground,
        *,
        minutes: float,
        runs: int,
        seed: int,
        sandboxes: int = 10,
        fault_every: float = 10.0,
        tell: Any = lambda text: None,
    ) -> None:
        self.place = place
        self.seconds = minutes * 60
        self.runs = runs
        self.fault_every = fault_every
        self.chance = random.Random(seed)
        self.report = Report(seed, minutes)
        self.server = ServerProcess(place, "--idle-minutes", "600")
        self.caller = Caller(self.server.url)
        self.truth = place.folder / "truth"
        self.truth.mkdir()
        self.workers = [Worker(self, f"soak-{n}") for n in range(sandboxes)]
        self.pace = self.seconds * sandboxes / runs
        self.planned: dict[int, Planned] = {}
        self.done = 0
        self.all_kinds = False
        self.up = asyncio.Event()
        self.all_started = asyncio.Event()
        self.began = 0.0
        self.samples: list[Sample] = []
        self.relays: dict[str, Relay] = {}
        self._tell = tell

    @property
    def over(self) -> bool:
        """Time, runs and kinds of faults are through, or the time for stragglers as well."""
        if not self.began:
            return False
        gone = time.monotonic() - self.began
        through = self.done >= self.runs and self.all_kinds
        return gone > self.seconds and (through or gone > self.seconds + SETTLE_SECONDS)

    @property
    def quiet(self) -> bool:
        """The part of a long soak in which the server is left alive, to see what it takes."""
        share = (time.monotonic() - self.began) / self.seconds
        return self.seconds >= QUIET_FROM and share > 1 - QUIET_SHARE

    def next_number(self) -> int:
        return len(self.planned) + 1

    def problem(self, text: str) -> None:
        self.report.problems.append(text)
        self._tell(f"PROBLEM {text}")

    def strange(self, run: Planned, text: str) -> None:
        """Worth a look, and judged at the end by what is in the notebook."""
        self._tell(f"run {run.number} ({run.kind}) of {run.sandbox}, {sorted(run.hits)}: {text}")

    async def steady(self, tool: str, /, **arguments: Any) -> dict[str, Any]:
        """A call that may be repeated: it is, when the server goes away meanwhile."""
        for _ in range(50):
            await self.up.wait()
            try:
                return await self.caller.call(tool, **arguments)
            except Broken:
                await asyncio.sleep(0.1)
        raise AssertionError(f"{tool} had no answer in 50 attempts")

    # -- the whole ----------------------------------------------------------------------------

    async def run(self) -> Report:
        await self.server.start()
        self.up.set()
        work = [asyncio.create_task(worker.work()) for worker in self.workers]
        side: list[asyncio.Task[None]] = []
        try:
            while not all(worker.handle for worker in self.workers):
                await self.still(work)
            await self.place_relays()
            await self.replaced()
            self.began = time.monotonic()
            self.all_started.set()
            sampler = asyncio.create_task(self.sample())
            side = [asyncio.create_task(self.inject()), sampler]
            while not all(task.done() for task in work):
                await self.still([*work, *side])
            self.report.runs = self.done
            await asyncio.sleep(2)
            sampler.cancel()  # what the judgement needs is not the server's use
            self.take_sample()
            await self.judge()
            await self.end()
        finally:
            for task in (*work, *side):
                task.cancel()
            await asyncio.gather(*work, *side, return_exceptions=True)
            for relay in self.relays.values():
                await relay.close()
            await self.caller.close()
            self.server.end()
        self.measure()
        return self.report

    async def still(self, tasks: list[asyncio.Task[None]]) -> None:
        """A moment; raises what failed meanwhile."""
        await asyncio.sleep(0.1)
        for task in tasks:
            if task.done():
                task.result()

    async def place_relays(self) -> None:
        for worker in self.workers:
            await self.place_relay(worker.handle)

    async def place_relay(self, handle: str) -> None:
        """From the next dial on, the line to that kernel host goes through us."""
        folder = self.place.folder / "state" / "sandboxes" / handle
        record = json.loads((folder / "record.json").read_text())
        relay = self.relays[handle] = Relay(Path(record["sandbox"]["socket"]))
        await relay.open()

    async def replaced(self) -> None:
        """The server is killed; the next one must list every sandbox."""
        self.up.clear()
        for worker in self.workers:
            worker.hit("server killed", 1.0)
        self.server.kill()
        began = time.monotonic()
        await self.server.start()
        result = await self.caller.call("list_sandboxes")
        listed = {s["handle"] for s in meta(result, "sandboxes") if s["ended"] is None}
        self.report.found_again.append(time.monotonic() - began)
        if lacking := {w.handle for w in self.workers} - listed:
            self.problem(f"not found again: {sorted(lacking)}: {texts(result)[0][:500]}")
        self.up.set()

    # -- faults -------------------------------------------------------------------------------

    async def inject(self) -> None:
        """All kinds in random order, again and again; each at least once."""
        bag = self.chance.sample(FAULTS, len(FAULTS))
        first = True
        while first or time.monotonic() - self.began < self.seconds:
            await asyncio.sleep(self.fault_every)
            kind = next((k for k in bag if not (self.quiet and k == "server killed")), None)
            if kind is None:
                self.all_kinds, first = True, False
                bag = self.chance.sample(FAULTS, len(FAULTS))
                continue
            bag.remove(kind)
            worker = self.chance.choice(self.workers)
            if kind in OF_CELLS:
                worker.orders.append(kind)
                continue
            done = True
            if kind == "kernel killed":
                done = await self.kill_kernel(worker)
            elif kind == "server killed":
                await self.in_the_middle(worker)
                await self.replaced()
            elif kind == "server stopped":
                os.kill(self.server.pid, signal.SIGSTOP)
                await asyncio.sleep(min(3.0, self.fault_every))
                os.kill(self.server.pid, signal.SIGCONT)
            else:
                done = self.cut_a_line()
            self.report.faults[kind] += done
            if not done:
                bag.append(kind)  # there was nothing to break just now

    def cut_a_line(self) -> bool:
        """The line of one sandbox that has one through us; whether there was one."""
        open_ones = [relay for relay in self.relays.values() if relay.connections]
        return bool(open_ones) and self.chance.choice(open_ones).cut() > 0

    async def in_the_middle(self, worker: Worker) -> None:
        """Wait until a cell of the worker has printed for so long that a part of it is saved."""
        worker.orders.appendleft("long")
        end = time.monotonic() + 15
        while time.monotonic() < end:
            run = worker.current
            if run and run.kind == "long" and len(run.said()) > 40:
                return
            await asyncio.sleep(0.02)

    async def kill_kernel(self, worker: Worker) -> bool:
        """SIGKILL; whether there was a kernel."""
        await self.in_the_middle(worker)
        for process in processes_of(worker.handle):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(part.endswith("launch.py") for part in process.cmdline()):
                    worker.hit("kernel killed")
                    process.kill()
                    return True
        return False

    # -- what the server takes ----------------------------------------------------------------

    async def sample(self) -> None:
        while True:
            if self.up.is_set():
                self.take_sample()
            await asyncio.sleep(min(2.0, self.seconds / 60))

    def take_sample(self) -> None:
        process = psutil.Process(self.server.pid)
        with contextlib.suppress(psutil.NoSuchProcess):
            self.samples.append(
                Sample(
                    time.monotonic() - self.began,
                    self.server.generation,
                    process.memory_info().rss,
                    process.num_fds(),
                    process.num_threads(),
                    sum(w.notebook.stat().st_size for w in self.workers if w.notebook.is_file()),
                )
            )

    def measure(self) -> None:
        """Memory, descriptors and threads of the server that lived longest, warm against its end."""
        by_server: dict[int, list[Sample]] = {}
        for sample in self.samples:
            by_server.setdefault(sample.generation, []).append(sample)
        longest = max(by_server.values(), key=lambda s: s[-1].seconds - s[0].seconds)
        first, last = longest[0].seconds, longest[-1].seconds
        whole = last - first

        def middle(name: str, begin: float, end: float) -> float:
            within = [
                getattr(s, name)
                for s in longest
                if first + begin * whole <= s.seconds <= first + end * whole
            ]
            return statistics.median(within)

        found: dict[str, Any] = {"seconds": whole, "samples": len(longest)}
        for name in ("rss", "descriptors", "threads", "notebooks"):
            found[name] = {
                "warm": middle(name, 0.2, 0.3),
                "end": middle(name, 0.9, 1.0),
                "most": max(getattr(s, name) for s in longest),
            }
        found["growth"] = found["rss"]["end"] / found["rss"]["warm"] - 1
        self.report.stretch = found

    # -- the judgement ------------------------------------------------------------------------

    async def judge(self) -> None:
        """Every run against its truth: the file of the notebook, and what read_outputs gives."""
        for worker in self.workers:
            nbformat.validate(nbformat.read(worker.notebook, as_version=4))
            cells = cells_by_run(notebook_at(worker.notebook))
            for run in (r for r in self.planned.values() if r.sandbox == worker.name):
                found = cells.get(run.number, [])
                read = await self.exact(worker, found[0]["id"]) if found else None
                self.count(run, verdict(run, worker.notebook, found, read), found)

    def count(self, run: Planned, found: Verdict, cells: list[dict[str, Any]]) -> None:
        self.report.lines += found.printed
        self.report.lost += found.lost
        self.report.twice += run.said().count("begin") > 1
        state = cells[0]["metadata"].get("seer", {}).get("state") if cells else "never arrived"
        self.report.states[str(state)] += 1
        for text in found.problems:
            hits = ", ".join(sorted(run.hits)) or "nothing else"
            self.problem(f"run {run.number} ({run.kind}; {hits}) of {run.sandbox}: {text}")

    async def exact(self, worker: Worker, cell: str) -> str:
        """All pages of the exact text of a cell's output."""
        parts: list[str] = []
        cursor: str | None = "0:0"
        while cursor is not None:
            result = await self.steady(
                "read_outputs", sandbox=worker.handle, cell=cell, cursor=cursor
            )
            page = meta(result, "page")
            if page is None:
                self.problem(f"{worker.name}: cell {cell}: {texts(result)[0][:300]}")
                break
            parts.extend(block["text"] for block in result["content"] if "_meta" in block)
            cursor = page["next"]
        return "".join(parts)

    async def end(self) -> None:
        """Stop everything; nothing may be left."""
        hosts = memory_of(self.place.processes())
        self.report.stretch["sandboxes"] = hosts.__dict__
        for worker in self.workers:
            result = await self.steady("stop_sandbox", sandbox=worker.handle)
            if result.get("isError"):
                self.problem(f"stop_sandbox: {texts(result)[0][:300]}")
        if (code := self.server.end()) != 0:
            self.problem(f"the server ended with {code}")
        await asyncio.sleep(0.5)
        self.report.left_over = [
            *(f"process {p.pid} {' '.join(p.cmdline())[:200]}" for p in self.place.processes()),
            *(str(path) for path in self.place.sockets.rglob("*") if not path.is_dir()),
        ]


def table(report: Report) -> str:
    stretch = report.stretch
    lines = [
        f"{report.runs} runs in {report.minutes:g} minutes, seed {report.seed}; "
        f"{sum(report.faults.values())} faults",
        f"lines printed {report.lines:,}, lost {report.lost}; run twice {report.twice}",
        "states: " + ", ".join(f"{n} {s}" for s, n in report.states.most_common()),
        "faults: " + ", ".join(f"{n} {s}" for s, n in report.faults.most_common()),
        f"sandboxes found again within {max(report.found_again):.1f} s "
        f"({len(report.found_again)} new servers)",
        f"longest life of a server {stretch['seconds']:.0f} s: memory {mib(stretch['rss'])} "
        f"({stretch['growth']:+.1%}), of notebooks {mib(stretch['notebooks'])}",
        f"descriptors {stretch['descriptors']['warm']:.0f} -> {stretch['descriptors']['end']:.0f}, "
        f"threads {stretch['threads']['warm']:.0f} -> {stretch['threads']['end']:.0f}",
        f"left over: {len(report.left_over)}; problems: {len(report.problems)}",
    ]
    return "\n".join([*lines, *report.left_over, *report.problems[:40]])


def section(report: Report) -> str:
    """The figures as a table of the docs."""
    stretch = report.stretch
    counted = [
        ("runs, faults", f"{report.runs:,}, {sum(report.faults.values())}"),
        ("lines printed", f"{report.lines:,}"),
        ("lines lost", f"{report.lost}"),
        ("cells that ran twice", f"{report.twice}"),
        ("states that are not true, and other problems", f"{len(report.problems)}"),
        (
            f"ten sandboxes found again by {len(report.found_again)} new servers, the slowest",
            f"{max(report.found_again):.1f} s",
        ),
        (
            f"memory of the server over {stretch['seconds'] / 60:.0f} minutes",
            f"{mib(stretch['rss'])} ({stretch['growth']:+.1%}); the notebooks that it holds: "
            f"{mib(stretch['notebooks'])}",
        ),
        ("its descriptors", arrow(stretch["descriptors"])),
        ("its threads", arrow(stretch["threads"])),
        ("processes and sockets left at the end", f"{len(report.left_over)}"),
    ]
    lines = ["| | found |", "| --- | --- |", *(f"| {what} | {n} |" for what, n in counted)]
    faults = ", ".join(f"{n} {what}" for what, n in report.faults.most_common())
    return "\n".join(
        [*lines, "", f"{report.minutes:g} minutes, seed {report.seed}. Faults: {faults}."]
    )


def arrow(figure: dict[str, float]) -> str:
    return f"{figure['warm']:.0f} -> {figure['end']:.0f}"


def mib(figure: dict[str, float]) -> str:
    return f"{figure['warm'] / 2**20:.1f} -> {figure['end'] / 2**20:.1f} MiB"


async def soak(folder: Path, **options: Any) -> Report:
    """One soak in a folder of its own."""
    with ground(folder) as place:
        return await Soak(place, **options).run()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--runs", type=int, help="default: 5,000 in 30 minutes, and in proportion")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sandboxes", type=int, default=10)
    parser.add_argument("--fault-every", type=float, default=10, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path("soak.json"))
    parser.add_argument("--page", type=Path, help="replace the figures in this page of the docs")
    parser.add_argument("--keep", action="store_true", help="do not delete the folder of the soak")
    flags = parser.parse_args()
    runs = flags.runs or max(20, round(flags.minutes * 5000 / 30))
    folder = Path(tempfile.mkdtemp(prefix="soak-")).resolve()
    try:
        report = asyncio.run(
            soak(
                folder,
                minutes=flags.minutes,
                runs=runs,
                seed=flags.seed,
                sandboxes=flags.sandboxes,
                fault_every=flags.fault_every,
                tell=lambda text: sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n"),
            )
        )
    finally:
        if flags.keep:
            sys.stderr.write(f"kept: {folder}\n")
        else:
            shutil.rmtree(folder, ignore_errors=True)
    flags.out.write_text(json.dumps(report.as_json(), indent=1) + "\n")
    sys.stdout.write(table(report) + "\n")
    if flags.page:
        from benchmarks.page import machine, replace_section

        replace_section(flags.page, "soak", f"{section(report)}\n\n{machine()}.")
    return 1 if report.lost or report.twice or report.problems or report.left_over else 0


if __name__ == "__main__":
    sys.exit(main())
