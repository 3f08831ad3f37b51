"""A bridge from stdin and stdout to the host's socket, for machines that are reached by a command.

python -m kernel_host.attach SOCKET

It ends when either side closes, or when nothing came from stdin for a while: a client sends a ping
every 15 s, so then there is none any more.
"""

from __future__ import annotations

import asyncio
import os
import sys

SILENCE_SECONDS = 60.0
PIECE = 64 * 1024


async def bridge(address: str, silence: float = SILENCE_SECONDS) -> int:
    try:
        reader, writer = await asyncio.open_unix_connection(address)
    except OSError as error:
        print("no kernel host at %s: %s" % (address, error), file=sys.stderr)
        return 3
    loop = asyncio.get_running_loop()
    given = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(given), sys.stdin)

    async def inwards() -> None:
        while True:
            try:
                data = await asyncio.wait_for(given.read(PIECE), silence)
            except asyncio.TimeoutError:
                return
            if not data:
                return
            writer.write(data)
            await writer.drain()

    async def outwards() -> None:
        while True:
            data = await reader.read(PIECE)
            if not data:
                return
            # In a thread: a client that does not read must not keep us from noticing its silence.
            await loop.run_in_executor(None, _write, data)

    tasks = [asyncio.ensure_future(inwards()), asyncio.ensure_future(outwards())]
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        error = task.exception()
        if error is not None and not isinstance(error, ConnectionError):
            raise error
    return 0


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(sys.stdout.fileno(), data) :]


def main() -> None:
    code = asyncio.new_event_loop().run_until_complete(bridge(sys.argv[1]))
    os._exit(code)  # a write that nobody reads must not keep the bridge here


if __name__ == "__main__":
    main()
