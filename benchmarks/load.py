"""Many clients at one team's server over HTTP: does each get its own, and how soon?

uv run python -m benchmarks.load [--clients 200] [--seconds 60] [--real 50] [--out FILE] [--page docs/performance.md]

Every client is one owner's, four to an owner, who has one sandbox. It writes a cell with a marker of its own, reads
that cell back, and asks for the list of sandboxes; now and then it asks for the sandbox of somebody else. The kernels
are stubs (real processes behind the real host that echo), so that the server is measured; --real N adds a run with N
clients on N real kernels.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.page import machine, replace_section
from seer_mcp.http.tokens import SCOPES, TokenFile
from tests.faults.ground import ground
from tests.faults.stub_kernel import stub_python
from tests.load.serving import ServerProcess, message_of, meta, percentile, request, texts

TOGETHER = 4  # clients of one owner
MARKER = re.compile(r"marker \d+ \d+\b")
MIB = 2**20


@dataclass
class Seen:
    """What the clients of one run saw."""

    kernels: str
    clients: int
    sandboxes: int = 0
    starting: float = 0.0
    seconds: float = 0.0
    calls: int = 0
    errors: list[str] = field(default_factory=list[str])
    crossed: list[str] = field(default_factory=list[str])
    strangers: int = 0
    """Calls with a handle of somebody else; all must be refused."""
    status: list[float] = field(default_factory=list[float])
    cells: list[float] = field(default_factory=list[float])
    server_mib: float = 0.0
    server_cpu: float = 0.0
    """Seconds of the server's process while the clients worked."""

    def report(self) -> dict[str, Any]:
        def ms(samples: list[float], share: float) -> float:
            return round(percentile(samples, share) * 1000, 1) if samples else 0.0

        return {
            "kernels": self.kernels,
            "clients": self.clients,
            "sandboxes": self.sandboxes,
            "starting_seconds": round(self.starting, 1),
            "seconds": round(self.seconds, 1),
            "calls": self.calls,
            "calls_a_second": round(self.calls / self.seconds, 1),
            "errors": len(self.errors),
            "crossed": len(self.crossed),
            "strangers_refused": self.strangers,
            "status_p50_ms": ms(self.status, 0.5),
            "status_p99_ms": ms(self.status, 0.99),
            "cell_p50_ms": ms(self.cells, 0.5),
            "cell_p99_ms": ms(self.cells, 0.99),
            "server_cpu_ms_a_call": round(self.server_cpu / max(1, self.calls) * 1000, 1),
            "server_mib": round(self.server_mib),
            "examples": [*self.errors[:3], *self.crossed[:3]],
        }


class Member:
    """Calls tools with one person's token."""

    def __init__(self, url: str, token: str, http: httpx2.AsyncClient) -> None:
        self._url, self._token, self._http = url, token, http
        self._ids = itertools.count(1)

    async def call(self, tool: str, /, **arguments: Any) -> dict[str, Any]:
        """The result; one that is an error if there was no result."""
        number = next(self._ids)
        body, headers = request(number, tool, arguments)
        headers["Authorization"] = f"Bearer {self._token}"
        try:
            answer = await self._http.post(self._url, json=body, headers=headers)
        except httpx2.HTTPError as error:
            return failed(f"{tool}: {type(error).__name__}: {error}")
        message = message_of(answer.text, number)
        if message is None or "result" not in message:
            return failed(f"{tool}: HTTP {answer.status_code}: {answer.text[:200]}")
        return message["result"]


def failed(text: str) -> dict[str, Any]:
    return {"isError": True, "content": [{"type": "text", "text": text}]}


def markers(result: dict[str, Any]) -> set[str]:
    return set(MARKER.findall("\n".join(texts(result))))


async def client(
    seen: Seen, member: Member, who: int, handle: str, other: str, end: float, think: float
) -> None:
    """One client until `end`; `think` seconds, on average, between two of its calls."""
    chance = random.Random(who)
    stub = seen.kernels == "stub"
    for number in itertools.count(1):
        await asyncio.sleep(chance.uniform(0, 2 * think))
        if time.monotonic() > end:
            return
        mine = f"marker {who} {number}"
        began = time.monotonic()
        wrote = await member.call(
            "create_cell", sandbox=handle, source=mine if stub else f"print({mine!r})"
        )
        seen.cells.append(time.monotonic() - began)
        seen.calls += 1
        if wrote.get("isError"):
            seen.errors.append("\n".join(texts(wrote))[:300])
            continue
        if markers(wrote) != {mine}:
            seen.crossed.append(f"{mine!r} was answered {markers(wrote)}")
        await asyncio.sleep(chance.uniform(0, 2 * think))
        read = await member.call(
            "read_outputs", sandbox=handle, cell=meta(wrote, "run")["cell"], wait=0
        )
        began = time.monotonic()
        status = await member.call("list_sandboxes")
        seen.status.append(time.monotonic() - began)
        seen.calls += 2
        for answer in (read, status):
            if answer.get("isError"):
                seen.errors.append("\n".join(texts(answer))[:300])
        if markers(read) != {mine}:
            seen.crossed.append(f"{mine!r} was read as {markers(read)}")
        listed = "\n".join(texts(status))
        if handle not in listed or other in listed:
            seen.crossed.append(f"the list of client {who} has not its own sandboxes, or others")
        if number % 5 == 1 and other != handle:
            stranger = await member.call("read_notebook", sandbox=other)
            seen.calls += 1
            seen.strangers += bool(stranger.get("isError"))
            if not stranger.get("isError"):
                seen.crossed.append(f"client {who} could read {other}")


