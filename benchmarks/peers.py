"""Our server beside jupyter-mcp-server and nbclient: the same cells, in one run, on one machine.

uv run python benchmarks/peers.py [--quick] [--out peers.json] [--page docs/performance.md]

Makes an environment for the peers itself (--peers-env DIR keeps it); a peer that cannot be
installed is said so and left out. Prints one table with ratios and writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from driven import (
    DEFAULT_ENV,
    FAILURES,
    Book,
    McpPeer,
    Peer,
    PeerFailed,
    jupyter_mcp,
    jupyter_mcp_extension,
    made_env,
    nbclient,
    seer,
    versions,
)
from page import machine, replace_section
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
QUIET_LOAD = 1.5
OURS = "seer-mcp"
RIVAL = "jupyter-mcp-server"

LINES = 20_000
LINES_20K = f"for i in range({LINES}):\n    print(i, 'abcdefghij')"
CHARACTERS = 10_000_001
TEN_MB = "print('x' * 10_000_000)"
DISPLAYS = 300
DISPLAYS_300 = f"from IPython.display import display\nfor i in range({DISPLAYS}):\n    display(i)"
DEATH_SECONDS = 130
DEATH = "import os\nprint('before')\nos._exit(7)"
LIVELY = (
    "import time\nend = time.time() + {seconds}\nwhile time.time() < end:\n"
    "    print('x' * 100)\n    time.sleep(0.01)"
)
FLOOD = "import time\nend = time.time() + {seconds}\nwhile time.time() < end:\n    print('x' * 100)"
TICKS = 80
TICKING = f"import time\nfor i in range({TICKS}):\n    print('tick', i)\n    time.sleep(0.1)"

Facts = dict[str, Any]
Found = dict[str, dict[str, Facts]]


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    calls: int
    slow_calls: int
    sizes: tuple[int, ...]
    growth_calls: int
    busy_seconds: float


WHOLE = Plan(60, 20, (10, 100, 1000), 5, 10.0)
QUICK = Plan(20, 5, (10, 100), 3, 4.0)


def percentile(samples: Sequence[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def saved_text(book: Book) -> str:
    """All text that is kept of a notebook's outputs: in the file and, for ours, beside it."""
    cells = json.loads(book.path.read_text())["cells"]
    beside = book.path.with_name(f"{book.path.stem}.outputs")
    kept: list[str] = []
    for cell in cells:
        files = cell["metadata"].get("seer", {}).get("files", {})
        for index, output in enumerate(cell.get("outputs", [])):
            if str(index) in files:
                kept.append((beside.parent / files[str(index)]).read_text())
            elif "text" in output:
                kept.append("".join(output["text"]))
    return "".join(kept)


def longest_line(text: str) -> int:
    return max((len(line) for line in text.splitlines() if set(line) == {"x"}), default=0)


def displays_kept(book: Book) -> int:
    cells = json.loads(book.path.read_text())["cells"]
    return sum(o["output_type"] == "display_data" for c in cells for o in c.get("outputs", []))


async def settled(kept: Callable[[], int], wanted: int, seconds: float = 6.0) -> int:
    """What is kept once a peer that saves later has had its time. Raises PeerFailed."""
    end = time.monotonic() + seconds
    while True:
        late = time.monotonic() > end
        try:
            if (now := kept()) >= wanted or late:
                return now
        except ValueError as error:  # the file is just being written, and not at once
            if late:
                raise PeerFailed(f"its file is no notebook: {error}") from error
        await asyncio.sleep(0.25)


