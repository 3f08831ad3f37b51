"""What somebody without a token learns: nothing."""

from __future__ import annotations

import httpx2
import pytest

from seer_mcp.http import Serving, build_app

from .ground import TOKEN, Ground, http_server


@pytest.mark.anyio
async def test_s06_who_has_no_token_learns_nothing(place: Ground) -> None:
    config = place.config()
    routes = {
        getattr(r, "path", "") for r in build_app(config, Serving("127.0.0.1", 1, TOKEN)).routes
    }
    guessed = {"/", "/mcp", "/mcp/", "/health", "/api", "/notebooks", "/sse", "/messages/", "/docs"}
    guessed |= {"/.env", "/../.env", "/%2e%2e/state/http-token", "/openapi.json", "/favicon.ico"}
    assert "/mcp" in routes
    async with http_server(config) as server, server.lab() as lab, httpx2.AsyncClient() as http:
        started = await lab.call("start_sandbox", name="quiet-one")
        handle = started.meta["seer/sandbox"]["handle"]
        private = [TOKEN, str(place.folder), str(place.sockets), handle, "quiet-one", ".ipynb"]
        for path in sorted(routes | guessed | {f"/sandboxes/{handle}/notebook"}):
            for method in ("GET", "HEAD", "OPTIONS", "POST"):
                answer = await http.request(method, server.url.removesuffix("/mcp") + path)
                told = f"{answer.status_code} {dict(answer.headers)} {answer.text}"
                left = path == "/leave" and answer.headers.get("location") == "/"
                assert left or answer.status_code in (200, 307, 401, 403, 404, 405), told
                open_to_all = path.startswith("/.well-known/") or path in (
                    "/healthz",
                    "/readyz",
                    "/enter",
                )
                assert answer.status_code != 200 or open_to_all, told
                assert [text for text in private if text in told] == [], path
