"""The watch page: who may see what, that nothing of a notebook runs, and that it grows."""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from seer_mcp.http.tokens import SCOPES, TokenFile
from seer_mcp.watch.page import cell_html, output_html, read_cells
from seer_mcp.watch.source import gpu_in, metadata_of

from ..faults.ground import TOKEN, Endpoint, Ground, http_server
from ..support import open_lab

pytestmark = pytest.mark.anyio
EVIL = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>"


@asynccontextmanager
async def browser(server: Endpoint, token: str = TOKEN) -> AsyncIterator[httpx2.AsyncClient]:
    """Somebody who is signed in."""
    base = server.url.removesuffix("/mcp")
    async with httpx2.AsyncClient(base_url=base, headers={"Origin": base}, timeout=20) as http:
        answer = await http.post("/enter", data={"token": token})
        assert answer.status_code == 303, answer.text
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie
        yield http


async def stream(http: httpx2.AsyncClient, path: str) -> AsyncGenerator[tuple[str, Any]]:
    """The events of a page."""
    async with http.stream("GET", path) as answer:
        assert answer.status_code == 200
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event:"):
                name = line[6:].strip()
            elif line.startswith("data:"):
                yield name, json.loads(line[5:])


async def test_a_notebook_is_seen_while_it_grows(place: Ground) -> None:
    async with http_server(place.config()) as server, server.lab() as lab, browser(server) as http:
        handle = await lab.start(name="growing")
        assert "growing" in (await http.get("/")).text
        seen: list[tuple[str, Any]] = []

        async def watch() -> None:
            async for event in stream(http, f"/s/{handle}/events"):
                seen.append(event)
                if event[0] == "over":
                    return

        watching = asyncio.create_task(watch())
        await lab.cell(handle, "for i in range(3): print('line', i)\n1/0")
        await lab.call("create_cell", sandbox=handle, source="**bold** $x$", type="markdown")
        async with asyncio.timeout(20):
            while not any(n == "cell" and "<strong>bold" in d["html"] for n, d in seen):
                await asyncio.sleep(0.1)
        cells = [d["html"] for n, d in seen if n == "cell"]
        assert any("line 2" in html and "ZeroDivisionError" in html for html in cells)
        assert [len(d) for n, d in seen if n == "order"][-1] == 2
        page = (await http.get(f"/s/{handle}")).text
        assert "line 2" in page and "Stop the sandbox" in page
        saved = await http.get(f"/s/{handle}/notebook.html")
        assert "line 2" in saved.text and "<script" not in saved.text
        whole = await http.get(f"/s/{handle}/notebook.ipynb")
        assert len(json.loads(whole.content)["cells"]) == 2
        answer = await http.post(f"/s/{handle}/stop")
        assert answer.status_code == 303
        async with asyncio.timeout(20):
            await watching
        assert "ended" in (await http.get(f"/s/{handle}")).text
        assert "growing/growing.ipynb" in (await http.get("/")).text
        past = await http.get("/n/growing/growing.ipynb")
        assert "line 2" in past.text and "Stop the sandbox" not in past.text
        assert "?html" in past.text
        kept = await http.get("/n/growing/growing.ipynb?html")
        assert "line 2" in kept.text and "<script" not in kept.text
        assert "growing.html" in kept.headers["content-disposition"]


async def test_the_interrupt_button_stops_a_cell(place: Ground) -> None:
    async with http_server(place.config()) as server, server.lab() as lab, browser(server) as http:
        handle = await lab.start()
        await lab.cell(handle, "import time\nwhile True: time.sleep(0.05)", wait=0.5)
        assert (await http.post(f"/s/{handle}/interrupt")).status_code == 303
        assert "interrupted" in await lab.ok("read_notebook", sandbox=handle)


