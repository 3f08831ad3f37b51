"""A cloud for tests, in a process of its own: it outlives a server that a test kills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from .box import can_isolate
from .control import Controller

ROOT = Path(__file__).parents[2]
STARTS_WITHIN = 30.0


@dataclass
class RunningCloud:
    environment: dict[str, str] = field(repr=False)
    """To be set in every process with a client: MODAL_SERVER_URL and the token."""
    control: Controller
    process: subprocess.Popen[bytes]


@contextmanager
def running_cloud() -> Iterator[RunningCloud]:
    """Starts `python -m tests.modal_cloud`; at the end it and all its sandboxes are gone."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.modal_cloud", "--json", "--with-parent"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C in a test run is not for it
    )
    assert process.stdin and process.stdout
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the cloud did not start; exit status {process.wait()}")
        said = json.loads(line)
        yield RunningCloud(said["environment"], Controller(said["control"]), process)
    finally:
        process.stdin.close()
        try:
            process.wait(STARTS_WITHIN)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def available() -> bool:
    """Whether this machine lets a test make sandboxes; skip if not."""
    return can_isolate()


@contextmanager
def client_environment(environment: dict[str, str]) -> Iterator[None]:
    """Points this process's modal client at a cloud, and away from it afterwards.

    The client keeps one connection per process, and what it looked up once (its environment, the
    default image): all that is forgotten.
    """
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    forget_client()
    try:
        yield
    finally:
        forget_client()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def forget_client() -> None:
    """Close this process's modal client; the next one reads the environment and looks things up."""
    import modal
    from modal._environments import ENVIRONMENT_CACHE  # type: ignore[attr-defined]
    from modal.client import _Client
    from modal.sandbox._common import _default_image

    if _Client._client_from_env is not None:
        # In a thread: the client refuses blocking calls in one that runs an event loop.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: modal.Client.from_env().close()).result()
    ENVIRONMENT_CACHE.clear()
    if _default_image._is_hydrated:
        _default_image._unhydrate()
