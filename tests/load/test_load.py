"""Many at once: kernels, clients, notebooks. Each gets its own output, and soon enough."""

from __future__ import annotations

import asyncio
import random
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..faults.ground import ERAS, Ground, ground
from ..faults.stub_kernel import stub_python
from ..support import Lab, read_cells, streams, text_of
from .serving import Caller, Memory, ServerProcess, memory_of, meta, percentile, texts

pytestmark = pytest.mark.anyio

GIB = 2**30


@pytest.fixture
def place(tmp_path: Path) -> Any:
    with ground(tmp_path) as made:
        yield made


@asynccontextmanager
async def served(place: Ground, *flags: str) -> AsyncIterator[ServerProcess]:
    """A server in a process of its own, so that what clients compute does not slow it down."""
    server = ServerProcess(place, *flags, on_exit="stop")
    await server.start()
    try:
        yield server
    finally:
        assert server.end() == 0
    assert place.processes() == []


# -- L01 --------------------------------------------------------------------------------------


async def many_kernels(place: Ground, count: int) -> tuple[float, float, Memory]:
    """Start `count` kernels at once and use all at once: seconds for each, and their memory."""
    async with served(place) as server:
        caller = Caller(server.url)

        async def start(n: int) -> tuple[str, Path]:
            result = await caller.call("start_sandbox", name=f"k{n}")
            assert not result.get("isError"), texts(result)
            found = meta(result, "sandbox")
            return found["handle"], Path(found["notebook"])

        async def use(n: int, handle: str) -> None:
            for step in range(3):
                source = f"me = globals().get('me', {n}) + {step}; print('own', me)"
                result = await caller.call("create_cell", sandbox=handle, source=source)
                assert texts(result)[-1].strip() == f"own {n + (step * (step + 1)) // 2}", result

        try:
            began = time.monotonic()
            made = await asyncio.gather(*(start(n) for n in range(count)))
            started = time.monotonic() - began
            began = time.monotonic()
            await asyncio.gather(*(use(n, handle) for n, (handle, _) in enumerate(made)))
            used = time.monotonic() - began
            memory = memory_of(place.processes())
        finally:
            await caller.close()
        for n, (_, path) in enumerate(made):
            kept = [streams(cell) for cell in read_cells(path)]
            assert kept == [f"own {n}\n", f"own {n + 1}\n", f"own {n + 3}\n"]
    text = f"{count} kernels started in {started:.1f} s, 3 cells in each in {used:.1f} s, "
    text += f"RSS {memory.rss / GIB:.2f} GiB, PSS {memory.pss / GIB:.2f} GiB"
    sys.stdout.write(f"L01: {text} of {memory.processes} processes\n")
    return started, used, memory


async def test_l01_six_kernels_at_once(place: Ground) -> None:
    _, _, memory = await many_kernels(place, 6)
    assert memory.processes == 12  # a host and a kernel each
    assert memory.rss < 6 / 50 * 7e9 * 1.2


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_l01_fifty_kernels_at_once(place: Ground) -> None:
    started, _, memory = await many_kernels(place, 50)
    assert started <= 60
    assert memory.rss <= 7e9


# -- L02 --------------------------------------------------------------------------------------

SAID = re.compile(r"client (\d+) call (\d+)")


@dataclass
class Crowd:
    """What many clients saw."""

    calls: int = 0
    errors: list[str] = field(default_factory=list[str])
    crossed: list[str] = field(default_factory=list[str])
    runs: list[float] = field(default_factory=list[float])
    status: list[float] = field(default_factory=list[float])


