"""Somebody who types what a page says, in a shell of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from .faults.ground import Ground
from .pages import ROOT

TOOLS = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seer-mcp-ci"


def shell(place: Ground, **more: str) -> dict[str, str]:
    """The environment that it is typed in: `uv run` is that of this checkout, home and folder are the test's."""
    tools = f"{TOOLS / 'node/bin'}:{TOOLS / 'npm/node_modules/.bin'}"
    return {
        **os.environ,
        "HOME": str(place.folder),
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PWD": str(place.folder),
        "UV_PROJECT": str(ROOT),
        "UV_NO_SYNC": "1",
        "VIRTUAL_ENV": sys.prefix,
        "XDG_RUNTIME_DIR": str(place.sockets),
        "CLAUDE_PROJECT_DIR": str(place.project),
        **more,
    }


def type_in(place: Ground, script: str, **more: str) -> str:
    """What is printed, stderr too, when every line of `script` has succeeded and nothing runs on."""
    process = subprocess.Popen(
        ["bash", "-c", f"set -e -o pipefail; trap 'jobs -p | xargs -r kill' EXIT\n{script}"],
        cwd=place.folder,
        env=shell(place, **more),
        stdin=subprocess.DEVNULL,  # a server over stdio ends with it
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):  # all of it has ended, as it should
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"{script}\n{said[-3000:]}"
    assert place.processes() == []
    return said
