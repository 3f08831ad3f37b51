"""What every backend must do: one list of checks, run against each with nothing but a harness.

A check is an async function of a Bench. It goes through `Backend`, `Sandbox` and the host's
operations over a real link, as a session does. Checks that leave a sandbox as it was share one.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from seer_mcp.backends import Backend, Place, Record, Sandbox
from seer_mcp.environment import SandboxSpec
from seer_mcp.errors import (
    BadInput,
    KernelDead,
    NotFound,
    SandboxStartFailed,
    SandboxUnreachable,
    SeerError,
)
from seer_mcp.kernel import Event, Link

SECRET = "value-of-a-secret-9f31"  # in the env of the shared sandboxes, under SECRET_NAME
SECRET_NAME = "CONTRACT_TOKEN"
HIDDEN = "value-of-a-place-52ab"  # among the secrets of the shared sandboxes, under HIDDEN_NAME
HIDDEN_NAME = "CONTRACT_HIDDEN"
CANARY = "SEER_CONTRACT_CANARY"  # in the environment of the server, where it must stay
OUTPUT_CAP = 2_000_000  # bytes; the harness configures its backends with it
PACK = "contract_pack"  # a module with ANSWER = 42 in it, among the packs of every Place

# What happens between the host and its kernel, the same over any line: slow where the line is a long one.
OF_THE_HOST = re.compile(
    "a_command_|a_host_|an_interrupt_|an_error_|runs_|what_a_|what_follows_|a_call_|input_|text_|"
    "a_result_|the_same_run_|output_|the_death_of_a_kernel|a_killed_kernel|a_restart|kernel_and_|"
    "forks_|a_cell_that_takes|a_reader_never|an_unused_|the_end_of_a_sandbox|to_clear_|"
    "half_a_request|an_unknown_|an_end_that|every_byte|an_empty_file"
)

NUMBER = os.getpid()
SLEEPS = [f"sleep {NUMBER}000{i}" for i in range(3)]  # daemons, told by their command lines

Check = Callable[["Bench"], Awaitable[None]]
CHECKS: list[Check] = []


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


class Harness(Protocol):
    """What is different from one backend to the next, and how to do real harm to its sandboxes."""

    backend: Backend
    other: Backend
    """The same backend for the state folder of somebody else."""
    lacks: Mapping[str, str]
    """What it cannot do here -> why: "network", "memory", "processes", "last words"."""
    patience: float
    """Seconds in which anything that is to happen must have happened."""
    folder: Path
    """A folder of this side for files."""

    def spec(self, **changes: Any) -> SandboxSpec: ...
    def broken(self) -> SandboxSpec:
        """A spec whose host ends at once, saying "No module named" in its log."""
        ...

    def impossible(self) -> SandboxSpec:
        """A spec that is refused before anything is started."""
        ...

    def place(self, handle: str, owner: str) -> Place: ...
    def stale(self, record: Record) -> Record:
        """The record as if its machine had ended and something else had got its number."""
        ...

    async def kill_host(self, sandbox: Sandbox) -> None:
        """End the kernel host as nobody can prevent, and nothing else."""
        ...

    def frozen(self, sandbox: Sandbox) -> AbstractAsyncContextManager[None]:
        """While it is entered the host is there and does not answer."""
        ...

    async def left(self, handle: str) -> list[str]:
        """What there still is of a sandbox: processes, sockets, groups; [] when it is gone."""
        ...

    async def find_elsewhere(self, record: Record) -> bool:
        """Whether another process of this side finds it."""
        ...


@dataclass
class Run:
    """What came of a run."""

    state: str
    why: str
    count: int | None
    events: list[Event]

    def text(self, name: str = "stdout") -> str:
        return "".join(e["text"] for e in self.events if e.get("name") == name)


class Box:
    """A sandbox with a link to it, as a session has it."""

    def __init__(
        self, harness: Harness, sandbox: Sandbox, place: Place, reports: list[str]
    ) -> None:
        self.harness = harness
        self.sandbox = sandbox
        self.place = place
        self.reports = reports
        self.record = sandbox.record()
        self.events: list[Event] = []
        self.gone: str | None = None
        self.damage: list[tuple[int, int]] = []  # lines and bytes that made no sense
        self.link = Link(sandbox.dial, 1, self.events.append, self._hurt, self._is_gone, self._lost)
        self.link.open()

    async def _is_gone(self) -> str | None:
        found = await self.harness.backend.find(self.record)
        return None if found is not None else "its host is gone"

    def _hurt(self, lines: int, size: int) -> None:
        self.damage.append((lines, size))

    def _lost(self, why: str) -> None:
        self.gone = why

    async def ready(self) -> Box:
        await self.until(lambda: self.kernel() in ("ready", "failed"))
        assert self.kernel() == "ready", self.sandbox.log()
        return self

    def kernel(self) -> str:
        return next((e["state"] for e in reversed(self.events) if e["type"] == "kernel"), "")

    async def until(self, condition: Callable[[], Any], seconds: float | None = None) -> Any:
        return await until(condition, seconds or self.harness.patience)

    async def submit(self, *sources: str, stop_on_error: bool = True) -> list[str]:
        runs = [{"run": "r" + secrets.token_hex(5), "code": source} for source in sources]
        await self.link.request("run", runs=runs, stop_on_error=stop_on_error)
        return [run["run"] for run in runs]

    async def run(self, source: str) -> Run:
        (id,) = await self.submit(source)
        return await self.over(id)

    async def order(self, line: str) -> str:
        id = "c" + secrets.token_hex(5)
        await self.link.request("command", run=id, command=line)
        return id

    async def command(self, line: str) -> Run:
        return await self.over(await self.order(line))

    async def over(self, id: str) -> Run:
        await self.until(lambda: self.ends(id))
        end = self.ends(id)[0]
        mine = [event for event in self.events if event.get("run") == id]
        return Run(end["state"], end["why"], end["count"], mine)

    def ends(self, id: str) -> list[Event]:
        return [e for e in self.events if e["type"] == "end" and e.get("run") == id]

    def said(self, id: str) -> str:
        return "".join(e.get("text", "") for e in self.events if e.get("run") == id)

    async def value(self, source: str) -> Any:
        """What a Python expression is in the kernel, by way of JSON."""
        done = await self.run(f"import json\nprint(json.dumps({source}))")
        assert done.state == "complete", done
        return json.loads(done.text())

    async def status(self) -> dict[str, Any]:
        return await self.link.request("status")

    async def end(self) -> None:
        await self.link.close()
        await self.sandbox.terminate()


async def until(condition: Callable[[], Any], seconds: float) -> Any:
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"still not true after {seconds} s"
        await asyncio.sleep(0.01)
    return value


@dataclass
class Bench:
    """The sandboxes that checks share, made when the first check asks for them."""

    harness: Harness
    boxes: dict[str, Box] = field(default_factory=dict[str, Box])
    started: list[Box] = field(default_factory=list[Box])

    async def start(
        self, *, owner: str = "", ready: bool = True, hidden: str = "", **changes: Any
    ) -> Box:
        """A sandbox for one check, which ends it."""
        place = self.harness.place("c-" + secrets.token_hex(4), owner)
        if hidden:
            place = replace(place, secrets={HIDDEN_NAME: hidden})
            changes["secrets"] = (HIDDEN_NAME,)
        reports: list[str] = []
        sandbox = await self.harness.backend.start(
            self.harness.spec(**changes), place, reports.append
        )
        box = Box(self.harness, sandbox, place, reports)
        self.started.append(box)
        return await box.ready() if ready else box

    async def box(self, name: str = "one") -> Box:
        """A shared sandbox with a kernel that lives and has nothing to do."""
        if name not in self.boxes:
            env = {SECRET_NAME: SECRET, "WHICH": name}
            self.boxes[name] = await self.start(owner="contract", env=env, hidden=HIDDEN)
        box = self.boxes[name]
        if box.kernel() == "dead":
            await box.link.request("restart", timeout=60)
        return box

    async def corpse(self) -> Box:
        """A shared sandbox that was used and has ended."""
        if "corpse" not in self.boxes:
            box = self.boxes["corpse"] = await self.start()
            await box.run("for i in range(200): print('line', i)")
            await box.end()
        return self.boxes["corpse"]

    async def gone(self, box: Box) -> None:
        """Nothing is left of it, and nobody finds it."""
        assert await self.harness.left(box.place.handle) == []
        assert await self.harness.backend.find(box.record) is None

    async def close(self) -> None:
        for box in self.started:
            await box.end()
        assert [box.damage for box in self.started if box.damage] == []

    def needs(self, ability: str) -> None:
        if why := self.harness.lacks.get(ability):
            pytest.skip(f"{ability}: {why}")


async def refused(work: Awaitable[Any], kind: type[SeerError], *words: str) -> str:
    """The text of the failure that it must raise."""
    with pytest.raises(kind) as caught:
        await work
    text = str(caught.value)
    assert all(word in text for word in words), text
    return text


# -- start ----------------------------------------------------------------------------------------


@check
async def a_start_reports_progress(bench: Bench) -> None:
    box = await bench.box()
    assert box.reports and all(isinstance(r, str) and r for r in box.reports)


@check
async def a_started_kernel_answers(bench: Bench) -> None:
    box = await bench.box()
    assert await box.value("6 * 7") == 42


@check
async def the_status_names_what_runs(bench: Bench) -> None:
    box = await bench.box()
    status = await box.status()
    assert status["kernel"] == "ready" and status["kernel_pid"] == await box.value(
        "__import__('os').getpid()"
    )
    assert status["active"] is None and status["queued"] == [] and status["generation"] >= 1


@check
async def the_log_is_text(bench: Bench) -> None:
    box = await bench.box()
    assert isinstance(box.sandbox.log(), str)


@check
async def a_broken_interpreter_fails_with_its_log_and_leaves_nothing(bench: Bench) -> None:
    place = bench.harness.place("c-broken", "")
    start = bench.harness.backend.start(bench.harness.broken(), place, lambda _: None)
    text = await refused(start, SandboxStartFailed, "No module named", "Nothing was left running")
    assert "needs ipykernel" in text
    assert await bench.harness.left("c-broken") == []


@check
async def an_impossible_spec_is_refused_before_anything_starts(bench: Bench) -> None:
    place = bench.harness.place("c-impossible", "")
    start = bench.harness.backend.start(bench.harness.impossible(), place, lambda _: None)
    await refused(start, SeerError)
    assert await bench.harness.left("c-impossible") == []


@check
async def a_sandbox_has_the_files_of_its_spec(bench: Bench) -> None:
    folder = bench.harness.folder / "brought"
    (folder / "in ner").mkdir(parents=True, exist_ok=True)
    (folder / "in ner" / "b.txt").write_text("deep")
    (folder / "a.txt").write_text("near")
    files = {"data": str(folder), "one/named.txt": str(folder / "a.txt")}
    box = await bench.start(files=files)
    assert (await box.command("cat data/a.txt 'data/in ner/b.txt' one/named.txt")).text() == (
        "neardeepnear"
    )
    await box.end()


@check
async def a_cancelled_start_leaves_nothing(bench: Bench) -> None:
    for moment in (0.02, 0.15, 0.3):
        place = bench.harness.place("c-cut-" + secrets.token_hex(3), "")
        start = asyncio.create_task(
            bench.harness.backend.start(bench.harness.spec(), place, lambda _: None)
        )
        await asyncio.sleep(moment)
        start.cancel()
        with suppress(asyncio.CancelledError):  # or it was there in time
            await (await start).terminate()
        assert await bench.harness.left(place.handle) == []


@check
async def the_kernel_has_the_environment_of_its_spec(bench: Bench) -> None:
    box = await bench.box()
    assert await box.value(f"__import__('os').environ['{SECRET_NAME}']") == SECRET
    assert (await box.command(f"printf %s ${SECRET_NAME}")).text() == SECRET


@check
async def secrets_are_in_the_environment_and_in_no_record(bench: Bench) -> None:
    box = await bench.box()
    assert await box.value(f"__import__('os').environ['{HIDDEN_NAME}']") == HIDDEN
    assert (await box.command(f"printf %s ${HIDDEN_NAME}")).text() == HIDDEN
    told = [box.sandbox.record(), await bench.harness.backend.sweep(""), await box.status()]
    assert HIDDEN not in json.dumps(told) and HIDDEN not in box.sandbox.log()
    assert not [report for report in box.reports if HIDDEN in report]


@check
async def a_restarted_kernel_has_the_secrets_too(bench: Bench) -> None:
    box = await bench.box("two")
    await box.link.request("restart", timeout=60)
    assert await box.value(f"__import__('os').environ['{HIDDEN_NAME}']") == HIDDEN


@check
async def the_kernel_has_not_the_environment_of_the_server(bench: Bench) -> None:
    assert os.environ[CANARY]
    box = await bench.box()
    assert await box.value(f"__import__('os').environ.get('{CANARY}')") is None
    assert (await box.command(f"printf %s ${CANARY}")).text() == ""


@check
async def packs_are_importable(bench: Bench) -> None:
    box = await bench.box()
    assert await box.value(f"__import__('{PACK}').ANSWER") == 42
    assert (await box.command(f"python -c 'import {PACK}; print({PACK}.ANSWER)'")).text() == "42\n"


@check
async def python_in_a_command_is_the_kernels_own(bench: Bench) -> None:
    box = await bench.box()
    prefix = await box.value("__import__('sys').prefix")
    assert (await box.command("python -c 'import sys; print(sys.prefix)'")).text() == prefix + "\n"


@check
async def two_sandboxes_do_not_see_each_other(bench: Bench) -> None:
    one, two = await bench.box(), await bench.box("two")
    which = "__import__('os').environ['WHICH']"
    assert await asyncio.gather(one.value(which), two.value(which)) == ["one", "two"]
    await one.run("mine = 1\nopen('only-here.txt', 'w').write('x')")
    assert await two.value("'mine' in globals()") is False
    assert await two.value("__import__('os').path.exists('only-here.txt')") is False
    assert one.record["handle"] != two.record["handle"]


# -- records and finding --------------------------------------------------------------------------


@check
async def a_record_is_small_json(bench: Bench) -> None:
    box = await bench.box()
    text = json.dumps(box.sandbox.record())
    assert json.loads(text) == box.sandbox.record() and len(text) < 4000
    assert box.sandbox.record()["handle"] == box.place.handle


@check
async def a_record_holds_no_secret(bench: Bench) -> None:
    box = await bench.box()
    text = json.dumps(box.sandbox.record()) + json.dumps(await bench.harness.backend.sweep(""))
    assert SECRET not in text and os.environ[CANARY] not in text


@check
async def a_record_stays_the_same(bench: Bench) -> None:
    box = await bench.box()
    await box.run("x = 1")
    assert box.sandbox.record() == box.record


@check
async def a_living_sandbox_is_found_by_its_record(bench: Bench) -> None:
    box = await bench.box()
    found = await bench.harness.backend.find(json.loads(json.dumps(box.record)))
    assert found is not None and found.record() == box.record


@check
async def what_is_found_can_be_dialled(bench: Bench) -> None:
    box = await bench.box()
    found = await bench.harness.backend.find(box.record)
    assert found is not None
    async with Stream(found) as stream:
        assert (await stream.ask("status"))["kernel"] == "ready"


@check
async def another_process_finds_it(bench: Bench) -> None:
    box = await bench.box()
    assert await bench.harness.find_elsewhere(box.record) is True
    assert await box.value("1") == 1  # looking did it no harm


@check
async def an_ended_sandbox_is_not_found(bench: Bench) -> None:
    box = await bench.corpse()
    await bench.gone(box)


@check
async def another_process_does_not_find_an_ended_one(bench: Bench) -> None:
    box = await bench.corpse()
    assert await bench.harness.find_elsewhere(box.record) is False


@check
async def a_number_that_was_given_to_something_else_is_not_found(bench: Bench) -> None:
    box = await bench.box()
    assert await bench.harness.backend.find(bench.harness.stale(box.record)) is None


# -- the line -------------------------------------------------------------------------------------


class Stream:
    """One connection to a host, line by line."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._number = 0

    async def __aenter__(self) -> Stream:
        self.reader, self.writer = await self._sandbox.dial()
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()

    async def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        self._number += 1
        self.writer.write(json.dumps({"id": self._number, "op": op, **fields}).encode() + b"\n")
        return json.loads(await asyncio.wait_for(self.reader.readline(), 20))

    async def events(self, start: int, last: int) -> list[bytes]:
        """The lines of the events from `start` to `last`."""
        assert (await self.ask("subscribe", **{"from": start}))["ok"]
        return [await asyncio.wait_for(self.reader.readline(), 20) for _ in range(start, last + 1)]


