"""How each peer is driven: the same few verbs for our server, jupyter-mcp-server and nbclient."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx2
import nbformat
import psutil
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client
from platformdirs import user_cache_path

HERE = Path(__file__).parent
JUPYTER_MCP = "jupyter-mcp-server==2.2.4"
NBCLIENT = ("nbclient", "ipykernel")
DEFAULT_ENV = user_cache_path("seer-mcp") / "peers"
LONGEST = 200.0  # seconds that any one call of a peer may take
TOKEN = "benchmark-token-of-no-value"


class PeerFailed(Exception):
    """A peer could not do what a case needs; the text is what it said."""


FAILURES = (PeerFailed, MCPError, TimeoutError, OSError, httpx2.HTTPError, ExceptionGroup)


@dataclass
class Said:
    """What the caller of one cell got back, and when."""

    seconds: float
    text: str
    is_error: bool


@dataclass
class Book:
    """One notebook of a peer, with a kernel of its own."""

    path: Path
    key: str


class Peer(Protocol):
    name: str
    slow: bool
    """A call takes about a second: fewer of them are made."""

    async def open(self, cells: int = 0) -> Book: ...
    async def run(self, book: Book, source: str) -> Said: ...
    async def close(self, book: Book) -> None: ...


class McpPeer(Peer, Protocol):
    """A peer that answers other calls while a cell runs."""

    client: Client

    async def read(self, book: Book) -> None: ...


def made_notebook(path: Path, cells: int) -> Path:
    """A notebook of `cells` executed cells."""
    book = nbformat.v4.new_notebook()
    book.metadata["kernelspec"] = {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for i in range(cells):
        cell = nbformat.v4.new_code_cell(f"# cell {i}\n1+1", execution_count=i + 1)
        cell.outputs = [
            nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=i + 1)
        ]
        book.cells.append(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(book, path)
    return path


def answer_of(result: Any) -> str:
    return "\n".join(getattr(block, "text", "") or "" for block in result.content)


async def called(client: Client, tool: str, **arguments: Any) -> Said:
    began = time.perf_counter()
    async with asyncio.timeout(LONGEST):
        result: Any = await client.call_tool(tool, arguments)
    return Said(time.perf_counter() - began, answer_of(result), bool(result.is_error))


async def must(client: Client, tool: str, **arguments: Any) -> Any:
    async with asyncio.timeout(LONGEST):
        result: Any = await client.call_tool(tool, arguments)
    if result.is_error:
        raise PeerFailed(f"{tool}: {answer_of(result)[:300]}")
    return result


# -- ours -------------------------------------------------------------------------------------


class Seer:
    name = "seer-mcp"
    slow = False

    def __init__(self, client: Client, folder: Path) -> None:
        self.client = client
        self._folder = folder
        self._count = 0

    async def open(self, cells: int = 0) -> Book:
        self._count += 1
        arguments: dict[str, Any] = {"name": f"book-{self._count}"}
        if cells:
            path = made_notebook(self._folder / f"made-{self._count}.ipynb", cells)
            arguments["notebook"] = str(path)
        result = await must(self.client, "start_sandbox", **arguments)
        kept = result.meta["seer/sandbox"]
        return Book(Path(kept["notebook"]), kept["handle"])

    async def run(self, book: Book, source: str) -> Said:
        return await called(self.client, "create_cell", sandbox=book.key, source=source)

    async def read(self, book: Book) -> None:
        await must(self.client, "read_outputs", sandbox=book.key, wait=0)

    async def close(self, book: Book) -> None:
        await must(self.client, "stop_sandbox", sandbox=book.key)


@asynccontextmanager
async def seer(folder: Path) -> AsyncIterator[Seer]:
    """Our server as a process of its own, over stdio."""
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--state", str(folder / "state"), "--on-exit", "stop"]
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "seer_mcp.cli", "stdio", *flags],
        env={**os.environ, "CLAUDE_PROJECT_DIR": str(folder)},
        cwd=str(folder),
    )
    with (folder / "server.log").open("ab") as log:
        async with Client(stdio_client(server, errlog=log)) as client:  # type: ignore[arg-type]
            yield Seer(client, folder)


# -- jupyter-mcp-server -----------------------------------------------------------------------


class JupyterMcp:
    slow = True

    def __init__(self, name: str, client: Client, root: Path) -> None:
        self.name = name
        self.client = client
        self._root = root
        self._count = 0

    async def open(self, cells: int = 0) -> Book:
        self._count += 1
        name = f"book-{self.name}-{self._count}".replace(" ", "-")
        path = self._root / f"{name}.ipynb"
        if cells:
            made_notebook(path, cells)
        await must(
            self.client,
            "use_notebook",
            notebook_name=name,
            notebook_path=path.name,
            mode="connect" if cells else "create",
            kernel_id="NEW",
        )
        return Book(path, name)

    async def run(self, book: Book, source: str) -> Said:
        """Into the notebook opened last: this server keeps a current one."""
        return await called(
            self.client, "insert_execute_code_cell", cell_index=-1, cell_source=source
        )

    async def read(self, book: Book) -> None:
        await must(self.client, "read_cell", cell_index=1)

    async def close(self, book: Book) -> None:
        await must(self.client, "unuse_notebook", notebook_name=book.key)


@asynccontextmanager
async def jupyter_lab(env: Path, folder: Path) -> AsyncIterator[tuple[str, dict[str, str], Path]]:
    """A JupyterLab for jupyter-mcp-server: its URL, its environment, its root folder."""
    root = folder / "root"
    root.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH")},
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PATH": f"{env / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    url = f"http://127.0.0.1:{port}"
    command = [
        *(str(env / "bin" / "jupyter-lab"), "--no-browser", "--allow-root", "--ip=127.0.0.1"),
        *(f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}"),
        f"--ServerApp.root_dir={root}",
    ]
    with child(command, folder, environment):
        await answering(f"{url}/api/status?token={TOKEN}", 60)
        yield url, environment, root


@asynccontextmanager
async def jupyter_mcp(env: Path, folder: Path) -> AsyncIterator[JupyterMcp]:
    """jupyter-mcp-server as its documentation starts it: a process over stdio, beside a JupyterLab."""
    async with jupyter_lab(env, folder) as (url, environment, root):
        flags = ["--jupyter-url", url, "--jupyter-token", TOKEN]
        server = StdioServerParameters(
            command=str(env / "bin" / "jupyter-mcp-server"),
            args=["start", "--transport", "stdio", *flags],
            env=environment,
            cwd=str(folder),
        )
        with (folder / "mcp.log").open("ab") as log:
            async with Client(stdio_client(server, errlog=log)) as client:  # type: ignore[arg-type]
                yield JupyterMcp("jupyter-mcp-server", client, root)


@asynccontextmanager
async def jupyter_mcp_extension(env: Path, folder: Path) -> AsyncIterator[JupyterMcp]:
    """The same as an extension inside the JupyterLab, over HTTP: its fastest layout."""
    async with jupyter_lab(env, folder) as (url, _, root):
        headers = {"Authorization": f"Bearer {TOKEN}"}
        async with httpx2.AsyncClient(
            headers=headers, timeout=httpx2.Timeout(30, read=LONGEST), follow_redirects=True
        ) as http:
            transport = streamable_http_client(
                f"{url}/mcp", http_client=http, max_sse_event_size=100_000_000
            )
            async with Client(transport) as client:
                yield JupyterMcp("the same as extension", client, root)


# -- nbclient ---------------------------------------------------------------------------------


class Nbclient:
    name = "nbclient"
    slow = False

    def __init__(self, process: asyncio.subprocess.Process, folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._count = 0

    async def _ask(self, **request: Any) -> Said:
        assert self._process.stdin is not None and self._process.stdout is not None
        began = time.perf_counter()
        self._process.stdin.write((json.dumps(request) + "\n").encode())
        async with asyncio.timeout(LONGEST):
            line = await self._process.stdout.readline()
        if not line:
            raise PeerFailed("its process ended")
        answer = json.loads(line)
        return Said(time.perf_counter() - began, answer.get("error", ""), not answer["ok"])

    async def open(self, cells: int = 0) -> Book:
        self._count += 1
        path = made_notebook(self._folder / f"book-{self._count}.ipynb", cells)
        if (said := await self._ask(open=str(path))).is_error:
            raise PeerFailed(said.text)
        return Book(path, "")

    async def run(self, book: Book, source: str) -> Said:
        return await self._ask(run=source)

    async def close(self, book: Book) -> None:
        await self._ask(close=True)


@asynccontextmanager
async def nbclient(env: Path, folder: Path) -> AsyncIterator[Nbclient]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "nbclient.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            str(env / "bin" / "python"),
            str(HERE / "nbclient_peer.py"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield Nbclient(process, folder)
    finally:
        await asyncio.to_thread(end_family, process.pid)
        await process.wait()


# -- processes and environments ---------------------------------------------------------------


def end_family(pid: int) -> None:
    """SIGTERM, then SIGKILL, for a process that we started and what it started."""
    try:
        top = psutil.Process(pid)
        family = [top, *top.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    end = time.monotonic() + 8  # waiting for the first process is left to who started it
    while any(map(living, family)) and time.monotonic() < end:
        time.sleep(0.05)
    for process in filter(living, family):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def living(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def child(command: list[str], folder: Path, environment: dict[str, str]):
    """A process that works in `folder` and writes its log there."""
    with (folder / "log").open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        end_family(process.pid)
        process.wait(10)


async def answering(url: str, seconds: float) -> None:
    """Wait until a GET is answered. Raises PeerFailed."""

    def once() -> bool:
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                return answer.status < 500
        except urllib.error.HTTPError as error:
            return error.code < 500
        except OSError:
            return False

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if await asyncio.to_thread(once):
            return
        await asyncio.sleep(0.1)
    raise PeerFailed(f"no answer from {url.partition('?')[0]} within {seconds:.0f} s")


def made_env(folder: Path) -> list[str]:
    """Make the peers' environment if it is not there; what could not be installed, in sentences."""
    python = folder / "bin" / "python"
    problems: list[str] = []
    try:
        if not python.exists():
            installed("uv", "venv", "--quiet", str(folder))
        install = ("uv", "pip", "install", "--quiet", "--python", str(python))
        if not (folder / "bin" / "jupyter-mcp-server").exists():
            try:
                installed(*install, JUPYTER_MCP, "jupyterlab", "jupyter-collaboration", *NBCLIENT)
            except PeerFailed as error:
                problems.append(f"jupyter-mcp-server could not be installed: {error}")
        if problems:
            installed(*install, *NBCLIENT)
    except PeerFailed as error:
        problems.append(f"nbclient could not be installed: {error}")
    return problems


def installed(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(str(error)) from error
    if done.returncode:
        raise PeerFailed((done.stderr.strip() or done.stdout.strip())[-300:])


def versions(env: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Versions of packages in that environment."""
    found: dict[str, str] = {}
    for name in names:
        stem = name.replace("-", "_")
        for info in (env / "lib").glob(f"python*/site-packages/{stem}-*.dist-info"):
            found[name] = info.name.removeprefix(f"{stem}-").removesuffix(".dist-info")
    return found
