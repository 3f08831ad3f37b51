"""A stand-in for ipykernel: a real process on the real wire protocol that says what it is told to.

How to start a server whose sandboxes use it:

    python = stub_python(folder)                           # an interpreter whose ipykernel is the stub
    open_lab(folder, python=str(python))                   # every sandbox of this server, or
    await lab.start(python=str(stub_python(folder)))       # one sandbox, or
    seer-mcp serve --python PATH                           # from a command line

The kernel host, the queue, the journal and the processes are the real ones; only the kernel that
`launch.py` starts is this one. It imports neither IPython nor jupyter_client, so it is ready in
about a tenth of a second and takes about 20 MB.

A cell whose code is not a script is echoed: its text and a line break on stdout, the number of its
characters as the result, then idle. A cell made by `script` plays its steps; `Stub.play` in
ipykernel/kernelapp.py lists them.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def stub_python(folder: Path) -> Path:
    """An interpreter made in `folder`: ours, with the stub in the place of ipykernel."""
    root = folder / "stub-python"
    program = root / "bin" / "python"
    if program.exists():
        return program
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    packages = root / "lib" / version / "site-packages"
    packages.mkdir(parents=True)
    program.parent.mkdir()
    base = Path(getattr(sys, "_base_executable", sys.executable))
    (root / "pyvenv.cfg").write_text(
        f"home = {base.parent}\ninclude-system-site-packages = false\n"
    )
    (packages / "ipykernel").symlink_to(HERE / "ipykernel")
    (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    program.symlink_to(base)
    return program


def script(*steps: dict[str, Any]) -> str:
    """The source of a cell that makes the stub play these steps."""
    return json.dumps({"script": steps})
