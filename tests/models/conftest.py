"""A hub on loopback, and the fetch program as anybody would run it: a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from seer_mcp.model_store.follow import FETCHER

from .hub import Hub, open_hub


class Run:
    """One run of the fetch program."""

    def __init__(self, hub: Hub, home: Path, name: str, folder: Path, **more: Any) -> None:
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "HF_ENDPOINT": hub.url,
            **more.pop("env", {}),
        }
        command = more.pop("command", [sys.executable, str(FETCHER)])
        config = {"name": name, "folder": str(folder), "every": 0.05, "pause": 0.02, **more}
        self.folder = folder
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(config) + "\n")
        self.process.stdin.flush()
        self.lines: list[dict[str, Any]] = []
        self.stderr = ""

    def end(self) -> Run:
        out, self.stderr = self.process.communicate(timeout=60)
        self.lines += [json.loads(line) for line in out.splitlines()]
        return self

    def until(self, field: str, least: int = 1) -> None:
        """Read lines until one says that `field` is at least so much."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(json.loads(line))
            if self.lines[-1].get(field, 0) >= least:
                return
        raise AssertionError(f"no {field} >= {least} in {self.lines[-5:]}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate()

    @property
    def done(self) -> dict[str, Any]:
        assert "done" in self.lines[-1], (self.lines[-3:], self.stderr)
        assert self.process.returncode == 0
        return self.lines[-1]["done"]

    @property
    def failed(self) -> str:
        assert self.process.returncode == 1
        return self.lines[-1].get("failed", f"no failure: {self.lines[-2:]} {self.stderr}")

    @property
    def error(self) -> str:
        return self.lines[-1]["error"]

    @property
    def complete(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def files(self) -> dict[str, bytes]:
        root = self.folder / "files"
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in root.rglob("*")
            if path.is_file()
        }


class Fetcher:
    """Starts runs of the fetch program, all on one hub; none outlives the test."""

    def __init__(self, hub: Hub, root: Path) -> None:
        self.hub = hub
        self.root = root
        self.home = root / "home"
        self.home.mkdir()
        self.runs: list[Run] = []

    def start(self, name: str, folder: str = "m", **more: Any) -> Run:
        self.runs.append(Run(self.hub, self.home, name, self.root / "models" / folder, **more))
        return self.runs[-1]

    def __call__(self, name: str, folder: str = "m", **more: Any) -> Run:
        return self.start(name, folder, **more).end()

    def close(self) -> None:
        for run in self.runs:
            if run.process.poll() is None:
                run.kill()
            for pipe in (run.process.stdin, run.process.stdout, run.process.stderr):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def hub() -> Iterator[Hub]:
    with open_hub() as hub:
        yield hub


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> Iterator[Fetcher]:
    fetcher = Fetcher(hub, tmp_path)
    yield fetcher
    fetcher.close()


def wait_until(true: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)
