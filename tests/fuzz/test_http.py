"""Garbage over HTTP, on every route, with and without a token: refused or answered, never a 500."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote

import pytest

from seer_mcp.http import slow
from seer_mcp.http.tokens import SCOPES, TokenFile

from ..faults.ground import Endpoint, ground, http_server
from ..faults.stub_kernel import stub_python
from ..load.serving import request
from ..team.test_watch import browser
from .mutate import ODD, cases, damaged

pytestmark = pytest.mark.anyio
AT_ONCE = 8
HANG = 30.0
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "x", "GET\0", "")
TOOLS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("list_sandboxes", {}),
    ("read_notebook", {"sandbox": "HANDLE"}),
    ("read_outputs", {"sandbox": "HANDLE", "cell": "x", "wait": 0}),
    ("create_cell", {"sandbox": "HANDLE", "source": "hello", "wait": 1}),
    ("edit_cell", {"sandbox": "HANDLE", "cell": "x", "source": "y"}),
    ("list_techniques", {"question": "is it hidden?"}),
    ("start_sandbox", {"name": "more", "estimate": True}),
)
OTHER: tuple[dict[str, Any], ...] = (
    {
        "method": "initialize",
        "params": {
            "protocolVersion": "2025-11-25",
            "capabilities": {},
            "clientInfo": {"name": "f", "version": "1"},
        },
    },
    {"method": "ping"},
    {"method": "tools/list", "params": {}},
    {"method": "resources/read", "params": {"uri": "seer://sandboxes/HANDLE/notebook"}},
    {"method": "resources/subscribe", "params": {"uri": "seer://sandboxes/HANDLE/notebook"}},
    {"method": "resources/list", "params": {}},
    {"method": "prompts/get", "params": {"name": "methodology", "arguments": {}}},
    {"method": "completion/complete", "params": {}},
    {"method": "notifications/cancelled", "params": {"requestId": 1}},
    {"method": "server/discover", "params": {}},
)


class Garbage:
    """Requests of one server: as a client or a browser would send them, then spoiled."""

    def __init__(self, server: Endpoint, routes: list[str], **known: str) -> None:
        self.host = f"127.0.0.1:{server.port}"
        self.routes = routes
        self.known = known

    def bytes(self, random: Random) -> bytes:
        if random.random() < 0.5:
            method, path, headers, body = self.call(random)
        else:
            method, path, headers, body = self.page(random)
        if random.random() < 0.3:
            method = random.choice(METHODS)
        for _ in range(random.choice((0, 0, 1, 2))):
            name = random.choice([*headers, "X-Odd", "Cookie", "Range", "Transfer-Encoding"])
            headers[name] = self.odd(random)
        if random.random() < 0.3:
            body = damaged(random, body)
        headers.setdefault("Content-Length", str(len(body)))
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        whole = f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "replace") + body
        return damaged(random, whole) if random.random() < 0.15 else whole

    def odd(self, random: Random) -> str:
        kind = random.choice((*ODD, *self.known.values(), "chunked", "bytes=0-1", "é", "x" * 9000))
        text = kind if isinstance(kind, str) else json.dumps(kind)
        return text.replace("\n", " ") if random.random() < 0.9 else text

    def call(self, random: Random) -> tuple[str, str, dict[str, str], bytes]:
        """A message to /mcp."""
        if random.random() < 0.6:
            tool, arguments = random.choice(TOOLS)
            body, headers = request(random.choice((1, 2, 3)), tool, dict(arguments))
            spoiled = body["params"]["arguments"]
        else:
            body = {"jsonrpc": "2.0", "id": 1, **json.loads(json.dumps(random.choice(OTHER)))}
            _, headers = request(1, "x", {})
            headers |= {"Mcp-Method": body["method"], "Mcp-Name": ""}
            if random.random() < 0.7:
                for name in ("MCP-Protocol-Version", "Mcp-Method", "Mcp-Name"):
                    del headers[name]
            spoiled = body.get("params", body)
        for _ in range(random.choice((0, 1, 1, 3))):
            target = random.choice((spoiled, body, body.get("params", body)))
            if isinstance(target, dict):
                target[random.choice([*target, "more"])] = random.choice(ODD)
        headers["Authorization"] = f"Bearer {self.known['token']}"
        headers["Host"] = self.host
        text = json.dumps([body] if random.random() < 0.05 else body)
        path = random.choice(("/mcp", "/mcp", "/mcp", "/mcp/", "/mcp?x=1"))
        text = text.replace("HANDLE", self.known["handle"])
        return "POST", path, headers, text.encode()

    def page(self, random: Random) -> tuple[str, str, dict[str, str], bytes]:
        """A request for one of the other routes."""

        def filled(match: re.Match[str]) -> str:
            odd = random.choice((*ODD, "%00", "%ff", "..%2f..", "%2e%2e", "stop", "watch.css"))
            value = (
                self.known["handle"]
                if random.random() < 0.6
                else quote(str(odd), safe="%/", errors="replace")
            )
            return value or "x"

        path = re.sub(r"\{[^}]*\}", filled, random.choice(self.routes))
        if random.random() < 0.2:
            path += random.choice(("/", "?download", "?once=%00", "?a=" + "b" * 3000, "#x", "//"))
        headers = {"Host": self.host, "Origin": f"http://{self.host}"}
        if random.random() < 0.8:
            headers["Cookie"] = f"seer_watch={self.known['cookie']}"
        if random.random() < 0.3:
            headers["Authorization"] = f"Bearer {self.known['token']}"
        body = b""
        if path.startswith("/enter"):
            kinds = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "x")
            headers["Content-Type"] = random.choice(kinds)
            body = random.choice((b"token=x", b"token=%ff&a=b&c=d", b"--x\r\n\r\n", b"--x--", b"="))
            return "POST", path, headers, body
        return random.choice(("GET", "GET", "POST")), path, headers, body


async def answered(port: int, data: bytes) -> tuple[int, bytes]:
    """The status of the answer and the begin of its body; (0, b"") if the connection was closed without one."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        head = await asyncio.wait_for(reader.read(4000), HANG)
        found = STATUS.match(head)
        return (int(found[1]) if found else 0), head
    except (ConnectionError, OSError):
        return 0, b""
    finally:
        writer.transport.abort()


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that is not whole is given up after a second, not after twelve."""
    monkeypatch.setattr(slow, "REQUEST_SECONDS", 1.0)


async def trial(folder: Path, count: int) -> Counter[int]:
    with ground(folder) as place:
        users = TokenFile(place.folder / "tokens.json")
        token, _ = users.create("anna", SCOPES[:4], 1)
        config = place.config(
            team=True,
            team_backends=("local",),
            python=str(stub_python(folder)),
            owner_sandboxes=2,
        )
        async with (
            http_server(config, users=users, calls_a_minute=1_000_000) as server,
            server.lab(token=token) as lab,
            browser(server, token) as http,
        ):
            handle = await lab.start(name="there")
            paths = {route.path for route in server.routes if not route.path.startswith("/mcp")}
            cookie = http.cookies["seer_watch"]
            routes = [*sorted(paths - {"/leave"}), "/nothing", "/favicon.ico", "*", ""]
            assert len(routes) > 15
            garbage = Garbage(server, routes, token=token, cookie=cookie, handle=handle)
            seen: Counter[int] = Counter()
            wrong: list[str] = []
            todo = cases("http", count)

            async def some() -> None:
                for name, random in todo:
                    data = garbage.bytes(random)
                    status, head = await answered(server.port, data)
                    seen[status] += 1
                    if status >= 500:
                        wrong.append(f"{name}: {data[:600]!r} -> {head[:300]!r}")

            await asyncio.gather(*(some() for _ in range(AT_ONCE)))
            assert wrong == [], f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:5])
            handle = (await lab.start(name="after")) if await stopped(lab, handle) else handle
            assert "still well" in str(
                await lab.ok("create_cell", sandbox=handle, source="still well")
            )
    return seen


async def stopped(lab: Any, handle: str) -> bool:
    """Whether one of the requests ended the sandbox, as a POST to its stop button does."""
    return (await lab.call("read_notebook", sandbox=handle)).is_error or (
        await lab.call("create_cell", sandbox=handle, source="there?")
    ).is_error


def told(seen: Counter[int]) -> None:
    print("HTTP fuzz:", ", ".join(f"{status}: {n}" for status, n in sorted(seen.items())))  # noqa: T201


async def test_three_hundred_spoiled_requests_and_no_500(tmp_path: Path) -> None:
    seen = await trial(tmp_path, 300)
    told(seen)
    assert seen[200] >= 20 and seen[400] >= 10 and seen[404] >= 5  # they get past the door


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_ten_thousand_spoiled_requests_and_no_500(tmp_path: Path) -> None:
    seen = await trial(tmp_path, 10_000)
    told(seen)
    assert seen.total() == 10_000