@check
async def two_lines_both_answer(bench: Bench) -> None:
    box = await bench.box()
    async with Stream(box.sandbox) as one, Stream(box.sandbox) as two:
        assert (await two.ask("ping"))["ok"] and (await one.ask("ping"))["ok"]


@check
async def twenty_lines_at_once_answer(bench: Bench) -> None:
    box = await bench.box()

    async def one() -> int:
        async with Stream(box.sandbox) as stream:
            return (await stream.ask("status"))["pid"]

    assert len(set(await asyncio.gather(*(one() for _ in range(20))))) == 1


@check
async def readers_from_different_numbers_get_the_same_events(bench: Bench) -> None:
    box = await bench.box()
    await box.run("for i in range(50): print('line', i, flush=True)")
    last = (await box.status())["last"]
    start = max(2, last - 30)
    async with Stream(box.sandbox) as one, Stream(box.sandbox) as two:
        whole, tail = await asyncio.gather(one.events(1, last), two.events(start, last))
    assert whole[start - 1 :] == tail
    assert [json.loads(line)["n"] for line in whole] == list(range(1, last + 1))


@check
async def a_line_that_breaks_again_and_again_loses_nothing(bench: Bench) -> None:
    box = await bench.box()
    writers: list[asyncio.StreamWriter] = []

    async def dial() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await box.sandbox.dial()
        writers.append(writer)
        return reader, writer

    heard: list[Event] = []
    start = (await box.status())["last"] + 1

    async def here() -> None:
        return None

    link = Link(dial, start, heard.append, box._hurt, here, lambda why: None)
    link.open()
    try:
        (id,) = await box.submit(
            "import os, time\nfor i in range(1500):\n    print('line', i, flush=True)\n"
            "    if i % 25 == 0: time.sleep(0.01)\n"
            "    while i == 1000 and not os.path.exists('broken'): time.sleep(0.01)"
        )
        while not box.ends(id):
            if writers and not writers[-1].is_closing():
                writers[-1].transport.abort()
            if len(writers) >= 3:
                await box.link.request("write_file", path="broken", data="")
            await asyncio.sleep(0.06)
        await until(lambda: any(e["type"] == "end" for e in heard), 20)
    finally:
        await link.close()
    assert len(writers) >= 3
    assert [e["n"] for e in heard] == list(range(start, start + len(heard)))
    text = "".join(e["text"] for e in heard if e["type"] == "stream" and e["run"] == id)
    assert text == "".join(f"line {i}\n" for i in range(1500))


