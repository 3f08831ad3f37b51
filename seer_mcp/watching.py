"""The command `seer-mcp watch`: the pages on this machine, whichever servers run, for the one person who asked."""

from __future__ import annotations

import argparse
import asyncio
import signal
import socket
import webbrowser
from contextlib import suppress

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware

from .config import Config
from .errors import BadInput
from .http.gate import SameHost
from .watch import FolderSource, OneTime, Pages, Visitors

HOST = "127.0.0.1"


def build_watch(config: Config, at: int, once: OneTime) -> Starlette:
    """The ASGI application on port `at` of loopback; nothing can be changed through it."""
    names = [f"{HOST}:{at}", f"localhost:{at}"]
    same_host = Middleware(
        SameHost, hosts=names, origins=[f"http://{name}" for name in names], open_paths=()
    )
    pages = Pages(FolderSource(config), Visitors(once.check), secure=False, once=once)
    return Starlette(routes=pages.routes(), middleware=[same_host])


def run_watch(flags: argparse.Namespace, config: Config) -> int:
    try:
        listener = socket.create_server((HOST, flags.port or 0))
    except OSError as error:
        raise BadInput(
            "port", flags.port, f"{error.strerror}; leave --port out for a free one"
        ) from error
    once = OneTime()
    at = listener.getsockname()[1]
    address = f"http://{HOST}:{at}/enter?once={once.token}"
    print(f"Open this in a browser; it opens once: {address}\nCtrl-C ends it.", flush=True)
    settings = uvicorn.Config(
        build_watch(config, at, once),
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=1,
        server_header=False,
        proxy_headers=False,
    )
    for signum in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises it again when it has stopped
        signal.signal(signum, lambda *_: None)

    async def serve() -> None:
        serving = asyncio.ensure_future(uvicorn.Server(settings).serve(sockets=[listener]))
        if not flags.no_browser:
            with suppress(webbrowser.Error):  # the address is on the screen
                await asyncio.to_thread(webbrowser.open, address)
        await serving

    asyncio.run(serve())
    return 0
