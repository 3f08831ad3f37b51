"""What our side costs at Modal: round trips and our own time, on the loopback control plane.

uv run python -m benchmarks.modal [--starts 5] [--cells 200] [--out benchmarks/modal.json] [--page docs/modal.md]

A control plane on loopback (tests/modal_cloud) has no network delay, no queue and no image to load: the
times are our own and the machine's, and the round trips are what a real network multiplies. It needs
root on Linux, for the control plane's sandboxes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from seer_mcp.backends import Backend, Place
from seer_mcp.backends.local import LocalBackend
from seer_mcp.backends.modal import ModalBackend
from seer_mcp.environment import SandboxSpec
from tests.backends.contract import Box
from tests.backends.modal_ground import GPU, ModalHarness
from tests.backends.test_local import LocalHarness
from tests.modal_cloud.control import Controller
from tests.modal_cloud.fixtures import client_environment, running_cloud

from .page import machine, replace_section

HERE = Path(__file__).parent
STREAMING = {"TaskExecStdioRead"}  # answers that stay open
GOALS = {"start": 1.5, "ratio": 1.5, "twenty": 5.0}
TWENTY_MB = "for _ in range(200): print('x' * 99_999)"


class Counted:
    """The calls that one piece of work makes: of the control plane, and of the machine's own router."""

    def __init__(self, control: Controller) -> None:
        self._control = control
        self._before = control.calls()
        self._began = time.perf_counter()

    def done(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self._began
        after = self._control.calls()
        made = {n: after[n] - self._before.get(n, 0) for n in after}
        made = {name: count for name, count in made.items() if count}
        plane = {n: c for n, c in made.items() if not n.startswith("Task") or "Access" in n}
        router = {n: c for n, c in made.items() if n not in plane}
        return {
            "seconds": round(seconds, 3),
            "control_plane": sum(plane.values()),
            "router": sum(router.values()),
            "calls": made,
        }


async def ready(harness: Any, handle: str) -> Box:
    place: Place = harness.place(handle, "")
    backend: Backend = harness.backend
    spec: SandboxSpec = harness.spec()
    sandbox = await backend.start(spec, place, lambda _: None)
    return await Box(harness, sandbox, place, []).ready()


async def one_and_one(box: Box, cells: int) -> float:
    """Median milliseconds of 1+1, asked and folded."""
    samples: list[float] = []
    over = (
        asyncio.Event()
    )  # to look again and again would keep the client's own thread from its work

    def come(event: dict[str, Any]) -> None:
        box.events.append(event)
        if event["type"] == "end":
            over.set()

    box.link._on_event = come
    for i in range(cells + 5):
        over.clear()
        began = time.perf_counter()
        id = "r" + secrets.token_hex(5)
        await box.link.request("run", runs=[{"run": id, "code": "1+1"}])
        await over.wait()
        if i >= 5:
            samples.append(time.perf_counter() - began)
    return statistics.median(samples) * 1000


async def twenty_megabytes(box: Box) -> float:
    began = time.perf_counter()
    done = await box.run(TWENTY_MB)
    assert done.state == "complete" and len(done.text()) == 20_000_000
    return round(time.perf_counter() - began, 2)


async def attach_again(harness: ModalHarness, box: Box) -> dict[str, Any]:
    """As the next server does: find by the record, dial, and have all that was missed."""
    last = (await box.status())["last"]
    again = ModalBackend(harness.config)
    counted = Counted(harness.control)
    found = await again.find(box.record)
    assert found is not None
    other = Box(harness, found, box.place, [])
    await other.until(lambda: len(other.events) >= last)
    figures = counted.done()
    await other.link.close()
    return figures


async def one_way(harness: ModalHarness, way: str, starts: int, cells: int) -> dict[str, Any]:
    counted = Counted(harness.control)
    box = await ready(harness, f"b-{way}-first")
    figures: dict[str, Any] = {"first_start": counted.done()}
    await box.end()
    warm: list[dict[str, Any]] = []
    for i in range(starts):
        counted = Counted(harness.control)
        place = harness.place(f"b-{way}-{i}", "")
        sandbox = await harness.backend.start(harness.spec(), place, lambda _: None)
        started = counted.done()
        box = await Box(harness, sandbox, place, []).ready()
        warm.append({**started, "kernel_ready": counted.done()["seconds"]})
        if i < starts - 1:
            await box.end()
    figures["warm_start"] = sorted(warm, key=lambda w: w["kernel_ready"])[len(warm) // 2]
    await one_and_one(box, 5)
    counted = Counted(harness.control)
    await one_and_one(box, cells)
    done = counted.done()
    figures["run_cell"] = {
        "control_plane": done["control_plane"],
        "router_per_cell": round(done["router"] / (cells + 5), 2),
        "cells": cells + 5,
    }
    figures["attach_again"] = await attach_again(harness, box)
    counted = Counted(harness.control)
    await box.end()
    figures["end"] = counted.done()
    return figures


async def measure(control: Controller, folder: Path, starts: int, cells: int) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine()}
    sockets = Path(tempfile.mkdtemp(prefix="seer-b-"))
    local_folder = folder / "local"
    local_folder.mkdir()
    local = LocalHarness(local_folder, sockets)
    local._config = local._config.__class__(**{**vars(local._config), "output_cap": 200_000_000})
    local.backend = LocalBackend(local._config)
    boxes = {"local": await ready(local, "b-local")}
    for way, gpu in (("cpu", None), ("gpu", GPU)):
        there = folder / way
        there.mkdir()
        harness = ModalHarness(control, there, gpu)
        harness.config = harness.config.__class__(
            **{**vars(harness.config), "output_cap": 200_000_000}
        )
        harness.backend = ModalBackend(harness.config)
        found[way] = await one_way(harness, way, starts, cells)
        boxes[way] = await ready(harness, f"b-{way}-beside")
    found["local"] = {}
    # By turns: what else the machine does at the moment falls on all of them.
    samples: dict[str, list[float]] = {name: [] for name in boxes}
    for _ in range(8):
        for name, box in boxes.items():
            samples[name].append(await one_and_one(box, max(10, cells // 8)))
    for name, box in boxes.items():
        found[name]["one_and_one_ms"] = round(statistics.median(samples[name]), 2)
        found[name]["twenty_mb_seconds"] = await twenty_megabytes(box)
        await box.end()
    for way in ("cpu", "gpu"):
        ratio = found[way]["one_and_one_ms"] / found["local"]["one_and_one_ms"]
        found[way]["one_and_one_ratio"] = round(ratio, 2)
    found["ledger"] = [row for row in control.ledger() if row["ended"] is None]
    return found


def rows(found: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """What is shown: a figure on both ways, and its goal."""

    def both(show: Any) -> tuple[str, str]:
        return show(found["cpu"]), show(found["gpu"])

    def calls(part: str) -> Any:
        return lambda f: f"{f[part]['control_plane']} + {f[part]['router']}"

    local = found["local"]
    return [
        (
            "start (image known), our own time until the host answers",
            *both(lambda f: f"{f['warm_start']['seconds']:.2f} s"),
            f"≤ {GOALS['start']} s (cpu)",
        ),
        (
            "… until the kernel is ready",
            *both(lambda f: f"{f['warm_start']['kernel_ready']:.2f} s"),
            "",
        ),
        ("… round trips: control plane + machine", *both(calls("warm_start")), "few"),
        ("first start of a server: round trips", *both(calls("first_start")), ""),
        (
            "run of a cell: calls of the control plane",
            *both(lambda f: f"{f['run_cell']['control_plane']} in {f['run_cell']['cells']} cells"),
            "0",
        ),
        (
            "run of a cell: calls of the machine's router",
            *both(lambda f: f"{f['run_cell']['router_per_cell']:.2f}"),
            "1 line of stdin",
        ),
        (
            f"1+1 (local: {local['one_and_one_ms']:.1f} ms)",
            *both(lambda f: f"{f['one_and_one_ms']:.1f} ms, {f['one_and_one_ratio']:.2f} ×"),
            f"≤ {GOALS['ratio']} ×",
        ),
        (
            f"20 MB of output (local: {local['twenty_mb_seconds']:.1f} s)",
            *both(lambda f: f"{f['twenty_mb_seconds']:.1f} s"),
            f"≤ {GOALS['twenty']:.0f} s",
        ),
        ("found again by the next server: round trips", *both(calls("attach_again")), "few"),
        ("… its own time", *both(lambda f: f"{f['attach_again']['seconds']:.2f} s"), ""),
        ("end, confirmed", *both(lambda f: f"{f['end']['seconds']:.2f} s"), ""),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--out", type=Path, default=HERE / "modal.json")
    parser.add_argument("--page", type=Path)
    flags = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        running_cloud() as cloud,
        client_environment(cloud.environment),
    ):
        found = asyncio.run(measure(cloud.control, Path(folder), flags.starts, flags.cells))
    flags.out.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("", "without a GPU (V2)", "with one (V1)", "goal", title=found["machine"])
    lines = [
        f"{found['machine']}.",
        "",
        "| | without a GPU | with one | goal |",
        "|---|---|---|---|",
    ]
    for row in rows(found):
        table.add_row(*row)
        lines.append("| " + " | ".join(row) + " |")
    Console(width=130).print(table)
    if flags.page:
        replace_section(flags.page, "figures", "\n".join(lines))


if __name__ == "__main__":
    main()