@check
async def half_a_request_does_no_harm(bench: Bench) -> None:
    box = await bench.box()
    for junk in (b'{"id": 1, "op": "sta', b"\xff\x00 no json\n", b"[1, 2]\n", b"{}\n"):
        _, writer = await box.sandbox.dial()
        writer.write(junk)
        await writer.drain()
        writer.close()
    assert await box.value("6 * 7") == 42


@check
async def an_unknown_operation_is_refused_and_the_line_goes_on(bench: Bench) -> None:
    box = await bench.box()
    async with Stream(box.sandbox) as stream:
        answer = await stream.ask("make_coffee")
        assert answer["ok"] is False and "make_coffee" in answer["error"]
        assert (await stream.ask("ping"))["ok"]


@check
async def a_frozen_host_is_unreachable_in_bounded_time_and_comes_back(bench: Bench) -> None:
    box = await bench.box()
    async with bench.harness.frozen(box.sandbox):
        began = time.monotonic()
        with pytest.raises(SandboxUnreachable):
            await box.link.request("status", timeout=1.0)
        assert time.monotonic() - began < bench.harness.patience
        assert await bench.harness.backend.find(box.record) is not None
    assert (await box.status())["kernel"] == "ready"
    assert await box.value("6 * 7") == 42


# -- runs -----------------------------------------------------------------------------------------


