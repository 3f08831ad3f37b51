"""What a cell costs: our server beside a 60-line server around one kernel, in one run.

uv run python benchmarks/run_cell.py [--calls 50] [--out run_cell.json] [--page docs/performance.md]

Prints a table of medians and ratios and writes JSON. The machine is noisy: read the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import nbformat
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from page import machine, replace_section
from rich.console import Console
from rich.table import Table

from seer_mcp.config import from_environment
from seer_mcp.http import Serving, build_app

HERE = Path(__file__).parent
TOKEN = "benchmark-token-of-no-value"
LINES_2000 = "for i in range(2000):\n    print(i, 'abcdefghij')"
PACED_2000 = "import time\nfor i in range(2000):\n    print(i)\n    time.sleep(0.002)"
TEN_MB = "print('x' * 10_000_000)"
DISPLAYS_300 = "from IPython.display import display\nfor i in range(300):\n    display(i)"

Call = Callable[[], Awaitable[Any]]


async def median(call: Call, calls: int) -> float:
    """Median seconds of `calls` calls, after three to warm up."""
    samples: list[float] = []
    for i in range(calls + 3):
        began = time.perf_counter()
        result = await call()
        if result.is_error:
            raise RuntimeError(result.content[0].text)
        if i >= 3:
            samples.append(time.perf_counter() - began)
    return statistics.median(samples)


async def interleaved(first: Call, second: Call, calls: int) -> tuple[float, float]:
    """Medians of two calls taken in turn, so that both meet the same machine."""
    samples: tuple[list[float], list[float]] = ([], [])
    for i in range(calls + 3):
        for call, kept in zip((first, second), samples, strict=True):
            began = time.perf_counter()
            result = await call()
            if result.is_error:
                raise RuntimeError(result.content[0].text)
            if i >= 3:
                kept.append(time.perf_counter() - began)
    return statistics.median(samples[0]), statistics.median(samples[1])


def stdio(*arguments: str, folder: Path) -> StdioServerParameters:
    environment = {**os.environ, "CLAUDE_PROJECT_DIR": str(folder)}
    return StdioServerParameters(
        command=sys.executable, args=list(arguments), env=environment, cwd=str(folder)
    )


def ours(folder: Path) -> StdioServerParameters:
    flags = ("--state", str(folder / "state"), "--on-exit", "stop")
    return stdio("-m", "seer_mcp.cli", "stdio", *flags, folder=folder)


async def start(client: Client, **arguments: Any) -> tuple[str, Path]:
    result = await client.call_tool("start_sandbox", arguments)
    if result.is_error:
        raise RuntimeError(result.content[0].text)
    kept = result.meta["seer/sandbox"]
    return kept["handle"], Path(kept["notebook"])


def cell(client: Client, sandbox: str, source: str) -> Call:
    return lambda: client.call_tool("create_cell", {"sandbox": sandbox, "source": source})


def floor(client: Client, source: str) -> Call:
    return lambda: client.call_tool("run", {"code": source})


def notebook_of(path: Path, cells: int) -> str:
    """A notebook of `cells` executed cells; its path."""
    book = nbformat.v4.new_notebook()
    for i in range(cells):
        new = nbformat.v4.new_code_cell(f"# cell {i}\n1+1", execution_count=i + 1)
        new.outputs = [
            nbformat.v4.new_output("execute_result", {"text/plain": "2"}, execution_count=i + 1)
        ]
        book.cells.append(new)
    nbformat.write(book, path)
    return str(path)


async def over_stdio(calls: int, folder: Path) -> dict[str, Any]:
    async with AsyncExitStack() as stack:
        server = stdio(str(HERE / "floor_server.py"), folder=folder)
        base = await stack.enter_async_context(Client(server))
        client = await stack.enter_async_context(Client(ours(folder)))
        sandbox, path = await start(client, name="one")
        found: dict[str, Any] = {}
        found["floor 1+1"], found["create_cell 1+1"] = await interleaved(
            floor(base, "1+1"), cell(client, sandbox, "1+1"), calls
        )
        saved = json.loads(path.read_text())["cells"]
        assert len(saved) == calls + 3, "every cell is in the notebook"

        small, _ = await start(client, notebook=notebook_of(folder / "ten.ipynb", 10))
        large, _ = await start(client, notebook=notebook_of(folder / "thousand.ipynb", 1000))
        found["1+1 at 10 cells"], found["1+1 at 1,000 cells"] = await interleaved(
            cell(client, small, "1+1"), cell(client, large, "1+1"), calls
        )
        middle, _ = await start(client, notebook=notebook_of(folder / "half.ipynb", 500))
        found["300 displays at 500 cells"] = await median(cell(client, middle, DISPLAYS_300), 5)

        found["2,000 prints, kernel alone"], found["2,000 prints"] = await interleaved(
            floor(base, LINES_2000), cell(client, sandbox, LINES_2000), 5
        )
        (
            found["2,000 prints in 4 s, kernel alone"],
            found["2,000 prints in 4 s"],
        ) = await interleaved(floor(base, PACED_2000), cell(client, sandbox, PACED_2000), 1)
        began = time.perf_counter()
        result = await cell(client, sandbox, TEN_MB)()
        found["10 MB printed"] = time.perf_counter() - began
        texts = [block.text for block in result.content if block.type == "text"]
        found["10 MB: characters in the answer"] = sum(map(len, texts))
        id = result.meta["seer/run"]["cell"]
        kept = list(path.with_name(f"{path.stem}.outputs").glob(f"{id}-*.txt"))
        found["10 MB: bytes kept"] = sum(file.stat().st_size for file in kept)
        return found


async def http_in_memory(calls: int, folder: Path) -> dict[str, Any]:
    """Both servers as ASGI applications in this process: HTTP without a network."""
    sys.path.insert(0, str(HERE))
    from floor_server import server as floor_server

    async with AsyncExitStack() as stack:

        async def connected(app: Any, port: int) -> Client:
            await stack.enter_async_context(app.router.lifespan_context(app))
            url = f"http://127.0.0.1:{port}"
            web = httpx.AsyncClient(
                transport=httpx.ASGITransport(app),
                base_url=url,
                headers={"Authorization": f"Bearer {TOKEN}"},
                timeout=60,
            )
            await stack.enter_async_context(web)
            transport = streamable_http_client(f"{url}/mcp", http_client=web)
            return await stack.enter_async_context(Client(transport))

        config = from_environment(
            {**os.environ}, folder, state=str(folder / "state-http"), on_exit="stop"
        )
        base = await connected(floor_server.streamable_http_app(), 8000)
        client = await connected(build_app(config, Serving("127.0.0.1", 8001, TOKEN)), 8001)
        sandbox, _ = await start(client, name="http")
        first, second = await interleaved(floor(base, "1+1"), cell(client, sandbox, "1+1"), calls)
        return {"floor 1+1": first, "create_cell 1+1": second}


async def start_up(calls: int, folder: Path) -> dict[str, Any]:
    """Process start to tools/list answered, ours and a trivial server's in turn."""
    samples: dict[str, list[float]] = {"trivial": [], "ours": []}
    size = 0
    for i in range(calls + 1):
        for name, server in (
            ("trivial", stdio(str(HERE / "trivial_server.py"), folder=folder)),
            ("ours", ours(folder)),
        ):
            began = time.perf_counter()
            async with Client(server) as client:
                listed = await client.list_tools()
                if i:
                    samples[name].append(time.perf_counter() - began)
            if name == "ours":
                size = len(listed.model_dump_json(by_alias=True, exclude_none=True))
    return {
        "trivial server to tools/list": statistics.median(samples["trivial"]),
        "process start to tools/list": statistics.median(samples["ours"]),
        "tools/list bytes": size,
    }