async def crowd_on_stubs(place: Ground, clients: int, seconds: float, think: float) -> Crowd:
    """Clients on stub kernels, four to a sandbox, each with cells of its own.

    `think`: seconds that a client waits between two calls, on average.
    """
    found = Crowd()
    async with (
        served(place, "--python", str(stub_python(place.folder))) as server,
        AsyncExitStack() as stack,
    ):
        labs = [await stack.enter_async_context(server.lab(ERAS[n % 2])) for n in range(clients)]
        names = [f"shared-{n}" for n in range(-(-clients // 4))]
        handles = await asyncio.gather(*(labs[0].start(name=name) for name in names))
        end = time.monotonic() + seconds
        await asyncio.gather(
            *(one_client(found, lab, n, handles[n // 4], end, think) for n, lab in enumerate(labs))
        )
        for number, handle in enumerate(handles):
            for cell in read_cells(await labs[0].notebook_path(handle)):
                asked, kept = "".join(cell["source"]), streams(cell)
                said = SAID.fullmatch(asked)
                if kept != f"{asked}\n" or said is None or int(said[1]) // 4 != number:
                    found.crossed.append(f"{handle}: {asked!r} has {kept!r}")
    sys.stdout.write(
        f"L02: {clients} clients, {found.calls} calls in {seconds:g} s, {len(found.errors)} errors, "
        f"{len(found.crossed)} crossed; status p50 {percentile(found.status, 0.5) * 1000:.0f} ms, "
        f"p99 {percentile(found.status, 0.99) * 1000:.0f} ms; cells p50 "
        f"{percentile(found.runs, 0.5) * 1000:.0f} ms, p99 "
        f"{percentile(found.runs, 0.99) * 1000:.0f} ms\n"
    )
    return found


async def one_client(
    found: Crowd, lab: Lab, who: int, handle: str, end: float, think: float
) -> None:
    chance = random.Random(who)
    await asyncio.sleep(chance.uniform(0, 2 * think))
    number = 0
    while time.monotonic() < end:
        number += 1
        source = f"client {who} call {number}"
        began = time.monotonic()
        result = await lab.cell(handle, source)
        found.runs.append(time.monotonic() - began)
        if result.is_error:
            found.errors.append(text_of(result))
            return
        if [m[0] for m in SAID.finditer(text_of(result))] != [source]:
            found.crossed.append(f"{source!r} was answered {text_of(result)!r}")
        await asyncio.sleep(chance.uniform(0, 2 * think))
        began = time.monotonic()
        if number % 2:
            status = await lab.call("list_sandboxes")
        else:
            cell = result.meta["seer/run"]["cell"]
            status = await lab.call("read_outputs", sandbox=handle, cell=cell, wait=0)
            if source not in text_of(status):
                found.crossed.append(f"{source!r} was read as {text_of(status)!r}")
        found.status.append(time.monotonic() - began)
        if status.is_error:
            found.errors.append(text_of(status))
        found.calls += 2
        await asyncio.sleep(chance.uniform(0, 2 * think))


async def test_l02_twenty_clients_on_stub_kernels(place: Ground) -> None:
    found = await crowd_on_stubs(place, 20, 4, think=0.3)
    assert found.errors == []
    assert found.crossed == []
    assert found.calls >= 40


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_l02_two_hundred_clients_for_five_minutes(place: Ground) -> None:
    found = await crowd_on_stubs(place, 200, 300, think=5)
    assert found.errors == []
    assert found.crossed == []
    assert found.calls >= 200 * 20
    assert percentile(found.status, 0.99) <= 1.0


# -- C04, C07 ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("pace", ["time.sleep(0.01)", "pass"], ids=["lively", "flooding"])
async def test_c04_other_calls_of_a_server_process_while_a_cell_runs(
    place: Ground, pace: str
) -> None:
    """The same row in the ordinary set has the server in the test's own process, and more time."""
    times: dict[str, list[float]] = {"tools/list": [], "read_outputs": []}
    async with served(place) as server, server.lab() as lab, server.lab("legacy") as other:
        handle = await lab.start()
        source = (
            f"import time\nend = time.time() + 8\nwhile time.time() < end: print('x' * 100); {pace}"
        )
        busy = asyncio.create_task(lab.cell(handle, source, wait=40))
        await asyncio.sleep(0.5)
        while not busy.done():
            for name, call in (
                ("tools/list", lambda: other.client.list_tools(cache_mode="bypass")),
                ("read_outputs", lambda: other.call("read_outputs", sandbox=handle, wait=0)),
            ):
                began = time.monotonic()
                await call()
                times[name].append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        assert ": complete in" in text_of(await busy)
    for name, seen in times.items():
        sys.stdout.write(f"C04: {name} p99 {percentile(seen, 0.99) * 1000:.0f} ms\n")
        assert len(seen) > 100
        assert percentile(seen, 0.99) <= 0.2


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_c07_twenty_clients_with_twenty_notebooks(place: Ground) -> None:
    async with served(place) as server, AsyncExitStack() as stack:
        labs = [await stack.enter_async_context(server.lab(ERAS[n % 2])) for n in range(20)]

        async def investigate(who: int, lab: Lab) -> None:
            handle = await lab.start(name=f"n{who}")
            for n in range(5):
                text = await lab.ok(
                    "create_cell", sandbox=handle, source=f"print('who', {who}, {n})"
                )
                assert text.endswith(f"who {who} {n}")
            cells = read_cells(await lab.notebook_path(handle))
            assert [streams(c) for c in cells] == [f"who {who} {n}\n" for n in range(5)]

        await asyncio.gather(*(investigate(who, lab) for who, lab in enumerate(labs)))