@check
async def output_and_errors_are_kept_apart(bench: Bench) -> None:
    box = await bench.box()
    done = await box.run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert (done.state, done.text(), done.text("stderr")) == ("complete", "out\n", "err\n")


@check
async def text_arrives_as_it_was(bench: Bench) -> None:
    box = await bench.box()
    text = "".join(map(chr, range(32, 127))) + "äß→漢字🧪\u2028é" + "\t end"
    assert (await box.run(f"print({text!r})")).text() == text + "\n"


@check
async def a_result_is_an_event_with_its_data(bench: Bench) -> None:
    box = await bench.box()
    done = await box.run("from IPython.display import HTML\nHTML('<b>bold</b>')")
    (result,) = [e for e in done.events if e["type"] == "result"]
    assert result["data"]["text/html"] == "<b>bold</b>"


@check
async def an_error_has_its_traceback(bench: Bench) -> None:
    box = await bench.box()
    done = await box.run("def inner():\n    1 / 0\ninner()")
    (error,) = [e for e in done.events if e["type"] == "error"]
    assert done.state == "error" and error["ename"] == "ZeroDivisionError"
    assert "inner" in "".join(error["traceback"])


@check
async def the_same_run_twice_runs_once(bench: Bench) -> None:
    box = await bench.box()
    await box.run("count = 0")
    run = {"run": "r" + secrets.token_hex(5), "code": "count += 1"}
    for _ in range(3):
        await box.link.request("run", runs=[run])
    await box.over(run["run"])
    await box.link.request("run", runs=[run])
    assert await box.value("count") == 1


@check
async def runs_keep_their_order(bench: Bench) -> None:
    box = await bench.box()
    await box.run("order = []")
    ids: list[str] = []
    for i in range(12):
        ids += await box.submit(f"order.append({i})")
    await box.over(ids[-1])
    assert await box.value("order") == list(range(12))


@check
async def what_follows_an_error_in_a_call_does_not_run(bench: Bench) -> None:
    box = await bench.box()
    ids = await box.submit("ran = []", "1 / 0", "ran.append(1)")
    assert [(await box.over(id)).state for id in ids] == ["complete", "error", "not_run"]
    assert await box.value("ran") == []


@check
async def a_call_goes_on_after_an_error_if_it_is_told_to(bench: Bench) -> None:
    box = await bench.box()
    ids = await box.submit("1 / 0", "went_on = True", stop_on_error=False)
    assert [(await box.over(id)).state for id in ids] == ["error", "complete"]


@check
async def an_interrupt_ends_a_cell_and_keeps_its_variables(bench: Bench) -> None:
    box = await bench.box()
    (id,) = await box.submit("kept = 7\nprint('on', flush=True)\nwhile True: pass")
    await box.until(lambda: "on" in box.said(id))
    await box.link.request("interrupt", run=id)
    done = await box.over(id)
    assert done.state == "interrupted" and "KeyboardInterrupt" in str(done.events)
    assert await box.value("kept") == 7