GOALS = (
    ("stdio", "create_cell 1+1", "floor 1+1", 2.0),
    ("http", "create_cell 1+1", "floor 1+1", 2.0),
    ("stdio", "1+1 at 1,000 cells", "1+1 at 10 cells", 1.3),
    ("stdio", "2,000 prints", "2,000 prints, kernel alone", 1.5),
    ("stdio", "2,000 prints in 4 s", "2,000 prints in 4 s, kernel alone", 1.5),
    ("start", "process start to tools/list", "trivial server to tools/list", 1.3),
)


def report(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for group, name, base, goal in GOALS:
        ours_s, base_s = found[group][name], found[group][base]
        rows.append(
            {
                "what": f"{group}: {name}",
                "seconds": ours_s,
                "beside": base_s,
                "ratio": ours_s / base_s,
                "goal": goal,
            }
        )
    for name, goal in (("300 displays at 500 cells", 1.0), ("10 MB printed", 3.0)):
        rows.append({"what": f"stdio: {name}", "seconds": found["stdio"][name], "goal": goal})
    table = Table("what", "s", "beside", "ratio", "goal", "", title="run_cell: medians, one run")
    for row in rows:
        ratio = row.get("ratio")
        met = (ratio if ratio is not None else row["seconds"]) <= row["goal"]
        table.add_row(
            row["what"],
            f"{row['seconds']:.4f}",
            f"{row['beside']:.4f}" if "beside" in row else "",
            f"{ratio:.2f}" if ratio is not None else "",
            f"≤ {row['goal']}" + ("×" if ratio is not None else " s"),
            "met" if met else "MISSED",
        )
    console = Console()
    console.print(table)
    console.print(
        f"10 MB: {found['stdio']['10 MB: bytes kept']:,} bytes kept, "
        f"{found['stdio']['10 MB: characters in the answer']:,} characters in the answer; "
        f"tools/list {found['start']['tools/list bytes']:,} bytes"
    )
    return rows


def section(rows: list[dict[str, Any]], whole: dict[str, Any]) -> str:
    """The table as a section of a page of the docs."""
    lines = [
        "## Beside the kernel alone",
        "",
        "Written by `uv run python benchmarks/run_cell.py --page docs/performance.md`. Medians of calls",
        "taken in turn with the baseline in one run; read the ratios, the seconds are this machine's.",
        "",
        "The baseline is [a server of about 60 lines](../benchmarks/floor_server.py) around one",
        "`jupyter_client` kernel: no notebook, no journal, nothing kept. For the start it is",
        "[a server with one empty tool](../benchmarks/trivial_server.py) on the same SDK.",
        "",
        "| what | seconds | baseline | ratio | goal |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        ratio, base = row.get("ratio"), row.get("beside")
        lines.append(
            f"| {row['what']} | {row['seconds']:.4f} | {'' if base is None else f'{base:.4f}'} | "
            f"{'' if ratio is None else f'{ratio:.2f}'} | ≤ {row['goal']}{' s' if ratio is None else ' ×'} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    stdio = whole["measured"]["stdio"]
    lines += [
        "",
        f"10 MB printed in one cell: {stdio['10 MB: bytes kept']:,} bytes kept beside the notebook,",
        f"{stdio['10 MB: characters in the answer']:,} characters in the answer. `tools/list` is",
        f"{whole['measured']['start']['tools/list bytes']:,} bytes.",
        "",
        f"{machine()}, {versions}; load before the run {whole['load']:.1f}.",
        "No GPU was there; none of this touches one.",
    ]
    return "\n".join(lines)


async def measure(calls: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made).resolve()
        return {
            "start": await start_up(5, folder),
            "stdio": await over_stdio(calls, folder),
            "http": await http_in_memory(calls, folder),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=50)
    parser.add_argument("--out", type=Path, default=HERE / "run_cell.json")
    parser.add_argument("--page", type=Path, help="replace the table in this page of the docs")
    flags = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    load = os.getloadavg()[0]
    found = asyncio.run(measure(flags.calls))
    rows = report(found)
    names = ("mcp", "ipykernel", "jupyter_client", "nbformat")
    whole = {
        "python": platform.python_version(),
        "platform": platform.system(),
        "cpus": os.cpu_count(),
        "load": load,
        "versions": {name: metadata.version(name) for name in names},
        "goals": rows,
        "measured": found,
    }
    flags.out.write_text(json.dumps(whole, indent=1) + "\n")
    if flags.page:
        replace_section(flags.page, "run_cell", section(rows, whole))


if __name__ == "__main__":
    main()