async def crowd(
    folder: Path, clients: int, seconds: float, think: float, *, real: bool = False
) -> Seen:
    """Serve in a process of its own, let the clients work, and end all that was started."""
    seen = Seen("real" if real else "stub", clients)
    together = 1 if real else TOGETHER
    owners = -(-clients // together)
    tokens = TokenFile(folder / "users.json")
    given = [tokens.create(f"owner-{n}", SCOPES[:3], 1)[0] for n in range(owners)]
    with ground(folder) as place:
        flags = ["--users", str(tokens.path), "--team-backend", "local"]
        flags += ["--calls-a-minute", "1000000"]
        flags += [] if real else ["--python", str(stub_python(folder))]
        server = ServerProcess(place, *flags, on_exit="stop")
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=clients)
        await server.start()
        try:
            async with httpx2.AsyncClient(timeout=120, limits=limits) as http:
                members = [Member(server.url, token, http) for token in given]
                began = time.monotonic()
                made = await asyncio.gather(
                    *(m.call("start_sandbox", name="load") for m in members)
                )
                seen.starting = time.monotonic() - began
                if wrong := [texts(one) for one in made if one.get("isError")]:
                    raise RuntimeError(f"{len(wrong)} sandboxes did not start: {wrong[0]}")
                handles = [meta(one, "sandbox")["handle"] for one in made]
                seen.sandboxes = len(handles)
                began = time.monotonic()
                work = (
                    client(
                        seen,
                        members[n // together],
                        n,
                        handles[n // together],
                        handles[(n // together + 1) % owners],
                        began + seconds,
                        think,
                    )
                    for n in range(clients)
                )
                process = psutil.Process(server.pid)
                before = process.cpu_times()
                await asyncio.gather(*work)
                seen.seconds = time.monotonic() - began
                after = process.cpu_times()
                seen.server_cpu = after.user + after.system - before.user - before.system
                seen.server_mib = process.memory_info().rss / MIB
        finally:
            server.end()
    return seen


def rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            f"{one['clients']} on {one['sandboxes']} {one['kernels']} kernels",
            f"{one['calls']:,} in {one['seconds']:.0f} s",
            str(one["errors"]),
            str(one["crossed"]),
            f"{one['strangers_refused']}",
            f"{one['status_p50_ms']:.0f}, {one['status_p99_ms']:.0f} ms",
            f"{one['cell_p50_ms']:.0f}, {one['cell_p99_ms']:.0f} ms",
            f"{one['server_cpu_ms_a_call']:.0f} ms of CPU a call, {one['server_mib']} MiB",
        )
        for one in found
    ]


HEADS = (
    *("clients", "calls", "errors", "crossed", "strangers refused"),
    *("status p50, p99", "cell p50, p99", "server"),
)


def section(found: list[dict[str, Any]], load: float) -> str:
    lines = [
        "## Many clients at a team's server",
        "",
        "Written by `uv run python -m benchmarks.load --real 50 --page docs/performance.md`: owners with a token",
        "and a sandbox each, four clients to an owner on stub kernels, one on a real kernel. Each writes cells with a",
        "marker of its own and reads them back; *crossed* counts markers of others, *strangers refused* calls with",
        "somebody else's handle. *Status* is `list_sandboxes`; the goal is a p99 of at most 1 s. Clients and server",
        "share the machine.",
        "",
        "| " + " | ".join(HEADS) + " |",
        "| " + " | ".join("---" for _ in HEADS) + " |",
        *("| " + " | ".join(row) + " |" for row in rows(found)),
        "",
        f"{machine()}. Load of the machine before the run: {load:.1f}.",
    ]
    return "\n".join(lines)


def main() -> int:
    said = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    said.add_argument("--clients", type=int, default=200, help="on stub kernels (at most 240)")
    said.add_argument("--real", type=int, default=0, help="clients on real kernels (at most 60)")
    said.add_argument("--seconds", type=float, default=60.0)
    said.add_argument("--think", type=float, default=5.0, help="seconds between two calls")
    said.add_argument("--out", type=Path, default=Path("benchmarks/load.json"))
    said.add_argument("--page", type=Path, help="replace the table in this page of the docs")
    flags = said.parse_args()
    load = psutil.getloadavg()[0]
    found: list[dict[str, Any]] = []
    for count, real in ((flags.clients, False), (flags.real, True)):
        if count:
            with tempfile.TemporaryDirectory(prefix="seer-load-") as folder:
                crowded = crowd(Path(folder), count, flags.seconds, flags.think, real=real)
                found.append(asyncio.run(crowded).report())
    flags.out.write_text(json.dumps({"machine": machine(), "load": load, "runs": found}, indent=1))
    table = Table(*HEADS)
    for row in rows(found):
        table.add_row(*row)
    Console().print(table)
    if flags.page:
        replace_section(flags.page, "load", section(found, load))
    return 1 if any(one["errors"] or one["crossed"] for one in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