@check
async def an_interrupt_of_everything_empties_the_queue(bench: Bench) -> None:
    box = await bench.box()
    (first,) = await box.submit("import time\nprint('on', flush=True)\ntime.sleep(60)")
    (second,) = await box.submit("touched = True")
    await box.until(lambda: "on" in box.said(first))
    await box.link.request("interrupt", run="", everything=True)
    assert [(await box.over(id)).state for id in (first, second)] == ["interrupted", "not_run"]
    assert await box.value("'touched' in globals()") is False


@check
async def input_is_an_error(bench: Bench) -> None:
    box = await bench.box()
    done = await box.run("input('name? ')")
    assert done.state == "error" and "StdinNotImplementedError" in str(done.events)


@check
async def what_a_thread_prints_late_stays_with_its_cell(bench: Bench) -> None:
    box = await bench.box()
    (id,) = await box.submit(
        "import threading, time\n"
        "threading.Thread(target=lambda: (time.sleep(0.3), print('late words'))).start()"
    )
    assert (await box.over(id)).state == "complete"
    other = await box.run("print('of another')")
    await box.until(lambda: "late words" in box.said(id))
    assert any(e.get("late") for e in box.events if e.get("run") == id)
    assert other.text() == "of another\n"


@check
async def output_over_the_cap_is_counted(bench: Bench) -> None:
    box = await bench.box()
    done = await box.run("for _ in range(40): print('x' * 99_999)")
    (capped,) = [e for e in done.events if e["type"] == "capped"]
    (end,) = [e for e in done.events if e["type"] == "end"]
    assert capped["cap"] == OUTPUT_CAP
    assert end["output_bytes"] == 4_000_000 and end["dropped_bytes"] >= 2_000_000
    assert len(done.text()) == 4_000_000 - end["dropped_bytes"] <= OUTPUT_CAP


@check
async def the_death_of_a_kernel_is_told(bench: Bench) -> None:
    box = await bench.box("two")
    done = await box.run("import os\nprint('before')\nos._exit(7)")
    assert done.state == "kernel_died" and "exit code 7" in done.why
    assert done.text() == "before\n" and box.kernel() == "dead"
    await refused(box.submit("1"), KernelDead, "exit code 7", "restart_kernel")


