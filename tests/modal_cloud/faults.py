"""The fault plan: which calls fail, when, and how."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2

RESET = "reset"


@dataclass
class Fault:
    """Fails calls of `rpc` (a pattern, like Task* for all of the router).

    It begins with the `nth` call from now, and does so `times` times (0: for ever).
    `when` = "before": the call does nothing. "after": it is carried out, and its answer is lost (a
    stream is cut after its first message). `status` is a gRPC status name, or "reset" for a stream
    that breaks without one. With no status the call is only delayed, by `delay` seconds.
    `retry_after` is what the server asks the client to wait, in seconds; Modal sends it with
    RESOURCE_EXHAUSTED, and the client then retries for as long as it is told to. `match` restricts
    the fault to requests whose text form holds it.
    """

    rpc: str
    status: str = ""
    nth: int = 1
    when: str = "before"
    delay: float = 0
    times: int = 1
    message: str = ""
    retry_after: float | None = None
    match: str = ""
    seen: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        if self.when not in ("before", "after"):
            raise ValueError(f"when is 'before' or 'after', not {self.when!r}")
        if self.status and self.status != RESET and self.status not in Status.__members__:
            raise ValueError(
                f"{self.status!r} is no gRPC status; one of {list(Status.__members__)}"
            )

    def takes(self, rpc: str, request: Any) -> bool:
        """Whether this call is one to fail; counts it."""
        if not fnmatchcase(rpc, self.rpc) or (self.times and self.done >= self.times):
            return False
        if self.match and self.match not in str(request):
            return False
        self.seen += 1
        if self.seen < self.nth:
            return False
        self.done += 1
        return True

    def error(self) -> GRPCError:
        details = None
        if self.retry_after is not None:
            details = [api_pb2.RPCRetryPolicy(retry_after_secs=self.retry_after)]
        message = self.message or f"planned fault: {self.rpc} answers {self.status}"
        return GRPCError(Status[self.status], message, details)


class Cut(Exception):
    """The stream is to be reset without a status."""


@dataclass
class Faults:
    """What is planned for the calls to come, and what was called so far."""

    plan: list[Fault] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    down_until: float = 0
    errors: list[str] = field(default_factory=list)
    """Tracebacks of handlers that failed on their own: defects of this server."""

    def add(self, **fault: Any) -> None:
        self.plan.append(Fault(**fault))

    def clear(self) -> None:
        self.plan.clear()
        self.down_until = 0

    def down(self, seconds: float) -> None:
        """Every call of the control plane answers UNAVAILABLE for so long; sandboxes live on."""
        self.down_until = time.monotonic() + seconds

    async def enter(self, rpc: str, request: Any, control_plane: bool) -> list[Fault]:
        """Counts a call and fails it if planned; returns the faults for after it."""
        self.calls[rpc] = self.calls.get(rpc, 0) + 1
        if control_plane and time.monotonic() < self.down_until:
            raise GRPCError(Status.UNAVAILABLE, "planned fault: the control plane is down")
        later: list[Fault] = []
        for fault in self.plan:
            if fault.takes(rpc, request):
                if fault.when == "after":
                    later.append(fault)
                else:
                    await self.strike(fault)
        return later

    async def strike(self, fault: Fault) -> None:
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.status == RESET:
            raise Cut
        if fault.status:
            raise fault.error()

    def listing(self) -> list[dict[str, Any]]:
        return [asdict(fault) for fault in self.plan]