async def test_a_button_is_in_the_audit_as_a_call_is(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    config = place.config(team=True, team_backends=("local",))
    async with (
        http_server(config, users=users) as server,
        server.lab(token=anna) as lab,
        browser(server, anna) as http,
    ):
        handle = await lab.start()
        for act in ("share", "unshare", "interrupt", "stop"):
            assert (await http.post(f"/s/{handle}/{act}")).status_code == 303
        assert (await http.post("/s/never-zzzzzz/stop")).status_code == 404
    audit = (config.state_dir / "audit.jsonl").read_text()
    lines = [json.loads(line) for line in audit.splitlines()]
    buttons = [line for line in lines if line.get("tool", "").startswith("page_")]
    begun = [
        (line["tool"], line["owner"], line["client"], line["arguments"]["sandbox"])
        for line in buttons
        if line["event"] == "call"
    ]
    done = ["page_share", "page_unshare", "page_interrupt", "page_stop"]
    assert begun == [
        *((act, "anna", "watch page", handle) for act in done),
        ("page_stop", "anna", "watch page", "never-zzzzzz"),
    ]
    outcomes = [line["outcome"] for line in buttons if line["event"] == "answer"]
    assert outcomes == ["ok"] * 4 + ["error"]
    (ended,) = (line for line in lines if line.get("did") == "ended")
    assert ended["call"] == buttons[-4]["call"]


async def refusal(http: httpx2.AsyncClient, path: str) -> httpx2.Response:
    """The answer that says to come again later; a slow machine is let through now and then."""
    for _ in range(100):
        async with http.stream("GET", path) as answer:
            if answer.status_code == 429:
                await answer.aread()
                return answer
    raise AssertionError(f"{path} was never refused")


async def test_so_many_pages_a_minute_for_each_owner(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    ben, _ = users.create("ben", ["sandboxes:read"], 1)
    config = place.config(team=True, team_backends=("local",))
    async with (
        http_server(config, users=users, calls_a_minute=30) as server,
        server.lab(token=anna) as lab,
        browser(server, anna) as hers,
        browser(server, ben) as his,
    ):
        handle = await lab.start()
        file = f"/s/{handle}/notebook.ipynb"
        assert [(await hers.get(file)).status_code for _ in range(30)] == [200] * 30
        for path in (file, "/", "/cards", f"/s/{handle}", f"/s/{handle}/events", "/n/a/a.ipynb"):
            refused = await refusal(hers, path)
            assert handle not in refused.text
            assert 1 <= int(refused.headers["retry-after"]) <= 2
        assert (await his.get("/cards")).status_code == 200
        await lab.ok("list_sandboxes")  # her agent goes on


async def test_only_a_token_opens_the_pages(place: Ground) -> None:
    async with http_server(place.config()) as server, server.lab() as lab:
        handle = await lab.start(name="quiet")
        base = server.url.removesuffix("/mcp")
        paths = [
            "/cards",
            f"/s/{handle}",
            f"/s/{handle}/events",
            f"/s/{handle}/notebook.ipynb",
            "/n/quiet/quiet.ipynb",
        ]
        async with httpx2.AsyncClient(base_url=base) as http:
            for path in [*paths, "/"]:
                for cookie in (
                    {},
                    {"Cookie": "seer_watch=guess"},
                    {"Cookie": f"seer_watch={TOKEN}"},
                ):
                    answer = await http.get(path, headers=cookie)
                    assert answer.status_code == 401 and "quiet" not in answer.text, path
                answer = await http.get(path, headers={"Authorization": f"Bearer {TOKEN}"})
                assert answer.status_code == 401
            assert (await http.post(f"/s/{handle}/stop")).status_code == 401
            assert (
                await http.post("/enter", data={"token": TOKEN})
            ).status_code == 403  # no Origin
            bad = {"Origin": "http://evil.example"}
            assert (
                await http.post("/enter", data={"token": TOKEN}, headers=bad)
            ).status_code == 403
            same = {"Origin": base}
            assert (
                await http.post("/enter", data={"token": TOKEN[:-1]}, headers=same)
            ).status_code == 401
            big = await http.post("/enter", data={"token": "x" * 100_000}, headers=same)
            assert big.status_code == 413
        async with browser(server) as http:
            for method, path in (("POST", f"/s/{handle}/stop"), ("POST", f"/s/{handle}/share")):
                answer = await http.request(method, path, headers={"Origin": "http://evil.example"})
                assert answer.status_code == 403
            for path in (
                "/n/../../state/http-token",
                "/n/%2e%2e/x.ipynb",
                "/n/quiet",
                "/n//etc/passwd",
                "/static/../x",
            ):
                assert (await http.get(path)).status_code in (400, 404), path
            assert (
                (await http.get("/"))
                .headers["content-security-policy"]
                .startswith("default-src 'none'")
            )
            await http.post("/leave")
            assert (await http.get("/cards")).status_code == 401
        assert handle in await lab.ok("list_sandboxes")


async def test_t01_a_page_shows_nothing_of_somebody_else(place: Ground) -> None:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    ben, kept = users.create("ben", ["sandboxes:read"], 1)
    config = place.config(team=True, team_backends=("local",))
    async with (
        http_server(config, users=users) as server,
        server.lab(token=anna) as lab,
        browser(server, anna) as hers,
        browser(server, ben) as his,
    ):
        handle = await lab.start(name="private")
        await lab.cell(handle, "print('hers alone')")
        here = [
            f"/s/{handle}",
            f"/s/{handle}/events",
            f"/s/{handle}/notebook.ipynb",
            "/n/private/private.ipynb",
        ]
        for path in here:
            theirs, nobodys = (
                await his.get(path),
                await his.get(path.replace(handle, "never-zzzzzz")),
            )
            assert theirs.status_code == nobodys.status_code == 404 and theirs.text == nobodys.text
        assert "private" not in (await his.get("/")).text
        for act in ("stop", "interrupt", "share"):
            assert (
                await his.post(f"/s/{handle}/{act}")
            ).status_code == 403  # his token may only look
        assert (await hers.post(f"/s/{handle}/share")).status_code == 303
        assert "hers alone" in (await his.get(f"/s/{handle}")).text
        assert "Stop the sandbox" not in (await his.get(f"/s/{handle}")).text
        assert (await hers.post(f"/s/{handle}/unshare")).status_code == 303
        assert (await his.get(f"/s/{handle}")).status_code == 404
        users.revoke(kept.id)
        assert (await his.get("/")).status_code == 401


async def test_watch_shows_what_a_server_over_stdio_runs_to_who_opens_it_first(
    place: Ground,
) -> None:
    config = place.config()
    async with open_lab(place.folder, state_dir=config.state_dir) as lab:
        handle = await lab.start(name="over-stdio")
        await lab.cell(handle, "print('seen', 6 * 7)")
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "seer_mcp.cli", "watch", "--no-browser", "--state", str(config.state_dir)),
            cwd=place.folder,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            said = (await asyncio.wait_for(process.stdout.readline(), 30)).decode()
            address = said.split()[-1]
            base = address[: address.index("/enter")]
            async with httpx2.AsyncClient(base_url=base) as http:
                assert (await http.get("/cards")).status_code == 401
                assert (await http.get("/", headers={"Host": "evil.example"})).status_code == 421
                assert (await http.get("/enter?once=guess")).status_code == 401
                assert (await http.get(address)).status_code == 303
                assert "over-stdio" in (await http.get("/")).text
                page = (await http.get(f"/s/{handle}")).text
                assert "seen 42" in page and "Stop the sandbox" not in page
                for act in ("stop", "interrupt", "share"):
                    answer = await http.post(f"/s/{handle}/{act}", headers={"Origin": base})
                    assert answer.status_code == 403
                events = stream(http, f"/s/{handle}/events")
                await lab.cell(handle, "print('more', 6 * 7)")
                async with asyncio.timeout(20):
                    while "more 42" not in str(await anext(events)):
                        pass
                await events.aclose()
            async with httpx2.AsyncClient(base_url=base) as second:
                assert (await second.get(address)).status_code == 401
        finally:
            process.terminate()
            assert await asyncio.wait_for(process.wait(), 20) == 0


def evil_cells() -> list[dict[str, Any]]:
    data = {"text/html": EVIL, "text/plain": EVIL, "application/javascript": "alert(1)"}
    return [
        {
            "cell_type": "code",
            "id": f'a"{EVIL}',
            "source": EVIL,
            "execution_count": EVIL,
            "metadata": {},
            "outputs": [
                {"output_type": "stream", "name": EVIL, "text": EVIL},
                {"output_type": "display_data", "data": data},
                {"output_type": "display_data", "data": {"image/svg+xml": f"<svg>{EVIL}</svg>"}},
                {
                    "output_type": "display_data",
                    "data": {"image/png": f'x" onerror="alert(1){EVIL}', "text/plain": EVIL},
                },
                {"output_type": "display_data", "data": {"text/markdown": EVIL}},
                {"output_type": "error", "ename": EVIL, "evalue": EVIL, "traceback": [EVIL]},
            ],
        },
        {
            "cell_type": "markdown",
            "id": "m",
            "source": f"{EVIL}\n[x](javascript:alert(1)) ![x](http://evil.example/x.png)",
        },
        {"cell_type": "raw", "id": "r", "source": EVIL},
        {
            "cell_type": "code",
            "metadata": {"seer": {"state": EVIL, "seconds": "x"}},
            "source": [EVIL],
        },
    ]


def test_nothing_of_a_notebook_becomes_markup(tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text(
        json.dumps({"cells": evil_cells(), "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    html = "".join(cell.html for cell in read_cells(path))
    tags = set(re.findall(r"</?([^\s>]*)", html))
    assert tags <= {"article", "header", "span", "pre", "code", "div", "p", "a", "img"}, tags
    assert "<img" not in html.replace('<img src="data:image/', "")  # where no script can run
    assert "javascript:" not in html.replace("(javascript:", "")
    assert not re.search(
        r"src=\"(?!data:image/)", html
    )  # nothing is fetched: a picture becomes a link
    assert output_html(
        {"output_type": "display_data", "data": {"image/png": "iVBORw0KGgo="}}
    ).startswith('<img src="data:image/png')
    assert cell_html({}, 1).id == "cell-1"


def test_a_card_tells_the_gpu_that_the_notebook_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.ipynb"
    noted = {"seer": {"environment": {"gpu": "2 x H100"}, "cost": "$1.20"}}
    path.write_text(json.dumps({"metadata": noted, "cells": []}))
    assert gpu_in(metadata_of(path)) == "2 x H100"
    path.write_text("[]")
    assert gpu_in(metadata_of(path)) == gpu_in({"seer": "x"}) == ""
