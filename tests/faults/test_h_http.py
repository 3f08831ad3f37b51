"""The HTTP endpoint: who may enter, and what everybody else is told."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx2
import pytest

from seer_mcp.errors import BadInput
from seer_mcp.http import Serving, TokenFile
from seer_mcp.http.tokens import SCOPES

from ..support import text_of
from .ground import ERAS, TOKEN, Endpoint, Ground, http_server

pytestmark = pytest.mark.anyio

HELLO = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-06-18",
        "capabilities": {},
        "clientInfo": {"name": "x", "version": "1"},
    },
}
ACCEPT = {"Accept": "application/json, text/event-stream", "Content-Type": "application/json"}


async def post(
    endpoint: Endpoint, *, token: str | None = TOKEN, body: Any = None, **headers: str
) -> httpx2.Response:
    given = {
        **ACCEPT,
        **headers,
        **({"Authorization": f"Bearer {token}"} if token is not None else {}),
    }
    async with httpx2.AsyncClient(timeout=20) as http:
        if isinstance(body, bytes):
            return await http.post(endpoint.url, content=body, headers=given)
        return await http.post(endpoint.url, json=HELLO if body is None else body, headers=given)


async def test_only_the_token_opens_the_endpoint(place: Ground) -> None:
    async with http_server(place.config()) as endpoint:
        assert (await post(endpoint)).status_code == 200
        for wrong in (None, "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "Bearer " + TOKEN):
            answer = await post(endpoint, token=wrong)
            assert answer.status_code == 401, wrong
            assert "www-authenticate" in answer.headers
            for secret in (TOKEN, str(place.folder), "seer"):
                assert secret not in answer.text, answer.text
        answer = await post(endpoint, token=None, Authorization=f"Basic {TOKEN}")
        assert answer.status_code == 401
        answer = await post(endpoint, token=None, Cookie=f"token={TOKEN}")
        assert answer.status_code == 401
        async with httpx2.AsyncClient(timeout=20) as http:
            for method in ("GET", "DELETE", "PUT", "OPTIONS", "HEAD"):
                answer = await http.request(method, endpoint.url, headers=ACCEPT)
                assert answer.status_code in (401, 405), (method, answer.status_code)
            answer = await http.post(
                f"{endpoint.url}?token={TOKEN}&access_token={TOKEN}", json=HELLO, headers=ACCEPT
            )
            assert answer.status_code == 401


async def test_h04_a_foreign_host_or_origin_is_refused(place: Ground) -> None:
    async with http_server(place.config()) as endpoint:
        port = endpoint.port
        for host in (
            "evil.example",
            f"evil.example:{port}",
            "127.0.0.1",
            f"localhost.evil.example:{port}",
            "0.0.0.0",
        ):
            assert (await post(endpoint, Host=host)).status_code == 421, host
        for origin in (
            "http://evil.example",
            "null",
            f"http://localhost.evil.example:{port}",
            f"https://localhost:{port}",
            f"http://localhost:{port + 1}",
            f"http://localhost:{port}.evil.example",
            "file://",
            "HTTP://EVIL.EXAMPLE",
            f"HTTP://LOCALHOST:{port}",  # no browser writes it so
            f"http://localhost:{port}/",
            f"http://localhost:{port} http://evil.example",
            "",
        ):
            assert (await post(endpoint, Origin=origin)).status_code == 403, origin
        for host in (f"localhost:{port}", f"127.0.0.1:{port}"):
            assert (await post(endpoint, Host=host, Origin=f"http://{host}")).status_code == 200


async def test_h10_a_session_opens_to_nobody_but_who_began_it(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    ben, _ = users.create("ben", SCOPES[:3], 1)
    async with http_server(place.config(team=True), users=users) as endpoint:
        session = (await post(endpoint, token=anna)).headers["mcp-session-id"]
        madeup = session[::-1]
        note = {"jsonrpc": "2.0", "method": "notifications/initialized"}
        asked = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
        headers = {**ACCEPT, "Authorization": f"Bearer {ben}"}
        ways = [("POST", HELLO), ("POST", note), ("POST", asked), ("GET", None), ("DELETE", None)]
        async with httpx2.AsyncClient(timeout=20, headers=headers) as http:
            for method, body in ways:
                theirs, nobodys = [
                    await http.request(
                        method, endpoint.url, json=body, headers={"Mcp-Session-Id": id}
                    )
                    for id in (session, madeup)
                ]
                assert theirs.status_code == nobodys.status_code == 404, (method, body)
                assert theirs.text == nobodys.text and headers_of(theirs) == headers_of(nobodys)
        own = {"token": anna, "Mcp-Session-Id": session}
        assert (await post(endpoint, body=note, **own)).status_code == 202
        assert "start_sandbox" in (await post(endpoint, body=asked, **own)).text  # it is still hers


def headers_of(answer: httpx2.Response) -> dict[str, str]:
    return {name: value for name, value in answer.headers.items() if name != "date"}


def test_only_loopback_is_served(place: Ground) -> None:
    for host in ("0.0.0.0", "::", "", "192.168.0.1", "example.org", "127.0.0.1.evil.example"):
        with pytest.raises(BadInput, match="only loopback"):
            Serving(host, 8000, TOKEN)
    for token in ("", "short", "with space in the middle of it", "x" * 19, "ümlaut" * 10):
        with pytest.raises(BadInput, match="token"):
            Serving("127.0.0.1", 8000, token)


def test_the_command_line_refuses_another_host(place: Ground) -> None:
    command = [
        sys.executable,
        "-m",
        "seer_mcp.cli",
        "serve",
        "--host",
        "0.0.0.0",
        "--state",
        str(place.folder / "s"),
    ]
    env = {**os.environ, "CLAUDE_PROJECT_DIR": str(place.project)}
    done = subprocess.run(
        command, env=env, cwd=place.project, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert "only loopback" in done.stderr and "Traceback" not in done.stderr


async def test_malformed_bodies_are_client_errors(place: Ground) -> None:
    async with http_server(place.config()) as endpoint:
        bodies: list[Any] = [
            b"",
            b"{",
            b"null",
            b"[]",
            b"3",
            b'"x"',
            b"\xff\xfe",
            b"[" * 100_000,
            {},
            {"jsonrpc": "1"},
        ]
        bodies += [
            {"jsonrpc": "2.0", "id": 1, "method": "no/such"},
            {"jsonrpc": "2.0", "id": {}, "method": "ping"},
        ]
        bodies += [
            {**HELLO, "params": 3},
            {**HELLO, "params": None},
            {**HELLO, "id": None},
            [HELLO, HELLO],
        ]
        for body in bodies:
            answer = await post(endpoint, body=body)
            assert answer.status_code < 500, (body, answer.status_code, answer.text)
        big = await post(endpoint, body=b'{"x": "' + b"a" * (8 * 1024 * 1024) + b'"}')
        assert big.status_code == 413
        assert (await post(endpoint)).status_code == 200


@pytest.mark.parametrize("mode", ERAS)
async def test_both_protocol_eras_work_over_http(place: Ground, mode: str) -> None:
    async with http_server(place.config()) as endpoint, endpoint.lab(mode) as lab:
        modern = lab.client.protocol_version.startswith("2026")
        assert modern == (mode == "auto")
        handle = await lab.start()
        assert text_of(await lab.cell(handle, "40 + 2")).endswith("42")


async def test_a_busy_port_is_said_and_the_exit_is_clean(place: Ground) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        command = [
            sys.executable,
            "-m",
            "seer_mcp.cli",
            "serve",
            "--port",
            port,
            "--state",
            str(place.folder / "s"),
        ]
        process = await asyncio.create_subprocess_exec(
            *command,
            env={**os.environ, "CLAUDE_PROJECT_DIR": str(place.project)},
            cwd=place.project,
            stderr=subprocess.PIPE,
        )
        async with asyncio.timeout(60):
            _, stderr = await process.communicate()
    assert process.returncode not in (0, None)
    assert b"address already in use" in stderr.lower(), stderr
    assert b"Traceback" not in stderr, stderr


def test_h16_what_the_conformance_suite_may_not_pass_is_explained() -> None:
    folder = Path(__file__).parents[2] / ".ci" / "conformance-expected"
    files = sorted(folder.iterdir())
    assert [file.stem for file in files] == ["2025-11-25", "2026-07-28"]
    for file in files:
        lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert lines.pop(0) == "server:" and len(lines) == len(set(lines))
        for line in lines:
            assert re.fullmatch(r"  - [a-z0-9-]+:[a-z0-9-]+  # .{20,}", line), line
