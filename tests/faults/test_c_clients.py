"""Clients that cancel, vanish, come in crowds or send nonsense: a run belongs to its sandbox."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import string
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import anyio
import httpx2
import pytest
from mcp import Client, MCPError
from mcp.types import CallToolResult

from ..support import Lab, processes_of, read_cells, stdio_parameters, streams, text_of, until
from .ground import ERAS, TOKEN, Ground, http_server, raw_server, raw_start, raw_text

pytestmark = pytest.mark.anyio

WAYS = ["stdio legacy", "stdio auto", "http legacy", "http auto"]


@asynccontextmanager
async def lab_over(way: str, place: Ground) -> AsyncIterator[Lab]:
    from seer_mcp.server import build_server

    transport, mode = way.split()
    async with AsyncExitStack() as stack:
        if transport == "http":
            endpoint = await stack.enter_async_context(http_server(place.config()))
            yield await stack.enter_async_context(endpoint.lab(mode))
        else:
            env = {"XDG_RUNTIME_DIR": str(place.sockets)}
            server: Any = (
                stdio_parameters(place.folder, "--on-exit", "stop", env=env)
                if transport == "stdio"
                else build_server(place.config())
            )
            yield Lab(await stack.enter_async_context(Client(server, mode=mode)), place.folder)


async def cancelled_after(seconds: float, call: Any) -> float:
    """Cancel a call; how long it took to end then."""
    task = asyncio.create_task(call)
    await asyncio.sleep(seconds)
    assert not task.done(), "the call ended before it was cancelled"
    began = time.monotonic()
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait([task])
    return time.monotonic() - began


@pytest.mark.parametrize("way", WAYS)
async def test_c01_a_cancelled_call_ends_at_once_and_its_run_goes_on(
    place: Ground, way: str
) -> None:
    async with lab_over(way, place) as lab:
        handle = await lab.start()
        source = (
            "import time\nfor i in range(18): print(i, flush=True); time.sleep(0.1)\ndone = True"
        )
        assert await cancelled_after(1.0, lab.cell(handle, source)) < 1.0
        began = time.monotonic()
        await lab.ok("list_sandboxes")  # the server is not held up
        assert time.monotonic() - began < 3.0
        (cell,) = read_cells(await lab.notebook_path(handle))
        text = await lab.ok("read_outputs", sandbox=handle, cell=cell["id"])
        assert f"cell {cell['id']}: complete in" in text
        (cell,) = read_cells(await lab.notebook_path(handle))
        assert streams(cell) == "".join(f"{i}\n" for i in range(18))
        # A cancelled reader does not stop it either; interrupt is a tool of its own.
        endless = await lab.cell(handle, "while True: time.sleep(0.05)", wait=0)
        run = endless.meta["seer/run"]["id"]
        await cancelled_after(0.3, lab.call("read_outputs", sandbox=handle))
        status = await lab.call("read_outputs", sandbox=handle, run=run, wait=0)
        assert status.meta["seer/run"]["state"] == "running"
        assert "interrupted after" in await lab.ok("interrupt", sandbox=handle)
        assert (await lab.ok("create_cell", sandbox=handle, source="done")).endswith("True")


@pytest.mark.parametrize("way", ["memory auto", "stdio legacy"])
async def test_c01_a_cancelled_start_leaves_nothing(place: Ground, way: str) -> None:
    moments = random.Random(5)
    async with lab_over(way, place) as lab:
        await lab.ok("list_sandboxes")
        before = place.files()
        for number in range(4):
            # A name of its own: that of a start that is still being ended is not free yet.
            task = asyncio.create_task(lab.call("start_sandbox", name=f"never-{number}"))
            await asyncio.sleep(moments.uniform(0.0, 0.5))
            task.cancel()
            await asyncio.wait([task], timeout=10)
            if not task.cancelled() and task.exception() is None:
                assert not task.result().is_error, text_of(task.result())
                handle = task.result().meta["seer/sandbox"]["handle"]
                await lab.ok("stop_sandbox", sandbox=handle)
                before = place.files()
                continue
            await until(lambda b=before: place.processes() == [] and place.files() == b, 20)
        assert "0 running" in await lab.ok("list_sandboxes")
        await lab.start(name="never-0")  # the name is free


async def test_c01_a_cancelled_stop_is_finished_all_the_same(place: Ground) -> None:
    async with lab_over("memory auto", place) as lab:
        handle = await lab.start()
        await lab.cell(handle, "while True: pass", wait=0)
        task = asyncio.create_task(lab.call("stop_sandbox", sandbox=handle))
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task], timeout=10)
        await until(lambda: processes_of(handle) == [], 20)
        assert "is gone (stopped by stop_sandbox)" in await lab.no(
            "create_cell", sandbox=handle, source="1"
        )


async def test_c01_a_cancelled_list_does_not_lose_a_sandbox_that_is_found_again(
    place: Ground,
) -> None:
    with raw_server(place) as server:
        handles = [raw_start(server) for _ in range(3)]
    for pause in (0.0, 0.003, 0.03):
        async with lab_over("memory legacy", place) as lab:
            task = asyncio.create_task(lab.call("list_sandboxes"))
            await asyncio.sleep(pause)
            task.cancel()
            await asyncio.wait([task], timeout=10)
            for handle in handles:
                assert not (await lab.cell(handle, "1")).is_error
            if pause < 0.03:
                await let_go(lab)


async def let_go(lab: Lab) -> None:
    """End this server as one that keeps its sandboxes does."""
    register = lab.client.server.register  # type: ignore[union-attr]
    for session in list(register._held.live):
        await session.let_go()
        session.ended = "let go by the test"


async def test_c02_a_killed_client_finds_its_result_and_nothing_runs_twice(place: Ground) -> None:
    with raw_server(place) as server:
        handle = raw_start(server)
        source = "import time\nruns = globals().get('runs', 0) + 1\nfor i in range(60): print(i); time.sleep(0.03)"
        server.send(
            "tools/call", name="create_cell", arguments={"sandbox": handle, "source": source}
        )
        time.sleep(0.6)
        os.killpg(
            server.process.pid, signal.SIGKILL
        )  # the client, and the server that it had started
        server.process.wait(10)
    with raw_server(place) as server:
        assert handle in raw_text(server.call("list_sandboxes"))
        text = raw_text(server.call("read_outputs", sandbox=handle))
        assert ": complete in" in text
        assert "\n".join(str(i) for i in range(60)) in text
        assert raw_text(server.call("create_cell", sandbox=handle, source="runs")).endswith("\n1")


async def test_c02_an_http_client_that_vanishes_finds_its_result(place: Ground) -> None:
    async with http_server(place.config()) as endpoint:
        async with endpoint.lab() as lab:
            handle = await lab.start()
            source = "import time\nfor i in range(40): print(i); time.sleep(0.05)"
            async with httpx2.AsyncClient(timeout=30) as raw:  # cut off in the middle of its call
                body = {
                    "jsonrpc": "2.0",
                    "id": 1,
                    "method": "tools/call",
                    "params": {
                        "name": "create_cell",
                        "arguments": {"sandbox": handle, "source": source},
                        "_meta": {
                            "io.modelcontextprotocol/protocolVersion": "2026-07-28",
                            "io.modelcontextprotocol/clientInfo": {"name": "x", "version": "1"},
                            "io.modelcontextprotocol/clientCapabilities": {},
                        },
                    },
                }
                headers = {
                    "Authorization": f"Bearer {TOKEN}",
                    "Accept": "application/json, text/event-stream",
                    "MCP-Protocol-Version": "2026-07-28",
                    "Mcp-Method": "tools/call",
                    "Mcp-Name": "create_cell",
                }
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.8):
                        answer = await raw.post(endpoint.url, json=body, headers=headers)
                        raise AssertionError(answer.text)
        async with endpoint.lab("legacy") as other:
            text = await other.ok("read_outputs", sandbox=handle)
            assert ": complete in" in text
            (cell,) = read_cells(await other.notebook_path(handle))
            assert streams(cell) == "".join(f"{i}\n" for i in range(40))


async def test_c03_no_call_waits_longer_than_the_limit(place: Ground) -> None:
    from seer_mcp.server import build_server

    async with Client(build_server(place.config(max_wait=1.0))) as client:
        lab = Lab(client, place.folder)
        handle = await lab.start()
        began = time.monotonic()
        result = await lab.cell(handle, "import time; time.sleep(8); 'whole'", wait=1e6)
        assert time.monotonic() - began < 8  # it did not wait for the cell
        assert result.meta["seer/run"]["state"] == "running" and not result.is_error
        for _ in range(15):
            text = await lab.ok("read_outputs", sandbox=handle, wait=1e6)
            if "complete" in text:
                break
        assert "whole" in text


def p99(times: list[float]) -> float:
    return sorted(times)[int(len(times) * 0.99)]


# The row asks for 0.2 s on a quiet machine, where benchmarks/peers.py measures it. Tests run side by
# side: here a call must not wait for the cell, which takes 5 s.
@pytest.mark.parametrize(
    ("pace", "bound"), [("time.sleep(0.001)", 2.0), ("pass", 4.0)], ids=["lively", "flooding"]
)
async def test_c04_other_calls_are_answered_while_a_cell_runs(
    place: Ground, pace: str, bound: float
) -> None:
    async with (
        http_server(place.config()) as endpoint,
        endpoint.lab() as lab,
        endpoint.lab("legacy") as other,
    ):
        handle = await lab.start()
        source = (
            f"import time\nend = time.time() + 5\nwhile time.time() < end: print('x' * 100); {pace}"
        )
        busy = asyncio.create_task(lab.cell(handle, source, wait=30))
        await asyncio.sleep(0.5)
        times: dict[str, list[float]] = {"tools/list": [], "read_outputs": [], "list_sandboxes": []}
        while not busy.done():
            for name, call in (
                ("tools/list", lambda: other.client.list_tools(cache_mode="bypass")),
                ("read_outputs", lambda: other.call("read_outputs", sandbox=handle, wait=0)),
                ("list_sandboxes", lambda: other.call("list_sandboxes")),
            ):
                began = time.monotonic()
                await call()
                times[name].append(time.monotonic() - began)
            await asyncio.sleep(0.005)
        assert ": complete in" in text_of(await busy)
    figures = {
        name: f"p99 {p99(seen) * 1000:.0f} ms of {len(seen)}" for name, seen in times.items()
    }
    sys.stdout.write(f"C04: {figures}\n")
    assert all(len(seen) >= 5 for seen in times.values()), figures
    assert all(p99(seen) < bound for seen in times.values()), figures


async def test_c06_runs_sent_at_once_run_once_each_in_order_of_arrival(place: Ground) -> None:
    async with http_server(place.config()) as endpoint, AsyncExitStack() as stack:
        labs = [await stack.enter_async_context(endpoint.lab(ERAS[n % 2])) for n in range(4)]
        handle = await labs[0].start()
        await labs[0].cell(handle, "import time; order = []")
        source = "order.append({n}); time.sleep(0.2); print('mine is {n}')"

        async def one(n: int) -> CallToolResult:
            await asyncio.sleep(0.05 * n)
            return await labs[n].cell(handle, source.format(n=n))

        results = await asyncio.gather(*(one(n) for n in range(4)))
        for n, result in enumerate(results):
            head, *output = text_of(result).splitlines()
            assert ": complete in" in head
            assert output == [f"mine is {n}"]
        assert (await labs[0].ok("create_cell", sandbox=handle, source="order")).endswith(
            "[0, 1, 2, 3]"
        )
        counts = [c["execution_count"] for c in read_cells(await labs[0].notebook_path(handle))]
        assert counts == [1, 2, 3, 4, 5, 6]


async def test_c06_the_same_cell_run_by_four_clients_runs_once(lab: Lab) -> None:
    handle = await lab.start()
    await lab.cell(handle, "import time; n = 0")
    written = await lab.cell(handle, "n += 1; time.sleep(0.5); n", run=False)
    cell = written.meta["seer/cell"]
    results = await asyncio.gather(
        *(lab.call("run_cell", sandbox=handle, cells=cell) for _ in range(4))
    )
    assert [r.is_error for r in results].count(False) == 1
    assert all("already" in text_of(r) for r in results if r.is_error)
    assert (await lab.ok("create_cell", sandbox=handle, source="n")).endswith("\n1")


async def test_c07_clients_with_a_notebook_each_get_their_own_output(place: Ground) -> None:
    async with http_server(place.config()) as endpoint:

        async def investigate(who: int) -> None:
            async with endpoint.lab(ERAS[who % 2]) as lab:
                handle = await lab.start(name="same-name" if who == 0 else f"n{who}")
                for n in range(3):
                    text = await lab.ok(
                        "create_cell", sandbox=handle, source=f"me = {who}; print('who', me, {n})"
                    )
                    assert text.endswith(f"who {who} {n}")
                cells = read_cells(await lab.notebook_path(handle))
                assert [streams(c) for c in cells] == [f"who {who} {n}\n" for n in range(3)]

        async with asyncio.timeout(100):
            await asyncio.gather(*(investigate(who) for who in range(6)))


# -- C09 --------------------------------------------------------------------------------------

STRANGE: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2**31,
    2**63,
    2**64,
    10**400,
    -(10**30),
    0.5,
    -0.1,
    1e308,
    -1e308,
    5e-324,
    "",
    " ",
    "\0",
    "\n",
    "a",
    "all",
    "0:0",
    "99:99",
    "0:" + "9" * 25,
    "NaN",
    "nan",
    "inf",
    "-Infinity",
    "true",
    "1e400",
    "r0000000000",
    "../../etc/passwd",
    "/",
    "~",
    "organism:nothing",
    "\u202e\u200b\ufeff",
    "\U0001f600" * 50,
    "caf\u00e9",
    "x" * 5000,
    "{}",
    "[]",
    "null",
    "'; drop table cells; --",
    "%s%n{0}{cursor}",
    "<script>alert(1)</script>",
    "\x1b[31m",
    [],
    [1, "a"],
    {},
    {"a": {"b": []}},
    [[[[[[]]]]]],
]
OWN = (
    "local",
    "code",
    "markdown",
    "text",
    "base64",
    "4bit",
    "print('fuzz')",
    "1/0",
    ".",
    "f.txt",
    "tool_packs.models",
)


class Fuzz:
    """Calls of every tool with arguments that are mostly wrong, from one seed."""

    def __init__(
        self, seed: int, schemas: dict[str, dict[str, Any]], handles: list[str], cells: list[str]
    ) -> None:
        self.chance = random.Random(seed)
        self.schemas = schemas
        self.handles = handles
        self.cells = cells

    def value(self, name: str) -> Any:
        dice = self.chance.random()
        if name in ("wait",):
            return 0 if dice < 0.6 else self.chance.choice([*STRANGE, -5, 0.01])
        if name == "sandbox" and dice < 0.8:
            return self.chance.choice(self.handles)
        if name in ("cell", "cells", "after") and dice < 0.6:
            return self.chance.choice(self.cells)
        if name == "name" and dice < 0.5:
            return "".join(self.chance.choices(string.printable, k=self.chance.randrange(60)))
        if dice < 0.55:
            return self.chance.choice(STRANGE)
        if dice < 0.8:
            return self.chance.choice(OWN)
        return "".join(
            chr(self.chance.choice([*range(1, 0x250), 0x202E, 0x1F600])) for _ in range(20)
        )

    def call(self) -> tuple[str, dict[str, Any]]:
        tool = self.chance.choice([*self.schemas])
        known = list(self.schemas[tool]["properties"])
        required = self.schemas[tool].get("required", [])
        wanted = [p for p in known if p in required or self.chance.random() < 0.4]
        if self.chance.random() < 0.12:
            wanted = [p for p in wanted if self.chance.random() < 0.5]
        arguments = {name: self.value(name) for name in wanted}
        if "wait" in known:
            arguments.setdefault("wait", 0)
        if self.chance.random() < 0.15:
            extra = self.chance.choice(
                ["sandox", "Source", "__class__", "self", "context", "", "\0", "a" * 500]
            )
            arguments[extra] = self.value(extra)
        return tool, arguments


# Real starts are few: they take a second each, and other tests are about them.
COSTLY = ("start_sandbox", "restart_kernel", "stop_sandbox")


async def fuzzed(place: Ground, calls: int, seed: int, mode: str) -> dict[str, int]:
    outcomes = {"answer": 0, "isError": 0, "json-rpc error": 0}
    statuses: list[int] = []
    config = place.config(max_sandboxes=2, max_wait=2.0)

    async def note(response: httpx2.Response) -> None:
        statuses.append(response.status_code)

    async with (
        http_server(config) as endpoint,
        httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {TOKEN}"},
            timeout=60.0,
            event_hooks={"response": [note]},
        ) as http,
    ):
        from mcp.client.streamable_http import streamable_http_client

        async with Client(
            streamable_http_client(endpoint.url, http_client=http), mode=mode
        ) as client:
            lab = Lab(client, place.folder)
            listed = (await client.list_tools()).tools
            schemas = {tool.name: tool.input_schema for tool in listed}
            handle = await lab.start(name="fuzz")
            cells = [
                (await lab.cell(handle, "1")).meta["seer/run"]["cell"],
                (await lab.cell(handle, "# x", type="markdown")).meta["seer/cell"],
            ]
            fuzz = Fuzz(seed, schemas, [handle], cells)
            for number in range(calls):
                tool, arguments = fuzz.call()
                if tool in COSTLY and arguments.get("sandbox") == handle:
                    arguments["sandbox"] = handle + "x"
                if tool == "start_sandbox":
                    arguments["backend"] = fuzz.chance.choice(["locl", "", 3, None, "Local"])
                if tool == "run_command":
                    arguments["command"] = fuzz.chance.choice(
                        ["true", "false", "\0", "", " ", 3, None]
                    )
                label = f"call {number} of seed {seed}: {tool}({ascii(arguments)[:600]})"
                try:
                    async with asyncio.timeout(20):
                        result = await client.call_tool(tool, arguments)
                except MCPError as error:
                    assert error.error.code in (-32602, -32600, -32601), (label, error)
                    outcomes["json-rpc error"] += 1
                    continue
                except TimeoutError:
                    raise AssertionError(f"no answer to {label}") from None
                text = text_of(result)
                assert "Error executing tool" not in text, (label, text)
                assert text, label
                outcomes["isError" if result.is_error else "answer"] += 1
                unknown = set(arguments) - set(schemas[tool]["properties"])
                missing = set(schemas[tool].get("required", ())) - set(arguments)
                if unknown or missing:
                    assert result.is_error, (label, text)
                if number % 100 == 99:
                    await lab.ok("restart_kernel", sandbox=handle)
            assert max(statuses) < 500, sorted(set(statuses))
            again = await lab.ok("create_cell", sandbox=handle, source="6 * 7", wait=10)
            assert again.endswith("42")
            cells_now = read_cells(await lab.notebook_path(handle))
            assert cells_now
    assert place.processes() == []
    return outcomes


@pytest.mark.parametrize(("mode", "calls"), [("legacy", 100), ("auto", 100)])
async def test_c09_200_fuzzed_calls_are_all_answered(place: Ground, mode: str, calls: int) -> None:
    outcomes = await fuzzed(place, calls, seed=11 + ERAS.index(mode), mode=mode)
    assert outcomes["isError"] > calls / 2, outcomes


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("mode", ERAS)
async def test_c09_5000_fuzzed_calls_are_all_answered(place: Ground, mode: str) -> None:
    outcomes = await fuzzed(place, 5000, seed=101 + ERAS.index(mode), mode=mode)
    sys.stdout.write(f"C09: {outcomes}\n")
    assert outcomes["isError"] > 1000, outcomes


async def test_c09_nan_and_infinity_do_not_make_a_call_endless(lab: Lab) -> None:
    handle = await lab.start()
    await lab.cell(handle, "while True: pass", wait=0)
    for wait in ("nan", "inf", "-inf", "NaN", -1, 1e400, float("nan")):
        with anyio.fail_after(60):
            result = await lab.call("read_outputs", sandbox=handle, wait=wait)
        assert result.is_error and "wait" in text_of(result), (wait, text_of(result))


async def test_unknown_arguments_are_refused_with_the_nearest_name(lab: Lab) -> None:
    text = await lab.no("start_sandbox", nmae="x")
    assert "no parameter 'nmae'" in text and "Did you mean name?" in text
    text = await lab.no("create_cell", sandbox="x", source="1", cell_type="code")
    assert "no parameter 'cell_type'" in text and "Parameters of create_cell: " in text
    assert "needs source" in await lab.no("create_cell", sandbox="x")
    assert "Did you mean 'create_cell'?" in await lab.no("creat_cell")
