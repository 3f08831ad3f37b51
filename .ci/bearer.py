"""Passes HTTP on to a server with a token added: python bearer.py PORT SERVER_PORT TOKEN_FILE

Everything else goes through as it came, the Host header above all.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

PORT, SERVER, TOKEN_FILE = int(sys.argv[1]), f"http://127.0.0.1:{sys.argv[2]}", Path(sys.argv[3])
HOP = {"connection", "transfer-encoding", "keep-alive", "date", "server"}
http = httpx2.AsyncClient(timeout=httpx2.Timeout(10, read=None))


async def passed(request: Request) -> Response:
    headers = [(name, value) for name, value in request.headers.items() if name not in HOP]
    headers.append(("authorization", f"Bearer {TOKEN_FILE.read_text().strip()}"))
    body = await request.body()
    asked = http.build_request(
        request.method, SERVER + request.url.path, headers=headers, content=body
    )
    answer = await http.send(asked, stream=True)

    async def parts() -> AsyncIterator[bytes]:
        try:
            async for part in answer.aiter_raw():
                yield part
        finally:
            await answer.aclose()

    kept = {name: value for name, value in answer.headers.items() if name not in HOP}
    return StreamingResponse(parts(), answer.status_code, kept)


@asynccontextmanager
async def life(_: Starlette) -> AsyncIterator[None]:
    async with http:
        yield


methods = ["GET", "POST", "DELETE", "OPTIONS"]
app = Starlette(routes=[Route("/{path:path}", passed, methods=methods)], lifespan=life)
uvicorn.run(app, port=PORT, log_level="warning", timeout_graceful_shutdown=1)