async def each(
    peers: Sequence[Peer], measure: Callable[[Any], Awaitable[Facts]], limit: float
) -> dict[str, Facts]:
    """One measurement of every peer in turn; a peer that fails or is too slow is a fact too."""
    found: dict[str, Facts] = {}
    for peer in peers:
        try:
            async with asyncio.timeout(limit):
                found[peer.name] = await measure(peer)
        except FAILURES as error:
            found[peer.name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


# -- the cases --------------------------------------------------------------------------------


async def one_plus_one(peers: Sequence[Peer], plan: Plan) -> dict[str, Facts]:
    """The peers take turns, call by call, so that all meet the same machine."""
    books = [(peer, await peer.open()) for peer in peers]
    samples: dict[str, list[float]] = {peer.name: [] for peer in peers}
    for round in range(plan.calls + 3):
        for peer, book in books:
            if round < (plan.slow_calls if peer.slow else plan.calls) + 3:
                said = await peer.run(book, "1+1")
                if said.is_error:
                    raise PeerFailed(f"{peer.name}: {said.text[:300]}")
                if round >= 3:
                    samples[peer.name].append(said.seconds)
    found: dict[str, Facts] = {}
    for peer, book in books:
        found[peer.name] = {
            "p50": statistics.median(samples[peer.name]),
            "p95": percentile(samples[peer.name], 0.95),
            "calls": len(samples[peer.name]),
        }
        await peer.close(book)
    return found


async def growth(peers: Sequence[Peer], plan: Plan) -> dict[str, Facts]:
    async def measure(peer: Peer) -> Facts:
        facts: Facts = {}
        for cells in plan.sizes:
            book = await peer.open(cells)
            await peer.run(book, "1+1")
            times = [(await peer.run(book, "1+1")).seconds for _ in range(plan.growth_calls)]
            facts[f"at {cells}"] = statistics.median(times)
            await peer.close(book)
        return facts

    return await each(peers, measure, 200)


def printing(source: str, kept: Callable[[Book], int], wanted: int):
    async def measure(peer: Peer) -> Facts:
        book = await peer.open()
        await peer.run(book, "1+1")
        said = await peer.run(book, source)
        facts: Facts = {
            "seconds": said.seconds,
            "kept": await settled(lambda: kept(book), wanted),
            "characters in the answer": len(said.text),
            "isError": said.is_error,
        }
        await peer.close(book)
        return facts

    return measure


async def outputs(peers: Sequence[Peer]) -> Found:
    lines = printing(LINES_20K, lambda b: len(re.findall(r"\d+ abcdefghij", saved_text(b))), LINES)
    line = printing(TEN_MB, lambda b: longest_line(saved_text(b)), CHARACTERS - 1)
    return {
        "20,000 lines": await each(peers, lines, 90),
        "10 MB in one line": await each(peers, line, 90),
        "300 displays": await each(peers, printing(DISPLAYS_300, displays_kept, DISPLAYS), 90),
    }


async def death(peers: Sequence[Peer]) -> dict[str, Facts]:
    async def measure(peer: Peer) -> Facts:
        book = await peer.open()
        await peer.run(book, "1+1")
        try:
            async with asyncio.timeout(DEATH_SECONDS):
                said = await peer.run(book, DEATH)
        except TimeoutError:
            return {"seconds": f"> {DEATH_SECONDS} s", "isError": False, "says so": False}
        named = re.search(r"\b(dead|died|death)\b", said.text, re.I)
        return {
            "seconds": said.seconds,
            "isError": said.is_error,
            "says so": named is not None,
            "text": said.text[:200],
        }

    quick = await each([peer for peer in peers if not peer.slow], measure, 60)
    # The others need a minute or two, in which nothing happens: they may wait side by side.
    rest = [each([peer], measure, DEATH_SECONDS + 40) for peer in peers if peer.slow]
    for found in await asyncio.gather(*rest):
        quick.update(found)
    return quick


def busy_with(source: str, seconds: float):
    """Other calls of the same client, one after the other, for as long as a cell runs."""

    async def measure(peer: McpPeer) -> Facts:
        book = await peer.open()
        await peer.run(book, "1+1")
        cell = asyncio.create_task(peer.run(book, source.format(seconds=seconds)))
        await asyncio.sleep(0.5)
        calls = {"tools/list": lambda: peer.client.list_tools(cache_mode="bypass")}
        calls["read"] = lambda: peer.read(book)
        times: dict[str, list[float]] = {name: [] for name in calls}
        while not cell.done():
            for name, call in calls.items():
                began = time.perf_counter()
                await call()
                times[name].append(time.perf_counter() - began)
            await asyncio.sleep(0.01)
        await cell
        await peer.close(book)
        return {
            name: {"p50": percentile(t, 0.5), "p99": percentile(t, 0.99), "calls": len(t)}
            for name, t in times.items()
        }

    return measure


async def cancel(peers: Sequence[Peer]) -> dict[str, Facts]:
    """The client gives up after 2 s of an 8 s cell: what is in the notebook afterwards?"""

    async def measure(peer: Peer) -> Facts:
        book = await peer.open()
        await peer.run(book, "1+1")
        cell = asyncio.create_task(peer.run(book, TICKING))
        await asyncio.sleep(2)
        began = time.perf_counter()
        cell.cancel()
        await asyncio.wait([cell], timeout=30)
        ended = time.perf_counter() - began
        kept = await settled(lambda: saved_text(book).count("tick"), TICKS, 15)
        return {"seconds": ended, "kept": kept, "of": TICKS}

    return await each(peers, measure, 90)


async def measured(peers: Sequence[Peer], plan: Plan, tell: Callable[[str], None]) -> Found:
    over_mcp = [peer for peer in peers if hasattr(peer, "client")]
    found: Found = {}

    async def case(name: str, work: Awaitable[Any]) -> Any:
        began = time.monotonic()
        result = await work
        tell(f"{name}: {time.monotonic() - began:.0f} s")
        return result

    found["1+1"] = await case("1+1", one_plus_one(peers, plan))
    found["growth"] = await case("growth", growth(peers, plan))
    found.update(await case("outputs", outputs(peers)))
    for name, source in (("lively", LIVELY), ("flood", FLOOD)):
        work = each(over_mcp, busy_with(source, plan.busy_seconds), 120)
        found[f"other calls, {name}"] = await case(f"other calls, {name}", work)
    found["cancel"] = await case("cancel", cancel(over_mcp))
    found["death"] = await case("death", death(peers))
    return found


# -- the report -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of the table: where its figure stands, and whether a ratio makes sense."""

    what: str
    case: str
    path: tuple[str, ...]
    kind: str = "time"

    def value(self, found: Found, peer: str) -> Any:
        facts: Any = found.get(self.case, {}).get(peer)
        if facts is None:
            return None
        if "failed" in facts:
            return "failed"
        for key in self.path:
            facts = facts.get(key) if facts is not None else None
        return facts


def rows(plan: Plan) -> list[Row]:
    sizes = [Row(f"`1+1` at {n:,} cells", "growth", (f"at {n}",)) for n in plan.sizes]
    busy = [
        Row(f"`{what}` while a cell {verb}, {p}", f"other calls, {kind}", (what, p))
        for kind, verb in (("lively", "prints"), ("flood", "floods"))
        for what in ("tools/list", "read")
        for p in ("p50", "p99")
    ]
    return [
        Row("`1+1` into a notebook, p50", "1+1", ("p50",)),
        Row("`1+1` into a notebook, p95", "1+1", ("p95",)),
        *sizes,
        Row("20,000 lines", "20,000 lines", ("seconds",)),
        Row("… lines kept", "20,000 lines", ("kept",), "count"),
        Row("10 MB in one line", "10 MB in one line", ("seconds",)),
        Row("… characters kept", "10 MB in one line", ("kept",), "count"),
        Row(
            "… characters in the answer",
            "10 MB in one line",
            ("characters in the answer",),
            "count",
        ),
        Row("300 displays", "300 displays", ("seconds",)),
        Row("… displays kept", "300 displays", ("kept",), "count"),
        Row("kernel dies: the caller hears after", "death", ("seconds",)),
        Row("… as an error", "death", ("isError",), "yes"),
        Row("… that names the death", "death", ("says so",), "yes"),
        *busy,
        Row("a cancelled call ends after", "cancel", ("seconds",)),
        Row(f"… lines kept of the {TICKS} that its cell printed", "cancel", ("kept",), "count"),
    ]


def shown(value: Any, kind: str) -> str:
    if value is None:
        return "–" if kind != "time" else "n/a"
    if isinstance(value, str):
        return value
    if kind == "yes":
        return "yes" if value else "no"
    if kind == "count":
        return f"{value:,}"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def ratio(ours: Any, theirs: Any, kind: str) -> str:
    if kind != "time" or not isinstance(ours, float) or not isinstance(theirs, float) or not ours:
        return ""
    times = theirs / ours
    return f"{times:.0f} ×" if times >= 10 else f"{times:.1f} ×"


def table_of(found: Found, plan: Plan, names: Sequence[str]) -> list[list[str]]:
    others = [name for name in names if name != OURS]
    lines = [["what", OURS, *(f for name in others for f in (name, "ratio"))]]
    for row in rows(plan):
        ours = row.value(found, OURS)
        line = [row.what, shown(ours, row.kind)]
        for name in others:
            theirs = row.value(found, name)
            line += [shown(theirs, row.kind), ratio(ours, theirs, row.kind)]
        lines.append(line)
    return lines


def goals(found: Found) -> list[Facts]:
    """The goals of this comparison, and whether this run met them."""

    def figure(case: str, peer: str, *path: str) -> float | None:
        value = Row("", case, path).value(found, peer)
        return value if isinstance(value, float) else None

    ours, theirs = figure("1+1", OURS, "p50"), figure("1+1", RIVAL, "p50")
    times = theirs / ours if ours and theirs else None
    heard = figure("death", OURS, "seconds")
    p99s = [
        figure(f"other calls, {kind}", OURS, what, "p99")
        for kind in ("lively", "flood")
        for what in ("tools/list", "read")
    ]
    slowest = max(p99s) if all(p is not None for p in p99s) else None  # type: ignore[type-var]
    return [
        {
            "goal": f"`1+1` into a notebook is at least 50 × faster than {RIVAL}",
            "found": "not measured" if times is None else f"{times:.0f} ×",
            "met": times is not None and times >= 50,
        },
        {
            "goal": "a kernel death is said within 2 s",
            "found": "not measured" if heard is None else f"{heard:.2f} s",
            "met": heard is not None and heard <= 2,
        },
        {
            "goal": "p99 of other calls is at most 0.2 s during any cell",
            "found": "not measured" if slowest is None else f"{slowest * 1000:.0f} ms",
            "met": slowest is not None and slowest <= 0.2,
        },
    ]


def section(whole: Facts) -> str:
    """The comparison as a section of a page of the docs."""
    head, *body = whole["table"]
    lines = [
        "## Beside other systems",
        "",
        "Written by `uv run python benchmarks/peers.py --page docs/performance.md`: the same cells in one run,",
        "the peers in turn, each over the same kind of connection (stdio; the extension over HTTP on loopback;",
        "nbclient is a library, driven in a process of its own, and saves the notebook after each cell).",
        f"A ratio is the peer's time over ours. `{RIVAL}` runs as its documentation starts it, beside a",
        "JupyterLab; *the same as extension* is that server inside the JupyterLab process.",
        "",
        f"| {' | '.join(head)} |",
        f"|{' --- |' * len(head)}",
        *(f"| {' | '.join(line)} |" for line in body),
        "",
        "| goal | found | |",
        "| --- | --- | --- |",
        *(
            f"| {g['goal']} | {g['found']} | {'met' if g['met'] else '**missed**'} |"
            for g in whole["goals"]
        ),
        "",
        *(f"{problem}" for problem in whole["problems"]),
        f"{whole['machine']}; {', '.join(f'{n} {v}' for n, v in whole['versions'].items())}.",
        f"Load of the machine before the run: {whole['load']:.1f}"
        + ("; other work was going on, so read the ratios." if whole["load"] > QUIET_LOAD else "."),
    ]
    return "\n".join(lines)


async def run(plan: Plan, env: Path | None, tell: Callable[[str], None]) -> tuple[Found, list[str]]:
    """Measure all peers that can be had; the names of those, ours first."""
    task = asyncio.current_task()
    assert task is not None
    # Told to stop, nothing of the peers may stay behind.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with tempfile.TemporaryDirectory(prefix="peers-") as made:
        folder = Path(made).resolve()
        async with AsyncExitStack() as stack:
            peers: list[Peer] = [await stack.enter_async_context(seer(folder / "ours"))]
            if env is not None and (env / "bin" / "jupyter-mcp-server").exists():
                for open_peer, name in ((jupyter_mcp, "jmcp"), (jupyter_mcp_extension, "ext")):
                    try:
                        async with asyncio.timeout(90):
                            peer = await stack.enter_async_context(open_peer(env, folder / name))
                    except FAILURES as error:
                        tell(f"{open_peer.__name__} did not start: {error}")
                        continue
                    peers.append(peer)
            if env is not None and (env / "bin" / "python").exists():
                peers.append(await stack.enter_async_context(nbclient(env, folder / "nbclient")))
            tell(f"measuring {', '.join(peer.name for peer in peers)}")
            found = await measured(peers, plan, tell)
            return found, [peer.name for peer in peers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls, no 1,000 cells")
    parser.add_argument("--peers-env", type=Path, default=DEFAULT_ENV, metavar="DIR")
    parser.add_argument("--alone", action="store_true", help="only our server")
    parser.add_argument("--out", type=Path, default=HERE / "peers.json")
    parser.add_argument("--page", type=Path, help="replace the comparison in this page of the docs")
    flags = parser.parse_args()
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    console = Console(stderr=True)
    tell: Callable[[str], None] = lambda text: console.print(f"[dim]{text}[/dim]")  # noqa: E731
    problems = [] if flags.alone else made_env(flags.peers_env)
    for problem in problems:
        console.print(problem)
    load = os.getloadavg()[0]
    plan = QUICK if flags.quick else WHOLE
    found, names = asyncio.run(run(plan, None if flags.alone else flags.peers_env, tell))
    own = {name: metadata.version(name) for name in ("mcp", "ipykernel", "jupyter_client")}
    theirs = versions(flags.peers_env, (RIVAL, "jupyterlab", "nbclient"))
    whole: Facts = {
        "machine": machine(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "load": load,
        "versions": {**own, **theirs},
        "problems": problems,
        "goals": goals(found),
        "table": table_of(found, plan, names),
        "measured": found,
    }
    flags.out.write_text(json.dumps(whole, indent=1) + "\n")
    report(whole, Console(width=max(Console().width, 150)))
    if flags.page:
        replace_section(flags.page, "peers", section(whole))
    sys.exit(0 if all(goal["met"] for goal in whole["goals"]) else 1)


def report(whole: Facts, console: Console) -> None:
    head, *body = whole["table"]
    table = Table(*head, title="the same cells, one run")
    for line in body:
        table.add_row(*(cell.replace("`", "") for cell in line))
    console.print(table)
    for goal in whole["goals"]:
        state = "met" if goal["met"] else "MISSED"
        console.print(f"{state}: {goal['goal']}: {goal['found']}".replace("`", ""))
    if whole["load"] > QUIET_LOAD:
        console.print(f"The machine was busy (load {whole['load']:.1f}): read the ratios.")


if __name__ == "__main__":
    main()
