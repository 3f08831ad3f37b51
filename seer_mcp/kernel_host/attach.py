"""A bridge from stdin and stdout to the host's socket, for machines that are reached by a command.

python -m kernel_host.attach SOCKET [SILENCE [PATIENCE]]

It ends when either side closes, or when nothing came from stdin for SILENCE seconds (60): a client
sends a ping every 15 s, so then there is none any more. With PATIENCE it waits so many seconds for a
host that is starting, and says with an empty line that it has reached one.
"""

from __future__ import annotations

import asyncio
import os
import select
import sys
import time
from typing import Optional

SILENCE_SECONDS = 60.0
PIECE = 1024 * 1024
NO_HOST = 3  # the exit code that says so


async def bridge(
    address: str, silence: float = SILENCE_SECONDS, patience: Optional[float] = None
) -> int:
    end = time.monotonic() + (patience or 0.0)
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(address, limit=PIECE)
            break
        except OSError as error:
            if time.monotonic() > end:
                print("no kernel host at %s: %s" % (address, error), file=sys.stderr)
                return NO_HOST
            await asyncio.sleep(0.02)
    if patience is not None:
        _write(b"\n")
    loop = asyncio.get_running_loop()
    given = asyncio.StreamReader(limit=PIECE)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(given), sys.stdin)

    async def inwards() -> None:
        while True:
            try:
                data = await asyncio.wait_for(given.read(PIECE), silence)
                if not data:
                    return
                writer.write(data)
                # A host that takes nothing must not keep us from noticing that nobody is there.
                await asyncio.wait_for(writer.drain(), silence)
            except asyncio.TimeoutError:
                return

    out = sys.stdout.fileno()

    async def outwards() -> None:
        while True:
            data = await reader.read(PIECE)
            if not data:
                return
            # In a thread if it may wait: who does not read must not keep us from noticing its silence.
            if len(data) <= select.PIPE_BUF and select.select([], [out], [], 0)[1]:
                _write(data)  # so much goes into a pipe that has room
            else:
                await loop.run_in_executor(None, _write, data)

    tasks = [asyncio.ensure_future(inwards()), asyncio.ensure_future(outwards())]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        error = task.exception()
        if error is not None and not isinstance(error, ConnectionError):
            raise error
    return 0


def _write(data: bytes) -> None:
    out = sys.stdout.fileno()
    while data:
        try:
            data = data[os.write(out, data) :]
        except (
            BlockingIOError
        ):  # one socket for both directions, as sshd gives: reading set its mode
            select.select([], [out], [])


def main() -> None:
    silence = float(sys.argv[2]) if len(sys.argv) > 2 else SILENCE_SECONDS
    patience = float(sys.argv[3]) if len(sys.argv) > 3 else None
    code = asyncio.new_event_loop().run_until_complete(bridge(sys.argv[1], silence, patience))
    os._exit(code)  # a write that nobody reads must not keep the bridge here


if __name__ == "__main__":
    main()
