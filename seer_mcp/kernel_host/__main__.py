"""python -m kernel_host CONFIG, or with the configuration in the environment where no file can be brought."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from typing import Any, Dict

from . import fault
from .folder import replace
from .host import Host
from .identity import GIVEN

ABSENT = (
    "MODAL_",
    "SEER_MCP_",
)  # nothing in a sandbox is told of the cloud, nor of a configuration


def given(text: str) -> Dict[str, Any]:
    """A configuration that came in the environment; its folders are made, and hold nothing old.

    `files` is a folder of which a copy is put into the working folder; `lasts` are the seconds that
    this machine has. The configuration is written where other programs of this package look for it.
    """
    config: Dict[str, Any] = json.loads(text)
    if "lasts" in config:
        config["hard_end_at"] = time.time() + config["lasts"]
    for name in [name for name in os.environ if name.startswith(ABSENT)]:
        del os.environ[name]
    for folder in (config["directory"], config["ipc_directory"]):
        # A snapshot of a sandbox has the folders of its host.
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, mode=0o700)
    os.makedirs(config["cwd"], exist_ok=True)
    if config.get("files") and os.path.isdir(config["files"]):
        shutil.copytree(config["files"], config["cwd"], dirs_exist_ok=True)
    path = os.path.join(config["directory"], "host.json")
    replace(path, lambda file: file.write(text.encode("utf-8")), 0o600)
    return config


def main() -> int:
    if len(sys.argv) > 1:
        with open(sys.argv[1], encoding="utf-8") as file:
            config = json.load(file)
    else:
        config = given(os.environ[GIVEN])
    fault.arm(config.get("fault", ""))
    return asyncio.run(Host(config).serve())


if __name__ == "__main__":
    sys.exit(main())