@check
async def a_killed_kernel_is_told_with_its_signal(bench: Bench) -> None:
    box = await bench.box("two")
    done = await box.run("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    assert done.state == "kernel_died" and "signal 9" in done.why and "memory" in done.why


@check
async def a_restart_is_a_new_kernel_and_nothing_of_the_old(bench: Bench) -> None:
    box = await bench.box("two")
    before = (await box.status())["generation"]
    pid = await box.value("__import__('subprocess').Popen(['sleep', '300']).pid")
    (hanging,) = await box.submit("gone = 1\nimport time\ntime.sleep(60)")
    answer = await box.link.request("restart", timeout=60)
    assert answer["kernel"] == "ready" and (await box.over(hanging)).state == "interrupted"
    assert (await box.status())["generation"] == before + 1
    assert await box.value("'gone' in globals()") is False
    assert (await box.command(f"kill -0 {pid} 2>/dev/null")).count != 0


# -- commands -------------------------------------------------------------------------------------


@check
async def a_command_that_succeeds_has_code_0(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command("echo out; echo err >&2")
    assert (done.state, done.count) == ("complete", 0)
    assert (done.text(), done.text("stderr")) == ("out\n", "err\n")


@check
async def a_command_that_fails_has_its_code(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command("exit 3")
    assert (done.state, done.count, done.why) == ("error", 3, "exit code 3")


@check
async def a_command_that_is_not_there_has_code_127(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command("no-such-program-anywhere")
    assert (done.state, done.count) == ("error", 127) and "not found" in done.text("stderr")


@check
async def a_command_that_is_killed_has_its_signal(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command("kill -9 $$")
    assert (done.state, done.count, done.why) == ("error", -9, "signal 9")


@check
async def a_command_runs_while_a_cell_runs(bench: Bench) -> None:
    box = await bench.box()
    (cell,) = await box.submit("import time\ntime.sleep(60)")
    assert (await box.command("echo beside")).text() == "beside\n"
    assert not box.ends(cell)
    await box.link.request("interrupt", run=cell)
    assert (await box.over(cell)).state == "interrupted"


@check
async def a_command_can_be_interrupted(bench: Bench) -> None:
    box = await bench.box()
    id = await box.order("echo on; sleep 60; echo after")
    await box.until(lambda: "on" in box.said(id))
    for _ in range(20):  # a shell can miss one while it forks; a session asks again as well
        await box.link.request("interrupt", run=id)
        with suppress(AssertionError):
            await box.until(lambda: box.ends(id), 1.0)
            break
    done = await box.over(id)
    assert done.state == "interrupted" and done.text() == "on\n"


@check
async def a_command_is_over_though_its_child_goes_on(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command("sleep 77 & echo started $!")
    assert done.count == 0
    pid = int(done.text().split()[1])
    assert (await box.command(f"kill -9 {pid}")).count == 0


@check
async def what_a_child_in_the_background_prints_stays_with_its_command(bench: Bench) -> None:
    box = await bench.box()
    id = await box.order("(sleep 1.5; echo from behind) & echo at once")
    assert (await box.over(id)).text() == "at once\n"
    await box.until(lambda: box.said(id) == "at once\nfrom behind\n")


@check
async def a_command_may_print_any_bytes(bench: Bench) -> None:
    box = await bench.box()
    done = await box.command(r"printf 'a\377\000b'")
    assert done.count == 0 and done.text() == "a\\xff\x00b"


@check
async def kernel_and_commands_share_a_working_folder(bench: Bench) -> None:
    box = await bench.box()
    await box.run("open('from-kernel.txt', 'w').write('hello')")
    assert (await box.command("cat from-kernel.txt")).text() == "hello"


# -- files ----------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def there_and_back(bench: Bench, data: bytes, remote: str) -> Box:
    """Put a file, see it in the kernel, get it again."""
    box = await bench.box()
    local, again = bench.harness.folder / "there", bench.harness.folder / "back"
    local.write_bytes(data)
    await box.sandbox.put(local, remote)
    seen = f"__import__('hashlib').sha256(open({remote!r}, 'rb').read()).hexdigest()"
    assert await box.value(seen) == digest(data)
    await box.sandbox.get(remote, again)
    assert digest(again.read_bytes()) == digest(data)
    return box


@check
async def fifty_megabytes_go_there_and_back(bench: Bench) -> None:
    await there_and_back(bench, os.urandom(1 << 20) * 50, "big.bin")


@check
async def an_empty_file_goes_there_and_back(bench: Bench) -> None:
    await there_and_back(bench, b"", "empty")


@check
async def every_byte_goes_there_and_back(bench: Bench) -> None:
    await there_and_back(bench, bytes(range(256)) * 3 + b"\r\n\n\r", "bytes.bin")


@check
async def names_may_have_spaces_and_any_letters(bench: Bench) -> None:
    for name in ("with space.txt", "größe 漢字 🧪.txt", "quote'\"$x.txt", "-dash"):
        await there_and_back(bench, name.encode(), name)


@check
async def missing_folders_are_made(bench: Bench) -> None:
    box = await there_and_back(bench, b"deep", "a/b c/d/file.txt")
    local = bench.harness.folder / "new" / "deep.txt"
    await box.sandbox.get("a/b c/d/file.txt", local)
    assert local.read_bytes() == b"deep"


@check
async def a_file_is_replaced_as_a_whole(bench: Bench) -> None:
    await there_and_back(bench, b"long " * 1000, "again.txt")
    box = await there_and_back(bench, b"short", "again.txt")
    names = await box.value("__import__('os').listdir('.')")
    assert not [name for name in names if name.endswith(".part")]


WATCH = """
import os, time
seen = set()
while not os.path.exists('enough'):
    with open('watched', 'rb') as file:
        data = file.read()
    seen.add((data[:1].decode(), len(set(data)), len(data)))
    if not os.path.exists('watching'):
        open('watching', 'x').close()
os.unlink('enough')
print(sorted(seen))
"""


@check
async def a_reader_never_sees_part_of_a_file(bench: Bench) -> None:
    box = await bench.box()
    size = 3_000_000
    contents = [bench.harness.folder / "a", bench.harness.folder / "b"]
    for path in contents:
        path.write_bytes(path.name.encode() * size)
    await box.sandbox.put(contents[0], "watched")
    (id,) = await box.submit(WATCH)
    await box.command("until test -e watching; do sleep 0.02; done")
    for i in range(40):
        await box.sandbox.put(contents[i % 2], "watched")
    await box.sandbox.put(contents[0], "enough")
    assert set(eval((await box.over(id)).text())) <= {("a", 1, size), ("b", 1, size)}


@check
async def a_program_stays_a_program(bench: Bench) -> None:
    box = await bench.box()
    local = bench.harness.folder / "script.sh"
    local.write_text("#!/bin/sh\necho it runs\n")
    local.chmod(0o755)
    await box.sandbox.put(local, "script.sh")
    assert (await box.command("./script.sh")).text() == "it runs\n"
    await box.sandbox.get("script.sh", local)
    assert os.access(local, os.X_OK)
    local.chmod(0o600)
    await box.sandbox.put(local, "plain.sh")
    assert (await box.command("test -x plain.sh")).count == 1


@check
async def a_missing_file_is_named(bench: Bench) -> None:
    box = await bench.box()
    local = bench.harness.folder / "kept"
    local.write_text("as it was")
    await refused(box.sandbox.get("not-there.txt", local), BadInput, "not-there.txt")
    assert local.read_text() == "as it was"
    await refused(box.sandbox.put(bench.harness.folder / "nowhere", "x"), NotFound, "nowhere")


@check
async def a_folder_is_no_file(bench: Bench) -> None:
    box = await bench.box()
    await box.run("import os\nos.makedirs('folder', exist_ok=True)\nopen('file', 'w').close()")
    local = bench.harness.folder / "small"
    local.write_text("x")
    await refused(box.sandbox.get("folder", bench.harness.folder / "out"), BadInput, "folder")
    await refused(box.sandbox.put(local, "folder"), BadInput, "folder")
    await refused(box.sandbox.put(local, "file/below"), BadInput, "file")
    await refused(box.sandbox.put(bench.harness.folder, "x"), BadInput, "not a file")
    await refused(box.sandbox.get("file", bench.harness.folder), BadInput, "folder")


@check
async def no_path_leads_out(bench: Bench) -> None:
    box = await bench.box()
    local = bench.harness.folder / "small"
    local.write_text("x")
    await box.run("import os\nos.path.lexists('way-out') or os.symlink('/', 'way-out')")
    for path in ("../out.txt", "/etc/out-of-contract", "a/../../out.txt", "way-out/tmp/out.txt"):
        await refused(box.sandbox.put(local, path), BadInput, "leads out")
    for path in ("../../../etc/hostname", "/etc/passwd", "way-out/etc/passwd"):
        with pytest.raises(BadInput, match="leads out"):
            await box.sandbox.get(path, bench.harness.folder / "stolen")
    assert not (bench.harness.folder / "stolen").exists()


@check
async def the_notebook_is_not_overwritten(bench: Bench) -> None:
    box = await bench.box()
    local = bench.harness.folder / "small"
    local.write_text("x")
    (notebook,) = box.place.protected
    await refused(box.sandbox.put(local, notebook.name), BadInput, "notebook")


@check
async def a_host_writes_and_appends(bench: Bench) -> None:
    box = await bench.box()
    for append in (False, True, True):
        await box.link.request("write_file", path="log.txt", data="YWI=", append=append)
    assert await box.value("open('log.txt').read()") == "ababab"


@check
async def a_host_reads_in_pieces(bench: Bench) -> None:
    box = await bench.box()
    await box.run("open('pieces', 'wb').write(bytes(range(200)))")
    answer = await box.link.request("read_file", path="pieces", offset=100, limit=3)
    assert answer["size"] == 200 and answer["data"] == "ZGVm"
    await refused(box.link.request("read_file", path="no/such"), SeerError, "no/such")


@check
async def a_host_does_not_leave_its_folder(bench: Bench) -> None:
    box = await bench.box()
    for op, more in (("read_file", {}), ("write_file", {"data": ""}), ("list_files", {})):
        await refused(box.link.request(op, path="../..", **more), SeerError, "leads out")


# -- the end --------------------------------------------------------------------------------------


@check
async def an_end_can_be_repeated(bench: Bench) -> None:
    box = await bench.corpse()
    await box.sandbox.terminate()
    await box.sandbox.terminate()
    await bench.gone(box)


@check
async def two_may_end_it_at_once_while_a_cell_runs(bench: Bench) -> None:
    box = await bench.start()
    (id,) = await box.submit("import time\nprint('on', flush=True)\ntime.sleep(60)")
    await box.until(lambda: "on" in box.said(id))
    found = await bench.harness.backend.find(box.record)
    assert found is not None
    await asyncio.gather(box.sandbox.terminate(), box.sandbox.terminate(), found.terminate())
    await box.link.close()
    await bench.gone(box)


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        os.execve('/bin/sleep', {argv!r}, {env})
    os._exit(0)
"""


@check
async def what_was_left_running_ends_with_the_sandbox(bench: Bench) -> None:
    box = await bench.start()
    await box.command(f"nohup setsid {SLEEPS[0]} >/dev/null 2>&1 & {SLEEPS[1]} &")
    await box.run(
        "".join(DAEMON.format(argv=SLEEPS[2].split(), env=env) for env in ("os.environ", "{}"))
    )
    counted = await box.command(f"ps -eo args | grep -c '^sleep {NUMBER}'")
    assert int(counted.text()) >= 4
    assert len(await bench.harness.left(box.place.handle)) >= 4
    await box.end()
    await bench.gone(box)


@check
async def the_death_of_a_host_is_seen_and_leaves_nothing(bench: Bench) -> None:
    box = await bench.start()
    await box.command(f"nohup setsid {SLEEPS[0]} >/dev/null 2>&1 &")
    (id,) = await box.submit("import time\nprint('on', flush=True)\ntime.sleep(60)")
    await box.until(lambda: "on" in box.said(id))
    await bench.harness.kill_host(box.sandbox)
    assert await box.until(lambda: box.gone) == "its host is gone"
    assert await bench.harness.backend.find(box.record) is None
    await refused(box.status(), SandboxUnreachable, "gone")
    await refused(box.sandbox.put(Path(__file__), "x"), SandboxUnreachable)
    await bench.harness.backend.clear(box.place.handle)
    await bench.gone(box)
    if not bench.harness.lacks.get("last words"):
        journal = await left_behind(bench, box)
        assert [e["text"] for e in journal if e.get("run") == id and e["type"] == "stream"] == [
            "on\n"
        ]
    await box.end()


async def left_behind(bench: Bench, box: Box) -> list[Event]:
    local = bench.harness.folder / "journal"
    journal = await bench.harness.backend.left_behind(box.record, local)
    assert journal is not None
    return [json.loads(line) for line in journal.read_bytes().splitlines()]


@check
async def the_journal_of_an_ended_sandbox_can_be_read(bench: Bench) -> None:
    box = await bench.corpse()
    journal = await left_behind(bench, box)
    assert [e["n"] for e in journal] == list(range(1, len(journal) + 1))
    assert journal[: len(box.events)] == box.events
    text = "".join(e["text"] for e in journal if e["type"] == "stream")
    assert text == "".join(f"line {i}\n" for i in range(200))
    assert journal[-1]["type"] == "closing"


@check
async def nothing_left_behind_is_an_answer(bench: Bench) -> None:
    box = await bench.corpse()
    place = bench.harness.place("c-never", "")
    never = {**box.record, "handle": "c-never", "folder": str(place.state_dir / "never")}
    assert await bench.harness.backend.left_behind(never, bench.harness.folder / "j") is None


@check
async def a_lifetime_ends_a_sandbox_that_works(bench: Bench) -> None:
    box = await bench.start(lifetime=3)
    (id,) = await box.submit("import time\ntime.sleep(60)")
    await box.until(lambda: box.gone)
    assert (await box.over(id)).state == "expired"
    assert "lifetime" in box.events[-1]["why"]
    await bench.gone(box)
    await box.link.close()


@check
async def the_end_of_a_sandbox_can_be_moved(bench: Bench) -> None:
    box = await bench.start(lifetime=4)
    first = await box.status()
    assert first["end_at"] <= first["now"] + 4 and first["idle_limit"] > 0
    moved = await box.link.request("extend", lifetime=600, idle_limit=1234)
    assert moved["end_at"] > first["end_at"] + 500 and moved["idle_limit"] == 1234
    (id,) = await box.submit("import time\ntime.sleep(60)")
    while (now := await box.status())["now"] < first["end_at"] + 1.5:
        await asyncio.sleep(0.1)
    assert now["active"] == id and now["end_at"] == moved["end_at"] and box.gone is None
    await box.link.request("extend", end_at=now["now"] + 1)
    await box.until(lambda: box.gone)
    assert (await box.over(id)).state == "expired"
    await bench.gone(box)
    await box.link.close()


@check
async def an_end_that_makes_no_sense_is_refused(bench: Bench) -> None:
    box = await bench.box()
    before = await box.status()
    for wrong in ({}, {"lifetime": 0}, {"idle_limit": -1}, {"lifetime": float("nan")}):
        await refused(box.link.request("extend", **wrong), SeerError, "above 0")
    await refused(box.link.request("extend", end_at=before["now"] - 60), SeerError, "past")
    after = await box.status()
    assert [after[k] for k in ("end_at", "idle_limit")] == [
        before[k] for k in ("end_at", "idle_limit")
    ]


@check
async def an_unused_sandbox_ends_and_a_used_one_does_not(bench: Bench) -> None:
    idle, used, busy = await asyncio.gather(*(bench.start(idle_limit=3) for _ in range(3)))

    async def use() -> None:
        while True:
            await used.link.request("touch")
            await asyncio.sleep(0.2)

    using = asyncio.create_task(use())
    (id,) = await busy.submit("import time\ntime.sleep(60)")
    while not idle.gone:
        with suppress(SandboxUnreachable):  # what programs say to each other is no use
            await idle.link.request("status")
        await asyncio.sleep(0.1)
    assert "idle" in idle.events[-1]["why"]
    await bench.gone(idle)
    assert (await used.status())["kernel"] == "ready" and used.gone is None
    assert (await busy.status())["active"] == id
    using.cancel()
    await asyncio.wait([using])
    await asyncio.gather(*(box.end() for box in (idle, used, busy)))


# -- sweep and clear ------------------------------------------------------------------------------


@check
async def a_sweep_names_what_runs_without_a_record(bench: Bench) -> None:
    box = await bench.box()
    records = {r["handle"]: r for r in await bench.harness.backend.sweep("")}
    assert box.place.handle in records
    found = await bench.harness.backend.find(records[box.place.handle])
    assert found is not None
    async with Stream(found) as stream:
        assert (await stream.ask("status"))["kernel"] == "ready"


@check
async def a_sweep_does_not_name_what_has_ended(bench: Bench) -> None:
    box = await bench.corpse()
    assert box.place.handle not in {r["handle"] for r in await bench.harness.backend.sweep("")}


@check
async def a_sweep_is_for_one_owner(bench: Bench) -> None:
    box = await bench.box()
    mine = {r["handle"] for r in await bench.harness.backend.sweep("contract")}
    theirs = {r["handle"] for r in await bench.harness.backend.sweep("somebody else")}
    assert box.place.handle in mine and box.place.handle not in theirs


@check
async def a_sweep_names_nothing_of_another_state_folder(bench: Bench) -> None:
    box = await bench.box()
    assert box.place.handle not in {r["handle"] for r in await bench.harness.other.sweep("")}


@check
async def a_sweep_names_what_a_killed_host_left(bench: Bench) -> None:
    box = await bench.start()
    await box.command(f"nohup setsid {SLEEPS[0]} >/dev/null 2>&1 &")
    await bench.harness.kill_host(box.sandbox)
    await box.until(lambda: box.gone)
    await box.link.close()
    if await bench.harness.left(box.place.handle):
        (record,) = [
            r for r in await bench.harness.backend.sweep("") if r["handle"] == box.place.handle
        ]
        assert await bench.harness.backend.find(record) is None
    await bench.harness.backend.clear(box.place.handle)
    await bench.gone(box)


@check
async def to_clear_an_unknown_handle_is_harmless(bench: Bench) -> None:
    box = await bench.box()
    await bench.harness.backend.clear("c-never-was")
    assert await box.value("1") == 1


@check
async def clear_ends_a_handle_and_only_for_its_own_state_folder(bench: Bench) -> None:
    box = await bench.start()
    await bench.harness.other.clear(box.place.handle)
    assert (await box.status())["kernel"] == "ready"
    await bench.harness.backend.clear(box.place.handle)
    await box.until(lambda: box.gone)
    await bench.gone(box)
    await box.link.close()


# -- limits ---------------------------------------------------------------------------------------

MANY = """
import os, time
pids, why = [], ''
for _ in range(200):
    try:
        pid = os.fork()
    except OSError as error:
        why = type(error).__name__
        break
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    pids.append(pid)
for pid in pids: os.kill(pid, 9)
for pid in pids: os.waitpid(pid, 0)
print(len(pids), why)
"""


@check
async def limits_are_told(bench: Bench) -> None:
    box = await bench.box()
    limits = (await box.status())["limits"]
    assert limits["means"] and {"memory", "processes"} <= limits.keys()


@check
async def forks_fail_at_the_limit_and_not_before(bench: Bench) -> None:
    bench.needs("processes")
    box = await bench.start(processes=64)
    count, why = (await box.run(MANY)).text().split()
    assert why == "BlockingIOError" and 20 < int(count) < 64
    assert await box.value("6 * 7") == 42
    assert (await box.status())["limits"]["processes"] == 64
    await box.end()
    await bench.gone(box)


@check
async def a_cell_that_takes_too_much_memory_ends_alone(bench: Bench) -> None:
    bench.needs("memory")
    box, other = await bench.start(memory=300), await bench.box()
    (beside,) = await other.submit("import time\ntime.sleep(1.5)\nprint('untouched')")
    done = await box.run("print('before')\nx = bytearray(b'x') * 1_000_000_000")
    assert done.state in ("kernel_died", "error") and "emory" in str(done)
    if done.state == "kernel_died":
        await box.link.request("restart", timeout=60)
    assert await box.value("6 * 7") == 42
    assert (await other.over(beside)).text() == "untouched\n"
    await box.end()
    await bench.gone(box)


REACH = """
import socket
try:
    socket.create_connection(('%s', %d), timeout=2).close()
    print('reached')
except OSError as error:
    print('shut out')
"""


@check
async def the_network_can_be_shut_out(bench: Bench) -> None:
    bench.needs("network")
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0)
    # A machine elsewhere does not reach this one: its harness names an address that all reach.
    address = getattr(bench.harness, "public", None) or server.sockets[0].getsockname()
    box = await bench.start(network=False)
    try:
        assert (await box.run(REACH % address)).text() == "shut out\n"
        assert "shut out" in (await box.command(f'python -c "{REACH % address}"')).text()
        other = await bench.box()
        assert (await other.run(REACH % address)).text() == "reached\n"
    finally:
        server.close()
        await box.end()
