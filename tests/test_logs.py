"""Logs, audit and spans: what is written, what never is, and what happens when it cannot be."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp import Client
from mcp.client.stdio import stdio_client
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from seer_mcp import logs
from seer_mcp.audit import Audit
from seer_mcp.logs import Log, prune
from seer_mcp.observe import Observer, current_call
from seer_mcp.redact import Redactor

from .faults.ground import ERAS, TOKEN, ground, http_server, raw_server, raw_start
from .support import Lab, open_lab, stdio_parameters, until

SOURCE, OUTPUT, SECRET = "canary_in_source", "CANARY-PUT-OUT", "canary-of-the-environment"


def lines_of(*paths: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def log_lines(folder: Path, event: str = "") -> list[dict[str, Any]]:
    found = lines_of(*sorted((folder / "state" / "logs").glob("*.jsonl")))
    return [line for line in found if event in ("", line["event"])]


def audit_lines(folder: Path, event: str = "") -> list[dict[str, Any]]:
    return [
        line for line in lines_of(folder / "state" / "audit.jsonl") if event in ("", line["event"])
    ]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Path]:
    """A file system of its own that is soon full; needs root."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)], capture_output=True
    )
    if done.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(folder: Path) -> Path:
    """Use up the last byte of a file system; remove the file to free it."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"\0" * 4096)
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


# -- one sandbox for what a server notes ------------------------------------------------------


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    yield exporter
    provider.shutdown()


@pytest.fixture(scope="module")
async def noted(
    tmp_path_factory: pytest.TempPathFactory,
    spans: InMemorySpanExporter,
    anyio_backend: str,
) -> AsyncIterator[tuple[Lab, str]]:
    folder = tmp_path_factory.mktemp("noted")
    async with open_lab(folder, audit_code=40) as lab:
        yield lab, await lab.start(name="noted")


@pytest.mark.anyio
async def test_a_call_and_its_run_are_one_line_each(noted: tuple[Lab, str]) -> None:
    lab, sandbox = noted
    result = await lab.cell(sandbox, f"{SOURCE} = 1\nprint('{OUTPUT}')")
    call = log_lines(lab.folder, "call")[-1]
    run = next(r for r in log_lines(lab.folder, "run") if r["run"] == call["runs"][0])
    assert (call["tool"], call["outcome"], call["owner"]) == ("create_cell", "ok", "local")
    assert call["sandbox"] == run["sandbox"] == sandbox
    assert call["call"] == run["call"]
    assert call["client"].startswith("mcp ")
    assert call["characters"] == sum(len(b.text) for b in result.content if b.type == "text")
    assert (run["state"], run["kind"], run["output_bytes"]) == ("complete", "cell", len(OUTPUT) + 1)
    assert 0 < run["seconds"] * 1000 <= call["ms"] + 1
    assert run["cell"] == result.meta["seer/run"]["cell"]


@pytest.mark.anyio
async def test_the_log_has_no_source_and_no_output(noted: tuple[Lab, str]) -> None:
    lab, sandbox = noted
    await lab.cell(sandbox, f"{SOURCE} = 1\nprint('{OUTPUT}')")
    await lab.ok("run_command", sandbox=sandbox, command=f"echo {OUTPUT}; : {SOURCE}")
    await lab.no("run_cell", sandbox=sandbox, cells=f"print('{SOURCE}')")
    await lab.no("edit_cell", sandbox=sandbox, cell=SOURCE + "()", source=SOURCE)
    await lab.no("start_sandbox", fantasy=SOURCE)
    text = "".join(p.read_text() for p in (lab.folder / "state" / "logs").iterdir())
    assert OUTPUT not in text and SOURCE not in text
    assert text.count('"event": "call"') >= 5
    audit = (lab.folder / "state" / "audit.jsonl").read_text()
    assert f"echo {OUTPUT}; : {SOURCE}"[:40] in audit  # the audit says what was run,
    assert "fantasy" not in audit  # but keeps no argument that is none


@pytest.mark.anyio
async def test_failures_and_cancelled_calls_are_told_apart(noted: tuple[Lab, str]) -> None:
    lab, sandbox = noted
    await lab.no("stop_sandbox", sandbox="nobody-000000")
    assert log_lines(lab.folder, "call")[-1]["outcome"] == "error"
    await lab.no("no_such_tool")
    assert log_lines(lab.folder, "call")[-1]["tool"] == "no_such_tool"
    with anyio.move_on_after(1.0):
        await lab.cell(sandbox, "import time; time.sleep(2)")
    await until(lambda: log_lines(lab.folder, "call")[-1]["outcome"] == "cancelled")
    call = log_lines(lab.folder, "call")[-1]
    answer = audit_lines(lab.folder, "answer")[-1]
    assert answer["call"] == call["call"] and answer["outcome"] == "cancelled"
    # The run goes on without its call, and is noted when it ends.
    await until(lambda: [r for r in log_lines(lab.folder, "run") if r["run"] == call["runs"][0]])


@pytest.mark.anyio
async def test_files_are_private(noted: tuple[Lab, str]) -> None:
    lab, _ = noted
    state = lab.folder / "state"
    assert mode(state / "logs") == 0o700
    assert {mode(p) for p in (state / "logs").iterdir()} == {0o600}
    assert mode(state / "audit.jsonl") == 0o600


@pytest.mark.anyio
async def test_the_audit_says_what_was_run_where(noted: tuple[Lab, str]) -> None:
    lab, sandbox = noted
    code = "print('what was run') # " + "long " * 20
    await lab.cell(sandbox, code)
    call = audit_lines(lab.folder, "call")[-1]
    run = audit_lines(lab.folder, "run")[-1]
    over = audit_lines(lab.folder, "run_over")[-1]
    digest = hashlib.sha256(code.encode()).hexdigest()
    assert call["tool"] == "create_cell" and call["owner"] == "local" and call["pid"] == os.getpid()
    assert call["arguments"]["source"] == {"sha256": digest, "bytes": len(code)}
    assert (run["sha256"], run["bytes"]) == (digest, len(code))
    assert run["code"] == code[:40] and run["cut"] is True
    assert run["call"] == call["call"] and run["run"] == over["run"]
    assert run["notebook"] == str(await lab.notebook_path(sandbox))
    assert over["state"] == "complete"
    before = len(audit_lines(lab.folder))
    await lab.ok("read_notebook", sandbox=sandbox)
    await lab.ok("list_sandboxes")
    assert len(audit_lines(lab.folder)) == before  # reading changes nothing


@pytest.mark.anyio
async def test_a_command_is_audited_with_its_exit_code(noted: tuple[Lab, str]) -> None:
    lab, sandbox = noted
    await lab.no("run_command", sandbox=sandbox, command="exit 3")
    run, over = audit_lines(lab.folder, "run")[-1], audit_lines(lab.folder, "run_over")[-1]
    assert run["code"] == "exit 3" and run["kind"] == "command" and "cut" not in run
    assert over["run"] == run["run"] and over["exit_code"] == 3 and over["state"] == "error"


@pytest.mark.anyio
async def test_a_command_that_could_not_be_started_is_audited_as_not_run(
    noted: tuple[Lab, str],
) -> None:
    lab, sandbox = noted
    await lab.no("run_command", sandbox=sandbox, command="echo " + "x" * 3_000_000)
    run, over = audit_lines(lab.folder, "run")[-1], audit_lines(lab.folder, "run_over")[-1]
    assert over["run"] == run["run"] and over["state"] == "not_run"


@pytest.mark.anyio
async def test_an_audit_that_cannot_be_written_is_said_in_the_answer(
    noted: tuple[Lab, str], caplog: pytest.LogCaptureFixture
) -> None:
    lab, sandbox = noted
    path, aside = lab.folder / "state" / "audit.jsonl", lab.folder / "state" / "audit-aside.jsonl"
    path.rename(aside)
    path.mkdir()
    told = await lab.ok("create_cell", sandbox=sandbox, source="41 + 1")
    assert "42" in told
    assert "NOTE: this call could not be written to the audit file (Is a directory)" in told
    assert "NOTE" not in await lab.ok("read_notebook", sandbox=sandbox)
    path.rmdir()
    assert "NOTE" not in await lab.ok("create_cell", sandbox=sandbox, source="1")
    first, second = audit_lines(lab.folder)[:2]
    assert first["event"] == "lost" and first["lines"] == 4  # call, run, run_over, answer
    assert second["event"] == "call"
    assert log_lines(lab.folder, "audit_not_written")[-1]["lines"] == 4
    assert [r for r in caplog.records if "audit_not_written" in r.getMessage()]


@pytest.mark.anyio
async def test_a_task_that_outlives_its_call_works_in_nobodys_name(tmp_path: Path) -> None:
    observer = Observer(tmp_path, 0)
    over = asyncio.Event()

    async def later() -> None:
        assert current_call() is call
        await over.wait()
        assert current_call() is None

    about: dict[str, Any] = {"known": frozenset(), "changes": False, "owner": "o", "client": None}
    with observer.call("start_sandbox", {}, **about) as call:
        task = asyncio.create_task(later())
        await asyncio.sleep(0)
    over.set()
    await task


# -- spans ------------------------------------------------------------------------------------


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


@pytest.mark.anyio
async def test_a_run_has_a_span_of_its_own_linked_to_its_call(
    noted: tuple[Lab, str], spans: InMemorySpanExporter
) -> None:
    lab, sandbox = noted
    spans.clear()
    result = await lab.cell(sandbox, f"import time; time.sleep(1); print('{OUTPUT}')", wait=0.1)
    assert result.meta["seer/run"]["state"] == "running"
    (call,) = [s for s in named(spans, "tools/call create_cell") if s.attributes]
    assert not named(spans, "run cell")  # it still runs
    (run,) = await until(lambda: named(spans, "run cell"))
    assert call.attributes and run.attributes
    assert run.parent is None  # a trace of its own: the call's is complete long before
    assert [link.context.span_id for link in run.links] == [call.get_span_context().span_id]
    assert [link.context.trace_id for link in run.links] == [call.get_span_context().trace_id]
    assert run.attributes["seer.run.state"] == "complete"
    assert run.attributes["seer.sandbox"] == call.attributes["seer.sandbox"] == sandbox
    assert list(call.attributes["seer.run.ids"]) == [run.attributes["seer.run.id"]]  # type: ignore[arg-type]
    assert run.attributes["seer.call.id"] == call.attributes["seer.call.id"]
    assert call.attributes["gen_ai.tool.name"] == "create_cell"
    assert call.attributes["user.id"] == "local"
    assert run.start_time and run.end_time and call.end_time
    assert run.end_time - run.start_time >= 1_000_000_000
    assert run.end_time > call.end_time
    everything = json.dumps([json.loads(s.to_json()) for s in spans.get_finished_spans()])
    assert OUTPUT not in everything and "time.sleep" not in everything


@pytest.mark.anyio
async def test_the_span_of_a_failed_run_is_an_error(
    noted: tuple[Lab, str], spans: InMemorySpanExporter
) -> None:
    lab, sandbox = noted
    spans.clear()
    await lab.no("run_command", sandbox=sandbox, command="exit 3")
    (run,) = await until(lambda: named(spans, "run command"))
    assert run.attributes and run.attributes["error.type"] == "error"
    assert run.attributes["process.exit.code"] == 3
    assert run.status.status_code is trace.StatusCode.ERROR
    (call,) = named(spans, "tools/call run_command")  # the SDK's one, not a second of ours
    assert call.attributes and call.attributes["seer.outcome"] == "error"


@pytest.mark.anyio
async def test_spans_are_sent_before_the_server_ends(tmp_path: Path) -> None:
    """Also those that a batching SDK would have sent some seconds later."""
    code = (
        "import sys\n"
        "from opentelemetry import trace\n"
        "from opentelemetry.sdk.trace import TracerProvider\n"
        "from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter\n"
        "provider = TracerProvider()\n"
        "file = open(sys.argv[1], 'w')\n"
        "provider.add_span_processor(BatchSpanProcessor(ConsoleSpanExporter(out=file)))\n"
        "trace.set_tracer_provider(provider)\n"
        "from seer_mcp.cli import main\n"
        "main(sys.argv[2:])\n"
    )
    usual = stdio_parameters(tmp_path)
    arguments = ["-c", code, str(tmp_path / "spans"), *usual.args[2:]]
    async with Client(usual.model_copy(update={"args": arguments})) as client:
        assert (await client.call_tool("no_such_tool", {})).is_error
    assert "tools/call no_such_tool" in (tmp_path / "spans").read_text()


# -- the files themselves ---------------------------------------------------------------------


@pytest.mark.anyio
async def test_each_server_has_a_file_of_its_own(tmp_path: Path) -> None:
    first, second = Observer(tmp_path, 0), Observer(tmp_path, 0)
    first.open()
    second.open()
    await second.close()
    await first.close()
    files = sorted((tmp_path / "logs").iterdir())
    assert len(files) == 2
    for file in files:
        assert [line["event"] for line in lines_of(file)] == ["server_started", "server_ended"]
        assert len({line["server"] for line in lines_of(file)}) == 1


def test_old_files_go_and_those_of_living_servers_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "PART_BYTES", 2000)
    monkeypatch.setattr(logs, "TOTAL_BYTES", 20_000)
    living = Log(tmp_path, "living")
    living.open()
    living.write("here", number=-1)
    oldest = next(iter(tmp_path.iterdir()))
    busy = Log(tmp_path, "busy")
    busy._began = "99990101T000000Z"  # type: ignore[attr-defined]
    busy.open()
    for number in range(500):
        busy.write("busy", number=number)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    kept = [line["number"] for line in lines_of(*sorted(tmp_path.glob("9999*")))]
    assert total < 20_000 + 2 * 2000 + 500
    assert kept == list(range(kept[0], 500)) and kept[0] > 100  # the newest, without a gap
    assert oldest.exists()
    living.write("here", number=1)
    assert [line["number"] for line in lines_of(oldest)] == [-1, 1]
    living.close()
    prune(tmp_path)
    busy.close()
    assert oldest.exists() is False or sum(p.stat().st_size for p in tmp_path.iterdir()) <= 20_000


def test_at_most_so_many_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "FILES", 5)
    for number in range(9):
        log = Log(tmp_path, f"s{number}")
        log.open()
        log.write("here")
        log.close()
    assert len(list(tmp_path.iterdir())) == 5
    assert any("-s8-" in path.name for path in tmp_path.iterdir())


def test_a_full_disk_costs_log_lines_and_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with small_disk(tmp_path / "logs", "64k") as folder:
        log = Log(folder, "full")
        log.open()
        log.write("before")
        filler = fill(folder)
        for number in range(60):  # the last page of the file takes some
            log.write("during", number=number)
        said = [r for r in caplog.records if "cannot be written" in r.getMessage()]
        assert len(said) == 1, "said once"
        lost = log.lost
        assert lost > 5
        filler.unlink()
        log.write("after")
        log.close()
        text = next(iter(folder.iterdir())).read_text().splitlines()
    whole: list[dict[str, Any]] = []
    torn = 0
    for line in text:
        try:
            whole.append(json.loads(line))
        except ValueError:
            torn += 1
    assert [line["event"] for line in whole][-2:] == ["lost", "after"]
    assert whole[-2]["lines"] == lost
    assert torn <= 1
    assert len([line for line in whole if line["event"] == "during"]) + lost == 60


def test_a_full_disk_under_the_audit_is_counted(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "64k") as folder:
        log = Log(tmp_path / "logs", "full")
        audit = Audit(folder / "audit.jsonl", "full", 100, log)
        assert audit.add("before") == ""
        filler = fill(folder)
        answers = [audit.add("during", number=n) for n in range(60)]
        assert answers[-1] == "No space left on device"
        lost = sum(1 for answer in answers if answer)
        assert audit.lost == lost
        filler.unlink()
        assert audit.add("after") == ""
        whole = []
        for line in (folder / "audit.jsonl").read_text().splitlines():
            try:
                whole.append(json.loads(line))
            except ValueError:
                continue  # the one that the full disk cut
    assert [line["event"] for line in whole][-2:] == ["lost", "after"]
    assert whole[-2]["lines"] == lost
    assert len([line for line in whole if line["event"] == "during"]) + lost == 60


def test_several_servers_add_to_one_audit_file(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from seer_mcp.audit import Audit; from seer_mcp.logs import Log\n"
        "audit = Audit(Path(sys.argv[1]), sys.argv[2], 10, Log(Path(sys.argv[1]).parent, 'x'))\n"
        "bad = [n for n in range(1200) if audit.add('line', number=n, pad='x' * 9000)]\n"
        "sys.exit(bool(bad))"
    )
    path = tmp_path / "audit.jsonl"
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), str(n)]) for n in range(3)]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    lines = lines_of(path)
    for n in range(3):
        assert [x["number"] for x in lines if x["server"] == str(n)] == list(range(1200))


def test_a_server_that_was_stopped_in_the_middle_of_a_line_holds_no_other_up(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, "x", 10, Log(tmp_path / "logs", "x"))
    with path.open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        began = time.monotonic()
        assert audit.add("line") == ""
        assert time.monotonic() - began < 5
    assert [line["event"] for line in lines_of(path)] == ["line"]


def test_the_audit_file_may_be_moved_away_and_is_no_link(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = Audit(path, "x", 10, Log(tmp_path / "logs", "x"))
    audit.add("one")
    path.rename(tmp_path / "audit-old.jsonl")
    audit.add("two")
    assert [line["event"] for line in lines_of(tmp_path / "audit-old.jsonl")] == ["one"]
    assert [line["event"] for line in lines_of(path)] == ["two"]
    path.unlink()
    victim = tmp_path / "victim"
    victim.write_text("untouched\n")
    path.symlink_to(victim)
    assert audit.add("three") != ""
    assert victim.read_text() == "untouched\n"


def test_warnings_of_libraries_are_kept_without_their_texts(tmp_path: Path) -> None:
    log = Log(tmp_path, "x")
    log.open()
    try:
        raise ValueError(SECRET)
    except ValueError:
        logging.getLogger("a.library").exception("it got %s", SECRET)
    log.close()
    (line,) = [x for x in lines_of(next(iter(tmp_path.iterdir()))) if x["event"] == "library"]
    assert line["level"] == "error"
    assert line["where"].startswith("a.library at test_logs.py:")
    assert line["error"].startswith("ValueError at test_logs.py:")
    assert SECRET not in json.dumps(line)


@pytest.mark.anyio
async def test_what_the_system_refuses_is_one_sentence_for_the_client_and_a_traceback_in_the_log(
    tmp_path: Path,
) -> None:
    async with open_lab(tmp_path) as lab:
        sandboxes = tmp_path / "state" / "sandboxes"
        sandboxes.rmdir()
        sandboxes.write_text("")
        said = await lab.no("list_sandboxes")
        assert said.startswith("This could not be done (File exists: ") and str(sandboxes) in said
        (line,) = log_lines(tmp_path, "refused")
        assert line["tool"] == "list_sandboxes" and line["level"] == "error"
        assert line["error"].startswith("FileExistsError File exists at ")
        assert "holdings.py:" in line["error"] and "files.py:" in line["error"]
        (called,) = log_lines(tmp_path, "call")
        assert (called["call"], called["outcome"]) == (line["call"], "error")
        sandboxes.unlink()
        assert "0 running" in await lab.ok("list_sandboxes")


@pytest.mark.anyio
async def test_an_outputs_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    async with open_lab(tmp_path, outputs_dir=tmp_path / "file" / "outputs") as lab:
        (line,) = log_lines(tmp_path, "folder_not_made")
        assert line["level"] == "warning" and line["why"] == "Not a directory"
        assert str(tmp_path / "file") in await lab.no("start_sandbox", name="nowhere")


# -- processes --------------------------------------------------------------------------------


def test_a_killed_server_leaves_an_audit_of_what_it_began(tmp_path: Path) -> None:
    with ground(tmp_path) as here:
        with raw_server(here) as server:
            sandbox = raw_start(server, name="killed")
            server.call("create_cell", sandbox=sandbox, source="x = 1", wait=0)
            source = "import time; time.sleep(1.5); x + 41"
            server.call("create_cell", sandbox=sandbox, source=source, wait=0.1)
            os.killpg(server.process.pid, signal.SIGKILL)
        begun = audit_lines(tmp_path, "run")[-1]
        assert begun["code"] == source
        assert begun["run"] not in [x["run"] for x in audit_lines(tmp_path, "run_over")]
        with raw_server(here) as server:
            server.call("read_outputs", sandbox=sandbox)
            server.call("stop_sandbox", sandbox=sandbox)
        over = [x for x in audit_lines(tmp_path, "run_over") if x["run"] == begun["run"]]
        assert {x["state"] for x in over} == {"complete"}
        assert over[0]["server"] != begun["server"]
        did = [(x["did"], x.get("why")) for x in audit_lines(tmp_path, "sandbox")]
        assert did == [
            ("started", None),
            ("found again", None),
            ("ended", "stopped by stop_sandbox"),
        ]


@pytest.mark.anyio
@pytest.mark.parametrize("era", ERAS)
async def test_over_http_the_client_is_named_and_its_token_is_not(tmp_path: Path, era: str) -> None:
    with ground(tmp_path) as here:
        async with http_server(here.config()) as endpoint, endpoint.lab(era) as lab:
            await lab.no("stop_sandbox", sandbox="nobody-000000")
        (call,) = log_lines(tmp_path, "call")
        (audited,) = audit_lines(tmp_path, "call")
    assert call["client"] == audited["client"] and call["client"].startswith("mcp ")
    assert call["owner"] == audited["owner"] == "local"
    kept = [*(tmp_path / "state" / "logs").iterdir(), tmp_path / "state" / "audit.jsonl"]
    assert not [path for path in kept if TOKEN in path.read_text()]


def test_no_source_output_or_secret_is_on_stderr_at_debug_level(tmp_path: Path) -> None:
    with ground(tmp_path) as here:
        with raw_server(here, "--log-level", "debug", env={"HF_TOKEN": SECRET}) as server:
            sandbox = raw_start(server, name="quiet")
            server.call("create_cell", sandbox=sandbox, source=f"{SOURCE} = 1; print('{OUTPUT}')")
            server.call("create_cell", sandbox=sandbox, source=7, fantasy=SOURCE)
            server.call("stop_sandbox", sandbox=sandbox)
            server.process.stdin.close()  # type: ignore[union-attr]
            server.ended_in(10)
        said = (tmp_path / "server.log").read_text()
        assert "call: tool='create_cell'" in said and "outcome='ok'" in said
        kept = "".join(p.read_text() for p in (tmp_path / "state" / "logs").iterdir())
        for text in (said, kept):
            assert SOURCE not in text and OUTPUT not in text and SECRET not in text


def test_libraries_say_no_more_than_warnings_and_no_text_of_an_exception() -> None:
    code = (
        "import logging, sys; from seer_mcp.logs import LOGGER, log_to_stderr\n"
        "from seer_mcp.redact import Redactor\n"
        "log_to_stderr('debug', Redactor()); library = logging.getLogger('mcp.server')\n"
        "library.debug('got canary'); library.info('got canary'); library.warning('careful')\n"
        "LOGGER.debug('ours')\n"
        "try: raise ValueError('canary')\n"
        "except ValueError: library.exception('it failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, third, places = done.stderr.splitlines()
    assert first.endswith("WARNING mcp.server: careful")
    assert second.endswith("DEBUG seer_mcp: ours")
    assert third.endswith("ERROR mcp.server: it failed")
    assert places == "ValueError at <string>:6"


def test_stderr_is_quiet_unless_asked(tmp_path: Path) -> None:
    with ground(tmp_path) as here:
        with raw_server(here) as server:
            sandbox = raw_start(server, name="quiet")
            server.call("create_cell", sandbox=sandbox, source="1 + 1")
            server.call("stop_sandbox", sandbox=sandbox)
        assert (tmp_path / "server.log").read_text() == ""


@pytest.mark.anyio
async def test_a_client_that_does_not_read_stderr_holds_nothing_up(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096)
    parameters = stdio_parameters(tmp_path, "--log-level", "debug")
    with os.fdopen(writing, "w") as errlog:
        async with Client(stdio_client(parameters, errlog=errlog)) as client:
            began = time.monotonic()
            async with asyncio.timeout(60):
                for _ in range(200):  # some 30 lines fill the pipe
                    assert (await client.call_tool("no_such_tool", {})).is_error
            assert time.monotonic() - began < 60
    os.close(reading)
    calls = [x for x in log_lines(tmp_path, "call") if x["tool"] == "no_such_tool"]
    assert len(calls) == 200


def test_values_of_secrets_are_in_no_log_and_no_audit(tmp_path: Path) -> None:
    redactor = Redactor({"HF_TOKEN": SECRET})
    observer = Observer(tmp_path, 40, redactor)
    observer.open(note=f"begins {SECRET}")
    arguments = {"name": f"{'x' * 190} {SECRET}", "source": SECRET}
    known = frozenset(arguments)
    with observer.call("t", arguments, known=known, changes=True, owner=SECRET, client=None):
        observer.audit.add("run", **observer.audit.code(f"{'y' * 30} {SECRET}"))
    observer.log.close()
    kept = "".join(p.read_text() for p in tmp_path.rglob("*.jsonl"))
    assert kept.count("[secret HF_TOKEN]") >= 3
    assert SECRET[:9] not in kept  # nor a part of it, where a text was cut
    code = (
        "import os, sys; from pathlib import Path\n"
        "from seer_mcp.logs import LOGGER, Log, log_to_stderr\n"
        "from seer_mcp.redact import Redactor\n"
        "log_to_stderr('debug', Redactor({'HF_TOKEN': sys.argv[1]}))\n"
        "LOGGER.warning('it is %s', sys.argv[1])\n"
        "log = Log(Path(sys.argv[2]), 'x', Redactor({'HF_TOKEN': sys.argv[1]}))\n"
        "log.write('cut', text='y' * 65 + ' ' + sys.argv[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, SECRET, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    direct, cut = done.stderr.splitlines()
    assert direct.endswith("it is [secret HF_TOKEN]")
    assert "y [secret HF_" in cut and SECRET[:6] not in cut
