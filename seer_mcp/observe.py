"""The one place where calls, runs and sandboxes are noted: log, audit and OpenTelemetry spans.

Spans cost nothing unless an OpenTelemetry SDK is configured (see docs/operating.md). The call's span
is the one that the SDK of the protocol makes; a run's span is a trace of its own with a link to it,
because a run outlives its call, by hours if need be.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    SpanContext,
    SpanKind,
    StatusCode,
    get_current_span,
    get_tracer,
    get_tracer_provider,
)

from . import __version__
from .audit import Audit, described
from .logs import Log, frames
from .redact import Redactor

IDENTIFIER = re.compile(r"[A-Za-z0-9_.-]{1,80}")
FLUSH_SECONDS = 1.0
SAID_ALWAYS = ("kernel_died", "sandbox_lost")  # ends of a run that an operator should see

_call: ContextVar[Call | None] = ContextVar("seer_mcp_call", default=None)
_tracer = get_tracer("seer-mcp", __version__)


@dataclass(slots=True)
class Call:
    """One tool call, as the log, the audit and a run that it began know it."""

    id: str
    tool: str
    owner: str
    client: str | None
    sandbox: str | None
    cell: str | None
    audited: bool
    span: SpanContext
    began: float = field(default_factory=time.monotonic)
    runs: list[str] = field(default_factory=list[str])
    outcome: str = "error"
    characters: int = 0
    audit_trouble: str = ""
    over: bool = False

    def answered(self, is_error: bool, characters: int) -> None:
        self.outcome = "error" if is_error else "ok"
        self.characters = characters

    @property
    def note(self) -> str:
        """What the answer must say of the audit, or ''."""
        if not self.audit_trouble:
            return ""
        return f"NOTE: this call could not be written to the audit file ({self.audit_trouble})."


@dataclass(frozen=True)
class RunFacts:
    """What is noted of a run."""

    id: str
    kind: str
    sandbox: str
    cell: str | None
    owner: str
    notebook: str
    call: Call | None


def current_call() -> Call | None:
    """The call in whose name the current task works, while that call lasts."""
    call = _call.get()
    return None if call is None or call.over else call  # a task keeps the call that began it


def identifier(value: object) -> str | None:
    """The value if it can be an id or a name; anything else could be a source put in its place."""
    return value if isinstance(value, str) and IDENTIFIER.fullmatch(value) else None


async def flush_spans() -> None:
    """What an SDK still holds is sent now: the process may end without clean-up."""
    flush = getattr(get_tracer_provider(), "force_flush", None)  # only an SDK's has it
    if flush is None:
        return
    sending = asyncio.create_task(asyncio.to_thread(flush, int(FLUSH_SECONDS * 1000)))
    await asyncio.wait([sending], timeout=FLUSH_SECONDS)


class Observer:
    """Log, audit and spans of one server."""

    def __init__(self, state_dir: Path, audit_code: int, redactor: Redactor | None = None) -> None:
        self.instance = secrets.token_hex(3)
        self.log = Log(state_dir / "logs", self.instance, redactor)
        self.audit = Audit(state_dir / "audit.jsonl", self.instance, audit_code, self.log)
        self._numbers = count(1)
        self.on_call: Callable[[Call, float], None] = lambda call, seconds: None
        """Hears of each call that is over, and of the seconds it took."""
        self.on_run: Callable[[RunFacts, str, float | None, int], None] = (
            lambda run, state, seconds, output_bytes: None
        )
        """Hears of each run that is over: its state, seconds and bytes of output."""

    def open(self, **settings: Any) -> None:
        self.log.open()
        python = ".".join(map(str, sys.version_info[:3]))
        self.log.write("server_started", version=__version__, python=python, **settings)

    def not_made(self, folder: Path, error: OSError) -> None:
        why = error.strerror or str(error)
        self.log.write("folder_not_made", logging.WARNING, path=str(folder), why=why)

    def refused(self, tool: str, error: OSError) -> None:
        """What the system refused in a tool that did not expect it."""
        call = current_call()
        self.log.write(
            "refused", logging.ERROR, tool=tool, call=call.id if call else None, error=frames(error)
        )

    async def close(self) -> None:
        self.log.write("server_ended")
        self.log.close()
        await flush_spans()

    @contextmanager
    def call(
        self,
        tool: str,
        arguments: dict[str, Any],
        *,
        known: frozenset[str],
        changes: bool,
        owner: str,
        client: str | None,
    ) -> Generator[Call]:
        """Around one tool call; the outcome is what the body tells, or how it was left."""
        span = get_current_span()
        call = Call(
            f"{self.instance}-{next(self._numbers)}",
            tool[:80],
            owner,
            client,
            identifier(arguments.get("sandbox")),
            identifier(arguments.get("cell")),
            changes,
            span.get_span_context(),
        )
        if span.is_recording():
            told = {"user.id": owner, "seer.client": client, "seer.sandbox": call.sandbox}
            span.set_attribute("seer.call.id", call.id)
            span.set_attributes({key: value for key, value in told.items() if value})
        token = _call.set(call)
        if changes:
            call.audit_trouble = self.audit.add(
                "call",
                call=call.id,
                tool=call.tool,
                owner=owner,
                client=client,
                arguments=described(arguments, known, self.log.redactor),
            )
        try:
            yield call
        except asyncio.CancelledError:
            call.outcome = "cancelled"
            raise
        finally:
            _call.reset(token)
            call.over = True
            self._call_over(call)
            if span.is_recording():
                span.set_attribute("seer.outcome", call.outcome)
                if call.runs:
                    span.set_attribute("seer.run.ids", call.runs)

    def _call_over(self, call: Call) -> None:
        took = time.monotonic() - call.began
        self.on_call(call, took)
        milliseconds = round(took * 1000, 1)
        self.log.write(
            "call",
            tool=call.tool,
            call=call.id,
            owner=call.owner,
            client=call.client,
            sandbox=call.sandbox,
            cell=call.cell,
            runs=call.runs or None,
            outcome=call.outcome,
            ms=milliseconds,
            characters=call.characters,
        )
        if call.audited:
            call.audit_trouble = (
                self.audit.add(
                    "answer",
                    call=call.id,
                    tool=call.tool,
                    outcome=call.outcome,
                    ms=milliseconds,
                    runs=call.runs or None,
                )
                or call.audit_trouble
            )

    def run_begun(self, run: RunFacts, code: str) -> None:
        """Before the kernel or shell hears of it."""
        if run.call is not None:
            run.call.runs.append(run.id)
        trouble = self.audit.add(
            "run",
            run=run.id,
            kind=run.kind,
            call=run.call.id if run.call else None,
            owner=run.owner,
            sandbox=run.sandbox,
            cell=run.cell,
            notebook=run.notebook,
            **self.audit.code(code),
        )
        if trouble and run.call is not None:
            run.call.audit_trouble = trouble

    def run_over(
        self,
        run: RunFacts,
        state: str,
        started: float | None,
        seconds: float | None,
        output_bytes: int,
        code: int | None,
    ) -> None:
        """Once it has ended. After a restart of the server possibly a second time, with the same id."""
        self.on_run(run, state, seconds, output_bytes)
        common = {
            "run": run.id,
            "kind": run.kind,
            "call": run.call.id if run.call else None,
            "owner": run.owner,
            "sandbox": run.sandbox,
            "cell": run.cell,
            "state": state,
            "seconds": None if seconds is None else round(seconds, 3),
            "exit_code": code,
        }
        level = logging.WARNING if state in SAID_ALWAYS else logging.INFO
        self.log.write("run", level, **common, output_bytes=output_bytes)
        self.audit.add("run_over", **common)
        told = {
            "seer.run.id": run.id,
            "seer.run.kind": run.kind,
            "seer.run.state": state,
            "seer.run.output_bytes": output_bytes,
            "seer.sandbox": run.sandbox,
            "seer.cell": run.cell,
            "seer.call.id": run.call.id if run.call else None,
            "user.id": run.owner,
            "process.exit.code": code,
        }
        link = run.call.span if run.call is not None and run.call.span.is_valid else None
        begin = time.time() if started is None else started
        span = _tracer.start_span(
            f"run {run.kind}",
            context=Context(),
            kind=SpanKind.INTERNAL,
            attributes={key: value for key, value in told.items() if value is not None},
            links=[Link(link)] if link else None,
            start_time=int(begin * 1e9),
        )
        if state != "complete":
            span.set_attribute("error.type", state)
            span.set_status(StatusCode.ERROR, state)
        span.end(int((begin + (seconds or 0.0)) * 1e9))

    def sandbox(
        self, did: str, handle: str, owner: str, backend: str, notebook: str, why: str | None = None
    ) -> None:
        """It was started, found again, or ended."""
        call = current_call()
        told: dict[str, Any] = {
            "sandbox": handle,
            "did": did,
            "owner": owner,
            "backend": backend,
            "notebook": notebook,
            "why": why,
        }
        self.log.write("sandbox", **told)
        self.audit.add("sandbox", call=call.id if call else None, **told)
