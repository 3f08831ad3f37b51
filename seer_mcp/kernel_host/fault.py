"""Named points where state changes hands; a test can have the process killed at any of them.

`SEER_MCP_FAULT=after:<point>:<n>` ends the server with SIGKILL when it comes to the point for the
n-th time. Points of the kernel host (`host.…`) are handed on to the hosts of new local sandboxes.
Without that variable a point is one comparison.
"""

from __future__ import annotations

import os
import signal
from typing import Dict, Optional, Tuple

POINTS: Dict[str, str] = {
    # the server
    "start.locked": "a sandbox has a folder and a lock, and nothing else",
    "record.write": "before a sandbox's record is written",
    "record.part": "the record is beside its place, not yet renamed",
    "record.renamed": "the record is in its place",
    "host-config.write": "before the configuration of a kernel host is written",
    "host-config.part": "the configuration is beside its place",
    "host-config.renamed": "the configuration is in its place",
    "sandbox.create": "before the kernel host is started",
    "sandbox.created": "the kernel host runs; no record names its process",
    "sandbox.answers": "the kernel host answers; no record names its process",
    "start.attached": "the server follows the new sandbox; its record is not complete",
    "start.ready": "the kernel is ready; the notebook is not written",
    "notebook.write": "before a notebook is written",
    "notebook.part": "the notebook is beside its place, not yet renamed",
    "notebook.exchanged": "the notebook is in its place; the file that was there is not looked at",
    "notebook.renamed": "the notebook is in its place",
    "spill.write": "before a piece of a long output is added to its file",
    "spill.written": "a piece of a long output is in its file, and the notebook does not know",
    "run.noted": "a cell is queued in memory, not on disk",
    "run.saved": "a cell is queued on disk; the kernel host has not heard of it",
    "run.accepted": "the kernel host has the run; the caller has no answer",
    "link.dial": "before a connection to a kernel host is made",
    "link.dialled": "a connection is there, and nothing was asked",
    "link.send": "before a request is sent",
    "link.sent": "a request is sent, its answer has not come",
    "event.come": "an event has arrived and is not folded",
    "event.folded": "an event is in the document, not on disk",
    "interrupt.sent": "an interrupt is done; the caller has no answer",
    "restart.sent": "a new kernel is there; the caller has no answer",
    "file.sent": "a file is in the sandbox; the caller has no answer",
    "find.locked": "a record was found and its lock taken",
    "find.found": "the sandbox of a record was found; nobody follows it yet",
    "find.followed": "a found sandbox is followed, and its open runs are known",
    "stop.begun": "a stop was asked for, nothing is done",
    "stop.gone": "the sandbox is gone; its record does not say so",
    "stop.saved": "the notebook says that the sandbox is gone; its record does not",
    "stop.recorded": "the record says that it ended; its folder is not cleared",
    "answer": "a tool has its answer, the client does not",
    # the kernel host
    "host.listening": "the host has its socket; no kernel is started",
    "host.kernel.create": "before the kernel's process is made",
    "host.kernel.created": "the kernel's process is there, its answers are awaited",
    "host.kernel.ready": "the kernel is ready; the journal does not say so",
    "host.queued": "runs are queued; the server has no answer",
    "host.send": "before a cell is sent to the kernel",
    "host.sent": "a cell is sent to the kernel; the journal does not say that it began",
    "host.message": "a message of the kernel has come and is not in the journal",
    "host.journal.write": "before an event is written to the journal",
    "host.journal.written": "an event is in the journal; no reader has it",
    "host.page": "events were read for a server and are not sent",
    "host.ended": "the end of a run is in the journal; the next run has not begun",
    "host.answer": "a request is done; its answer is not sent",
    "host.interrupted": "the kernel was interrupted; nobody knows",
    "host.restart.killed": "the old kernel is gone; the new one is not there",
    "host.file.part": "a file of write_file is beside its place",
    "host.file.written": "a file of write_file is in its place; nobody knows",
    "host.closing": "the host ends itself: runs are ended, the kernel is not",
    "host.closed": "the kernel is gone, the socket is still there",
}

_armed: Optional[Tuple[str, int]] = None


def parse(plan: str) -> Tuple[str, int]:
    """(point, number of times) of `after:<point>:<n>`. Raises ValueError."""
    parts = plan.split(":")
    if len(parts) != 3 or parts[0] != "after" or not parts[2].isdigit() or int(parts[2]) < 1:
        raise ValueError("SEER_MCP_FAULT = %r: it must be after:<point>:<n> with n >= 1" % plan)
    if parts[1] not in POINTS:
        raise ValueError(
            "SEER_MCP_FAULT = %r: no point %r. Points: %s" % (plan, parts[1], ", ".join(POINTS))
        )
    return parts[1], int(parts[2])


def in_host(plan: str) -> bool:
    """Whether the plan is for kernel hosts and not for the server."""
    return bool(plan) and parse(plan)[0].startswith("host.")


def arm(plan: str) -> None:
    """End this process at the point of the plan ("": at none). Raises ValueError."""
    global _armed
    _armed = parse(plan) if plan else None


def fault_point(name: str) -> None:
    """State changes hands here: the process may be killed before the next statement."""
    global _armed
    if _armed is None or _armed[0] != name:
        return
    left = _armed[1] - 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _armed = (name, left)
