"""What a request must pass: its size, its pace, how often, its headers."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from typing import Any

import httpx2
import pytest

from seer_mcp.errors import BadInput
from seer_mcp.http import Serving, TokenFile, slow
from seer_mcp.http.gate import Buckets
from seer_mcp.sessions.turns import Turns

from ..faults.ground import TOKEN, Ground, http_server
from ..faults.test_h_http import ACCEPT, post
from ..load.serving import request
from ..support import until

pytestmark = pytest.mark.anyio


async def test_h07_a_body_that_is_too_large_is_refused_before_it_is_understood(
    place: Ground,
) -> None:
    async with http_server(place.config()) as server:
        big = b'{"x": "' + b"a" * (8 * 1024 * 1024) + b'"}'
        assert (await post(server, body=big)).status_code == 413

        async def chunks() -> Any:
            for _ in range(128):
                yield b"a" * 65536

        headers = {**ACCEPT, "Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(timeout=30) as http:
            assert (
                await http.post(server.url, content=chunks(), headers=headers)
            ).status_code == 413
            bomb = gzip.compress(b"0" * 50_000_000)
            answer = await http.post(
                server.url, content=bomb, headers={**headers, "Content-Encoding": "gzip"}
            )
            assert answer.status_code in (400, 415)  # it is not unpacked
            assert (await http.post(server.url, content=big)).status_code == 401
        head = await raw(server.port, b"POST /mcp HTTP/1.1\r\nX: " + b"a" * 200_000)
        assert head == b"" or head.startswith(b"HTTP/1.1 4")
        assert (await post(server)).status_code == 200


async def raw(port: int, data: bytes, seconds: float = 10.0) -> bytes:
    """What comes back for some bytes, until the other side closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(data)
        return await asyncio.wait_for(reader.read(), seconds)
    except (ConnectionError, TimeoutError):
        return b""
    finally:
        writer.close()


