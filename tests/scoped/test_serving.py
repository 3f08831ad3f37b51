"""A scope over HTTP and over stdio: tokens, long calls, owners, and what is left when the server ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest
from mcp import Client

from seer_mcp.environment import read_scope
from seer_mcp.http.tokens import SCOPES, TokenFile
from seer_mcp.scoped import CALL, build_scoped_server

from ..faults.ground import TOKEN, Ground, RawServer, http_server, raw_text
from ..support import text_of, until

pytestmark = pytest.mark.anyio
HERE = Path(__file__).parent
FILE = HERE / "interface.py"


async def test_over_http_a_token_of_the_scope_calls_functions_and_opens_nothing_else(
    place: Ground,
) -> None:
    found = read_scope(FILE)
    async with http_server(place.config(), token=TOKEN, scope=found) as server:
        async with server.lab() as lab:
            result = await lab.call("add", a=1)
            assert result.structured_content == {"result": 3}, text_of(result)
            assert "No tool" in await lab.no("start_sandbox")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(headers=headers) as http:
            base = server.url.removesuffix("/mcp")
            for path in ("/metrics", "/", "/watch", "/sandboxes", "/login"):
                assert (await http.get(base + path)).status_code == 404, path
            for path in ("/healthz", "/readyz"):
                assert (await http.get(base + path)).status_code == 200
        async with httpx2.AsyncClient() as http:
            assert (await http.post(server.url, json={})).status_code == 401


async def status(url: str, token: str, tool: str) -> int:
    """The HTTP status of a call with that token."""
    body = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": tool, "arguments": {"a": 1}},
    }
    headers = {
        "Authorization": f"Bearer {token}",
        "Accept": "application/json, text/event-stream",
        "MCP-Protocol-Version": "2025-06-18",
    }
    async with httpx2.AsyncClient(headers=headers) as http:
        return (await http.post(url, json=body)).status_code


async def test_tokens_of_the_two_servers_open_only_their_own(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    caller, _ = users.create("anna", [CALL], 1)
    worker, _ = users.create("ben", SCOPES[:4], 1)
    assert CALL not in SCOPES[:4]
    async with http_server(place.config(), users=users, scope=read_scope(FILE)) as server:
        assert await status(server.url, worker, "add") == 403
        assert await status(server.url, caller, "add") == 400  # let in; it lacks a session
    team = place.config(team=True, team_backends=("local",))
    async with http_server(team, users=users) as server:
        for tool in ("start_sandbox", "create_cell", "list_sandboxes"):
            assert await status(server.url, caller, tool) == 403
            assert await status(server.url, worker, tool) == 400


async def test_a_long_call_is_read_later_by_its_owner_and_can_be_cancelled(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", [CALL], 1)
    ben, _ = users.create("ben", [CALL], 1)
    config = place.config(max_wait=3.0)
    async with (
        http_server(config, users=users, scope=read_scope(FILE)) as server,
        server.lab("auto", anna) as first,
        server.lab("auto", ben) as second,
    ):
        while "starting" in text_of(await first.call("add", a=1)):
            pass
        told = await first.call("fail", how="sleep")
        assert not told.is_error
        id = told.structured_content["running"]
        waiting = await second.call("add", a=1)  # calls run one after the other
        assert waiting.structured_content.keys() == {"running"}
        assert "No call" in await second.no("read_result", call=id)
        assert "No call" in await second.no("cancel_call", call=id)
        still = await first.call("read_result", call=id, wait=0)
        assert still.structured_content == {"running": id}
        assert "it was cancelled" in await first.no("cancel_call", call=id)
        read = await second.call("read_result", call=waiting.structured_content["running"])
        assert read.structured_content == {"result": 3}


async def test_a_file_that_fails_in_its_sandbox_is_told_to_the_operator_alone(
    place: Ground,
) -> None:
    file = place.project / "broken.py"
    file.write_text(
        "from tool_packs.scoped import expose\n"
        "@expose\ndef f() -> None:\n    'd'\n"
        "raise ValueError('the-marmot')\n"
    )
    async with Client(build_scoped_server(place.config(), read_scope(file))) as client:
        for _ in range(2):
            result = await client.call_tool("f", {})
            assert result.is_error and "did not start" in text_of(result)
            assert "marmot" not in text_of(result)
    logs = "".join(p.read_text() for p in (place.folder / "state" / "logs").iterdir())
    assert "scope_not_started" in logs and "the-marmot" not in logs
    (notebook,) = place.project.glob("outputs/broken/*.ipynb")
    assert str(notebook) in logs and "the-marmot" in notebook.read_text()
    await until(lambda: not place.processes())


async def test_a_function_that_the_file_takes_back_is_no_surprise(place: Ground) -> None:
    file = place.project / "changing.py"
    file.write_text(
        "from tool_packs import scoped\nexpose = lambda f: f\n@expose\ndef f() -> None:\n    'd'\n"
    )
    async with Client(build_scoped_server(place.config(), read_scope(file))) as client:
        assert "did not start" in text_of(await client.call_tool("f", {}))


async def test_what_a_killed_server_left_is_ended_by_the_next(place: Ground) -> None:
    file = place.project / "interface.py"
    shutil.copy(FILE, file)
    first = RawServer(place, "--scope", str(file))
    try:
        first.begin()
        assert first.call("add", a=1)["structuredContent"] == {"result": 3}
        before = {p.pid for p in place.processes()}
        os.killpg(first.process.pid, signal.SIGKILL)
    finally:
        first.close()
    assert {p.pid for p in place.processes()} == before
    second = RawServer(place, "--scope", str(file))
    try:
        second.begin()
        result = second.call("remember", text="x")
        assert result["structuredContent"]["result"]["kept"] == 1, raw_text(result)
        await until(lambda: not before & {p.pid for p in place.processes()})
    finally:
        second.close()


@pytest.mark.parametrize("command", [["stdio"], ["serve", "--port", "1"], []])
def test_a_file_that_cannot_be_served_ends_the_server_with_a_sentence(
    command: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "interface.py"
    file.write_text("@expose\ndef f(x): ...\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "seer_mcp.cli", *command),
            *("--scope", str(file), "--state", str(tmp_path / "state")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("seer-mcp: ") and "x has no type" in done.stderr
    assert "Traceback" not in done.stderr
