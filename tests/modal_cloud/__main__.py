"""Runs a cloud until it is told to stop: `python -m tests.modal_cloud [--json] [--with-parent]`.

Prints what to set in the environment of a client's process. With --json it prints one line of JSON,
{"environment": {...}, "control": url}, and --with-parent ends it when its stdin is closed.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import shlex
import signal
import sys

from .cloud import Cloud

ENDS_WITHIN = 20.0


async def main() -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with Cloud() as cloud:
        environment = cloud.environment()
        if "--json" in sys.argv:
            said = json.dumps({"environment": environment, "control": cloud.control_url})
        else:
            lines = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
            said = "\n".join([*lines, f"# control: {cloud.control_url}"])
        os.write(1, said.encode() + b"\n")
        if "--with-parent" in sys.argv:
            loop.add_reader(0, lambda: os.read(0, 4096) or (loop.remove_reader(0), stop.set()))
        await stop.wait()
        # With this process its sandboxes end too, whatever keeps it from ending them in order.
        loop.call_later(ENDS_WITHIN, os._exit, 1)


def own_mounts() -> None:
    """What the cloud mounts is seen by its sandboxes alone, and is gone when it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, recursive, new_mounts = 1 << 18, 1 << 14, 0x20000
    if libc.unshare(new_mounts) or libc.mount(
        b"", b"/", None, ctypes.c_ulong(private | recursive), None
    ):
        raise OSError(ctypes.get_errno(), "this process could not have mounts of its own")


if __name__ == "__main__":
    own_mounts()
    if sys.version_info < (3, 12):  # one thread for each process otherwise
        asyncio.set_child_watcher(asyncio.PidfdChildWatcher())  # type: ignore[attr-defined]
    asyncio.run(main())
