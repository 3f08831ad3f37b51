"""Death of our own processes: nothing printed is lost, nothing runs twice, nothing is left for ever."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest

from ..support import processes_of, read_cells, stdio_parameters, streams, until
from .ground import Ground, RawServer, raw_server, raw_start, raw_text

pytestmark = pytest.mark.anyio

LINES = 200


def cell_with(server: RawServer, handle: str, source: str, wait: float = 45) -> dict[str, Any]:
    return server.call("create_cell", sandbox=handle, source=source, wait=wait)


def notebook_of(place: Ground, handle: str) -> Any:
    record = json.loads((place.folder / "state" / "sandboxes" / handle / "record.json").read_text())
    return Path(record["notebook"])


def killed_in_mid_cell(place: Ground, trials: int, seed: int) -> int:
    """Kill the server at random moments of 200-line cells; how many of all lines were lost.

    Each server looks after the run in which the one before it was killed.
    """
    moment = random.Random(seed)
    lost = seen = 0
    with raw_server(place) as server:
        handle = raw_start(server, name="kept")
        assert not cell_with(server, handle, "import time; executions = []").get("isError")
    path = notebook_of(place, handle)
    for trial in range(trials + 1):
        with raw_server(place) as server:
            if trial:
                found = looked_after(server, handle, path, trial - 1)
                seen += found is not None
                lost += found or 0
            if trial == trials:
                server.call("stop_sandbox", sandbox=handle)
                break
            source = (
                f"executions.append({trial})\n"
                f"for i in range({LINES}):\n    print('t{trial}', i)\n    time.sleep(0.004)\n"
                f"mark_{trial} = {trial}"
            )
            server.send(
                "tools/call", name="create_cell", arguments={"sandbox": handle, "source": source}
            )
            time.sleep(moment.uniform(0.02, 1.0))
            os.kill(server.process.pid, signal.SIGKILL)
            server.process.wait(10)
        nbformat.validate(nbformat.read(path, as_version=4))
    assert seen, "no trial got as far as a run"
    assert processes_of(handle) == []
    return lost


def looked_after(server: RawServer, handle: str, path: Path, trial: int) -> int | None:
    """How many lines of a trial are missing; None if the kernel never heard of it, which must be said."""
    server.call("list_sandboxes")
    begin = f"executions.append({trial})\n"
    written = [c["id"] for c in read_cells(path) if "".join(c["source"]).startswith(begin)]
    head = ""
    if written:
        result = server.call("read_outputs", sandbox=handle, cell=written[0])
        head = raw_text(result).splitlines()[0]
    if not written or "was not run" in head:
        answer = raw_text(cell_with(server, handle, f"{trial} in executions"))
        assert answer.endswith("False"), answer
        return None
    assert head.startswith(f"cell {written[0]}: complete"), head
    (saved,) = (c for c in read_cells(path) if c["id"] == written[0])
    assert saved["metadata"]["seer"]["state"] == "complete"
    expected = [f"t{trial} {i}" for i in range(LINES)]
    got = streams(saved).splitlines()
    missing = LINES - len(set(got) & set(expected))
    assert missing or got == expected
    check = f"assert executions.count({trial}) == 1 and mark_{trial} == {trial}; 'kept'"
    answer = cell_with(server, handle, check)
    assert not answer.get("isError"), raw_text(answer)
    return missing


def test_p01_a_killed_server_loses_no_line_and_runs_nothing_twice(place: Ground) -> None:
    assert killed_in_mid_cell(place, trials=3, seed=1) == 0


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_p01_a_hundred_kills(place: Ground) -> None:
    assert killed_in_mid_cell(place, trials=100, seed=2) == 0


async def test_p01_a_sandbox_whose_socket_was_taken_away_is_reached_again(place: Ground) -> None:
    """A logout removes XDG_RUNTIME_DIR, and what runs goes on."""
    with raw_server(place) as server:
        handle = raw_start(server)
        source = "import time\nx = 7\nfor i in range(30): print(i); time.sleep(.1)"
        cell_with(server, handle, source, wait=0)
        shutil.rmtree(place.sockets)
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    assert not place.sockets.exists()
    with raw_server(place) as server:
        await until(lambda: list(place.sockets.glob("*/*/host")), 10)
        result = server.call("read_outputs", sandbox=handle, wait=20)
        assert ": complete in" in raw_text(result)
        assert streams(read_cells(notebook_of(place, handle))[0]) == "".join(
            f"{i}\n" for i in range(30)
        )
        assert raw_text(cell_with(server, handle, "x")).endswith("7")
        assert {stat.S_IMODE(p.stat().st_mode) for p in place.sockets.glob("*/*")} == {0o700}
        restarted = server.call("restart_kernel", sandbox=handle)
        assert not restarted.get("isError"), raw_text(restarted)
        assert raw_text(cell_with(server, handle, "1 + 1")).endswith("2")
        server.call("stop_sandbox", sandbox=handle)
    assert processes_of(handle) == []
    assert list(place.sockets.glob("*/*")) == []


async def test_p03_sigterm_with_work_running_ends_the_server_and_not_the_work(
    place: Ground,
) -> None:
    with raw_server(place) as server:
        handle = raw_start(server)
        cell_with(
            server,
            handle,
            "import time\nfor i in range(20): print(i); time.sleep(.1)\n'end'",
            wait=0,
        )
        server.process.send_signal(signal.SIGTERM)
        took = server.ended_in(15)
        assert server.process.returncode == 0
        assert took < 5
    assert processes_of(handle)
    path = notebook_of(place, handle)
    nbformat.validate(nbformat.read(path, as_version=4))
    with raw_server(place) as server:
        result = server.call("read_outputs", sandbox=handle)
        assert ": complete in" in raw_text(result)
        assert streams(read_cells(path)[0]) == "".join(f"{i}\n" for i in range(20))


async def test_p03_sigterm_with_on_exit_stop_ends_the_sandbox_too(place: Ground) -> None:
    with raw_server(place, "--on-exit", "stop") as server:
        handle = raw_start(server)
        cell_with(server, handle, "print('begun', flush=True)\nwhile True: pass", wait=1)
        server.process.send_signal(signal.SIGTERM)
        took = server.ended_in(15)
        assert server.process.returncode == 0
        assert took < 5
    await until(lambda: not processes_of(handle), 10)
    (cell,) = read_cells(notebook_of(place, handle))
    assert cell["metadata"]["seer"]["state"] == "interrupted"
    assert streams(cell) == "begun\n"


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGHUP])
async def test_p03_other_signals_end_the_server_in_order_too(
    place: Ground, sent: signal.Signals
) -> None:
    with raw_server(place) as server:
        server.process.send_signal(sent)
        server.ended_in(10)
        assert server.process.returncode == 0


async def test_p03_the_http_server_ends_on_sigterm_with_a_stream_open(place: Ground) -> None:
    parameters = stdio_parameters(place.folder, env={"XDG_RUNTIME_DIR": str(place.sockets)})
    command = [
        parameters.command,
        "-m",
        "seer_mcp.cli",
        "serve",
        "--state",
        str(place.folder / "state"),
    ]
    with (place.folder / "http.log").open("ab") as log:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            env=parameters.env,
            cwd=parameters.cwd,
            stdout=log,
            stderr=log,
        )
    try:
        from .ground import Endpoint

        token_file = place.folder / "state" / "http-token"

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        await until(lambda: process.poll() is not None or (token_file.exists() and listens()), 30)
        assert token_file.stat().st_mode & 0o777 == 0o600
        endpoint = Endpoint(place.folder, port)
        async with endpoint.lab("legacy", token_file.read_text().strip()) as lab:
            handle = await lab.start()
            await lab.cell(handle, "print(1, flush=True)\nwhile True: pass", wait=1)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            await until(lambda: process.poll() is not None, 20)
            assert time.monotonic() - began < 8
            assert process.returncode == 0
        assert processes_of(handle)  # kept, as configured
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


async def test_p04_a_closed_stdin_ends_the_server_and_the_sandbox_is_found_again(
    place: Ground,
) -> None:
    with raw_server(place) as server:
        handle = raw_start(server)
        cell_with(
            server,
            handle,
            "import time\nx = 5\nfor i in range(20): print(i); time.sleep(.1)",
            wait=0,
        )
        assert server.process.stdin is not None
        server.process.stdin.close()
        took = server.ended_in(15)
        assert server.process.returncode == 0
        assert took < 4  # a client waits 2 s before it sends signals
    with raw_server(place) as server:
        assert ": complete in" in raw_text(server.call("read_outputs", sandbox=handle))
        assert raw_text(cell_with(server, handle, "x")).endswith("\n5")


async def test_p04_killpg_of_the_server_leaves_the_sandbox(place: Ground) -> None:
    with raw_server(place) as server:
        handle = raw_start(server)
        cell_with(
            server,
            handle,
            "import time\ny = 6\nfor i in range(20): print(i); time.sleep(.1)",
            wait=0,
        )
        os.killpg(server.process.pid, signal.SIGTERM)
        time.sleep(0.2)
        if server.process.poll() is None:
            os.killpg(server.process.pid, signal.SIGKILL)
        server.ended_in(10)
    with raw_server(place) as server:
        assert ": complete in" in raw_text(server.call("read_outputs", sandbox=handle))
        assert raw_text(cell_with(server, handle, "y")).endswith("\n6")


async def test_p04_nobody_there_ends_the_sandbox_at_its_idle_limit(place: Ground) -> None:
    with raw_server(place, "--idle-minutes", "0.04") as server:
        handle = raw_start(server)
        path = notebook_of(place, handle)
        cell_with(
            server, handle, "import time; print('early'); time.sleep(4); print('late')", wait=0
        )
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    time.sleep(3)
    assert processes_of(handle), "it ended although a cell ran"
    await until(lambda: not processes_of(handle), 20)
    with raw_server(place) as server:
        listed = raw_text(server.call("list_sandboxes"))
        assert "0 running, 1 ended" in listed, listed
        gone = server.call("create_cell", sandbox=handle, source="1")
        assert gone["isError"] and "start_sandbox" in raw_text(gone)
    nbformat.validate(nbformat.read(path, as_version=4))
    (cell,) = read_cells(path)
    # What it printed when no server was there was in the journal.
    assert cell["metadata"]["seer"]["state"] == "complete"
    assert streams(cell) == "early\nlate\n"


async def test_p05_two_servers_share_a_state_folder_and_each_sandbox_has_one(place: Ground) -> None:
    with raw_server(place) as first, raw_server(place) as second:
        mine, other = raw_start(first, name="a"), raw_start(second, name="b")
        cell_with(first, mine, "z = 7")
        for server, own, foreign in ((first, mine, other), (second, other, mine)):
            listed = raw_text(server.call("list_sandboxes"))
            assert "1 running" in listed, listed
            assert f"{foreign}: another seer-mcp server uses it" in listed
            refused = cell_with(server, foreign, "1")
            assert refused["isError"]
            assert "another seer-mcp server" in raw_text(refused), raw_text(refused)
            assert not cell_with(server, own, "1").get("isError")
        os.kill(first.process.pid, signal.SIGKILL)
        first.process.wait(10)
        assert raw_text(cell_with(second, mine, "z")).endswith("\n7")


@pytest.mark.slow
async def test_p05_one_notebook_is_never_written_by_two_servers(place: Ground) -> None:
    file = place.project / "shared.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), file)
    with raw_server(place) as first, raw_server(place) as second:
        raw_start(first, notebook="shared.ipynb")
        refused = second.call("start_sandbox", notebook="shared.ipynb")
        assert refused["isError"] and "fork=true" in raw_text(refused)
        copy = raw_start(second, notebook="shared.ipynb", fork=True)
        assert notebook_of(place, copy) != file


async def test_p05_a_notebook_stays_with_its_sandbox_when_the_next_server_takes_over(
    place: Ground,
) -> None:
    file = place.project / "shared.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), file)
    with raw_server(place) as first:
        raw_start(first, notebook="shared.ipynb")
    with raw_server(place) as second:
        second.call("list_sandboxes")
        refused = second.call("start_sandbox", notebook="shared.ipynb")
        assert refused["isError"] and "fork=true" in raw_text(refused)
        with raw_server(place) as third:
            refused = third.call("start_sandbox", notebook="shared.ipynb")
            assert refused["isError"] and "fork=true" in raw_text(refused)


async def test_nothing_of_a_sandbox_is_left_after_its_host_is_killed(place: Ground) -> None:
    with raw_server(place) as server:
        handle = raw_start(server)
        cell_with(server, handle, "print('kept')")
        cell_with(
            server, handle, "import time; print('kept too', flush=True); time.sleep(60)", wait=1
        )
        hosts = [p for p in processes_of(handle) if "kernel_host" in p.cmdline()]
        assert len(hosts) == 1
        hosts[0].kill()
        result = server.call("read_outputs", sandbox=handle)
        text = raw_text(result)
        assert result["isError"] and "sandbox was lost" in text and "kept too" in text, text
        await until(lambda: not processes_of(handle), 10)
        cells = read_cells(notebook_of(place, handle))
        assert [c["metadata"]["seer"]["state"] for c in cells] == ["complete", "sandbox_lost"]
        assert [streams(c) for c in cells] == ["kept\n", "kept too\n"]


async def test_stdout_of_the_stdio_server_carries_nothing_but_protocol(place: Ground) -> None:
    noisy = place.folder / "noisy"
    noisy.mkdir()
    (noisy / "sitecustomize.py").write_text(
        "import os, sys, threading, time\n"
        "def talk():\n"
        "    while 'mcp.server.stdio' not in sys.modules: time.sleep(.05)\n"
        "    time.sleep(1)\n"
        "    while True:\n"
        "        print('a library prints'); sys.stdout.flush(); os.write(1, b'and a C library\\n')\n"
        "        time.sleep(.05)\n"
        "if any('seer_mcp' in a for a in sys.orig_argv): threading.Thread(target=talk, daemon=True).start()\n"
    )
    with raw_server(place, "--log-level", "debug", env={"PYTHONPATH": str(noisy)}) as server:
        handle = raw_start(server)
        text = raw_text(
            cell_with(
                server,
                handle,
                "import os; os.write(1, b'raw'); os.system('echo shell'); print('p')",
            )
        )
        assert "p" in text
        time.sleep(0.5)
        server.call("list_sandboxes")
        lines = list(server.lines)
    assert "a library prints" in (place.folder / "server.log").read_text()
    assert len(lines) >= 4
    for line in lines:
        assert json.loads(line)["jsonrpc"] == "2.0"


def test_a_server_without_work_ends_with_no_child(place: Ground) -> None:
    with raw_server(place) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children == []


def find_again(place: Ground, number: int) -> float:
    """Kill a server with `number` live sandboxes; seconds until the next one has them all."""
    with raw_server(place) as server:
        handles = [raw_start(server) for _ in range(number)]
        for at, handle in enumerate(handles):
            server.call("create_cell", sandbox=handle, source=f"mine, ran = {at}, []")
            server.call(
                "create_cell",
                sandbox=handle,
                source=(
                    "import time\nran.append(1)\nfor i in range(60):\n"
                    "    print(mine, i, flush=True); time.sleep(0.1)"
                ),
                wait=0,
            )
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(10)
    with raw_server(place, "--on-exit", "stop") as server:
        began = time.monotonic()
        listed = raw_text(server.call("list_sandboxes"))
        took = time.monotonic() - began
        assert [handle for handle in handles if handle not in listed] == []
        for at, handle in enumerate(handles):
            result = server.call("read_outputs", sandbox=handle, wait=20)
            assert result["_meta"]["seer/run"]["state"] == "complete", raw_text(result)
            lines = [line for line in raw_text(result).splitlines() if line[:1].isdigit()]
            assert lines == [f"{at} {i}" for i in range(60)]
            told = server.call("create_cell", sandbox=handle, source="mine, ran")
            assert f"({at}, [1])" in raw_text(told)
        for handle in handles:
            server.call("stop_sandbox", sandbox=handle)
    assert place.processes() == []
    return took


@pytest.mark.slow
def test_p01_three_live_sandboxes_are_found_again(place: Ground) -> None:
    find_again(place, 3)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_p01_twenty_live_sandboxes_are_found_again_in_15_seconds(place: Ground) -> None:
    took = find_again(place, 20)
    assert took < 15
