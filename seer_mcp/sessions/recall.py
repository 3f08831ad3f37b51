"""What a command put out that this server does not know, or not any more: read from the sandbox's journal."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..errors import SandboxUnreachable
from ..kernel import NUMBER, Dial, Event, Events, encoded
from ..redact import EventRedactor, Redactor

SLICE = 0.02  # seconds of reading after which other tasks get a turn
SILENT_SECONDS = 30.0


async def recall(
    dial: Dial,
    redactor: Redactor,
    run: str,
    first: int,
    last: Callable[[], int],
    fold: Callable[[Event], None],
) -> int:
    """Fold every event of a run that is over, from event `first` on; the number of the last one read.

    Ends at the event that came `last` to whoever follows the sandbox meanwhile. Raises
    SandboxUnreachable.
    """
    redacted = EventRedactor(redactor, fold)
    events = Events(first, redacted.take, lambda lines, size: None)
    named = f'"{run}"'.encode()
    reader, writer = await dial()
    try:
        writer.write(encoded({"id": 0, "op": "subscribe", "from": first}))
        number, began = first - 1, time.monotonic()
        while number < last():
            async with asyncio.timeout(SILENT_SECONDS):
                line = await reader.readline()
            if not line.endswith(b"\n"):
                raise SandboxUnreachable("The line to the sandbox broke; ask again.")
            if (numbered := NUMBER.match(line)) is None:
                continue  # the answer to our request
            number = int(numbered[1])
            if named in line:
                events.next = number  # those of other runs are not parsed, nor missed
                events.take(line)
            if time.monotonic() - began > SLICE:
                await asyncio.sleep(0)
                began = time.monotonic()
    except (ConnectionError, TimeoutError, ValueError) as error:
        raise SandboxUnreachable(f"The sandbox's journal could not be read ({error}).") from error
    finally:
        writer.close()
    redacted.flush()
    return number