async def test_h09_requests_that_do_not_come_are_closed_and_others_go_on(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slow.REQUEST_SECONDS <= 15
    monkeypatch.setattr(slow, "REQUEST_SECONDS", 2.0)
    head = (
        f"POST /mcp HTTP/1.1\r\nHost: 127.0.0.1:PORT\r\nAuthorization: Bearer {TOKEN}\r\n".encode()
    )
    begun = [
        b"",
        b"POST",
        head,
        head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
    ]
    async with http_server(place.config()) as server:

        async def slowly(data: bytes) -> bool:
            """Whether a connection that sends a byte now and then is closed."""
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(data.replace(b"PORT", str(server.port).encode()))
            end = time.monotonic() + 10
            try:
                while time.monotonic() < end:
                    try:
                        if await asyncio.wait_for(reader.read(1000), 0.5) == b"":
                            return True
                    except TimeoutError:
                        writer.write(b"x")
                    except ConnectionError:
                        return True
                return False
            finally:
                writer.transport.abort()
                writer.close()

        held = [asyncio.create_task(slowly(begun[i % 4])) for i in range(200)]
        await asyncio.sleep(0.5)
        assert (await post(server)).status_code == 200  # a good client meanwhile
        closed = await asyncio.gather(*held)
        assert sum(closed) == 200
        # A request that took its time within the limit, and a second on the same connection, are served.
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for _ in range(2):
            for part in (b"GET /healthz HTTP/1.1\r\n", b"Host: x\r\n", b"\r\n"):
                writer.write(part)
                await asyncio.sleep(0.3)
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            await asyncio.sleep(2.5)  # kept alive, idle
        writer.close()


async def test_a_client_that_does_not_read_is_dropped(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slow, "READ_SECONDS", 1.0)
    dropped: list[object] = []
    drop = slow.Prompt._drop
    monkeypatch.setattr(slow.Prompt, "_drop", lambda self: (dropped.append(self), drop(self))[1])
    async with http_server(place.config()) as server:
        # A socket with small buffers asks for the same long answer again and again, and reads none.
        mute = socket.socket()
        mute.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        mute.connect(("127.0.0.1", server.port))
        mute.setblocking(False)
        body, headers = request(1, "list_techniques", {})
        data = json.dumps(body).encode()
        lines = {**headers, "Host": f"127.0.0.1:{server.port}", "Content-Length": str(len(data))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        one = f"POST /mcp HTTP/1.1\r\n{head}\r\n".encode() + data
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(loop.sock_sendall(mute, one * 2000))
        await until(lambda: dropped, 90)
        await asyncio.wait([sending], timeout=10)
        sending.cancel()
        mute.close()
        assert (await post(server)).status_code == 200


async def test_so_many_requests_a_minute_for_each_owner(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", ["sandboxes:read"], 1)
    ben, _ = users.create("ben", ["sandboxes:read"], 1)
    async with http_server(place.config(team=True), users=users, calls_a_minute=5) as server:
        codes = [(await post(server, token=anna)).status_code for _ in range(8)]
        assert codes[:5] == [200] * 5 and codes[-1] == 429
        answer = await post(server, token=anna)
        assert 1 <= int(answer.headers["retry-after"]) <= 12
        assert (await post(server, token=ben)).status_code == 200


def test_a_bucket_fills_again_and_forgets_the_idle() -> None:
    now = 0.0
    buckets = Buckets(60, clock=lambda: now)
    assert [buckets.take("a") for _ in range(60)] == [0.0] * 60
    assert buckets.take("a") == pytest.approx(1.0)
    now = 1.0
    assert buckets.take("a") == 0.0 and buckets.take("a") > 0
    for number in range(20_000):
        buckets.take(str(number))
    assert len(buckets._left) == 10_000


async def test_h12_headers_that_contradict_the_body_are_refused(place: Ground) -> None:
    body, headers = request(1, "list_sandboxes", {})
    async with http_server(place.config()) as server, httpx2.AsyncClient(timeout=20) as http:
        assert (await http.post(server.url, json=body, headers=headers)).status_code == 200
        for name, value in (
            ("Mcp-Name", "run_command"),
            ("Mcp-Method", "tools/list"),
            ("MCP-Protocol-Version", "2099-01-01"),
        ):
            answer = await http.post(server.url, json=body, headers={**headers, name: value})
            assert answer.status_code == 400, (name, answer.text)
            if name != "MCP-Protocol-Version":
                assert answer.json()["error"]["code"] == -32020, answer.text


async def test_health_tells_nothing_and_pages_check_the_host(place: Ground) -> None:
    async with http_server(place.config()) as server, httpx2.AsyncClient() as http:
        base = server.url.removesuffix("/mcp")
        for path, says in (("/healthz", "ok"), ("/readyz", "ready")):
            answer = await http.get(base + path, headers={"Host": "10.0.0.1"})
            assert (answer.status_code, answer.text) == (200, says)
        assert (await http.get(base + "/", headers={"Host": "evil.example"})).status_code == 421
        # With no-referrer a browser's own form would come with "Origin: null", which is refused.
        assert (await http.get(base + "/")).headers["referrer-policy"] == "same-origin"
        assert (
            await http.get(base + "/", headers={"Origin": "http://evil.example"})
        ).status_code == 403


def test_h06_what_would_be_open_is_refused(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    fine = {"users": users, "behind_proxy": True, "public_url": "https://seer.example.org"}
    assert Serving("0.0.0.0", 8757, **fine).resource == "https://seer.example.org/mcp"
    assert Serving("127.0.0.1", 8757, token=TOKEN).names[0] == "127.0.0.1:8757"
    refused: list[tuple[str, dict[str, Any], str]] = [
        ("127.0.0.1", {}, "open"),
        ("0.0.0.0", {"token": TOKEN}, "only loopback"),
        ("0.0.0.0", {"users": users, "public_url": "https://x.example"}, "in clear"),
        ("0.0.0.0", {**fine, "public_url": ""}, "public-url"),
        ("0.0.0.0", {**fine, "public_url": "http://x.example"}, "https"),
        ("0.0.0.0", {**fine, "public_url": "https://x.example/path"}, "without a path"),
        ("10.0.0.1", {**fine, "public_url": ""}, "https"),
        ("0.0.0.0", {**fine, "tls": (place.folder / "no", place.folder / "no")}, "no certificate"),
    ]
    for host, given, says in refused:
        with pytest.raises(BadInput, match=says):
            Serving(host, 8757, **given)


async def test_turns_are_taken_in_order_and_the_place_is_said() -> None:
    turns, said, order = Turns(2), [], []

    async def work(name: str) -> None:
        async with turns.take(lambda place, length: said.append((name, place, length))):
            order.append(name)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(work(name)) for name in "abcde"]
    await asyncio.sleep(0)
    tasks[3].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == ["a", "b", "c", "e"]
    assert ("e", 3, 3) in said and ("e", 2, 2) in said and ("c", 1, 1) in said
    async with turns.take(lambda *_: None), turns.take(lambda *_: None):
        late = asyncio.create_task(work("f"))
        await asyncio.sleep(0)
    await late
