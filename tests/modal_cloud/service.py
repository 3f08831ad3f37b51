"""From a gRPC service's description to handlers: faults, tokens, and UNIMPLEMENTED for the rest."""

from __future__ import annotations

import traceback
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from grpclib import GRPCError, Status
from grpclib.const import Handler
from grpclib.exceptions import StreamTerminatedError
from grpclib.server import Stream

from .errors import refuse
from .faults import Cut, Faults

Admit = Callable[[str, Mapping[str, str]], None]
"""Raises GRPCError if a call with this metadata may not be made."""


@dataclass(frozen=True)
class Context:
    """What a handler may know of a call beside its request."""

    rpc: str
    metadata: Mapping[str, str]


class Service:
    """One gRPC service whose methods are looked for in `parts`, in order.

    A unary method is `async def Name(request, context) -> response` (None: an empty one); one that
    streams its answer is an async generator; one that streams its request gets the stream of
    messages instead of it.
    """

    def __init__(
        self, base: type, parts: list[Any], faults: Faults, admit: Admit, control_plane: bool
    ) -> None:
        self._parts = parts
        self._faults = faults
        self._admit = admit
        self._control_plane = control_plane
        empty = type("Empty", (base,), dict.fromkeys(base.__abstractmethods__))  # type: ignore[attr-defined]
        self._described: dict[str, Handler] = empty().__mapping__()

    def __mapping__(self) -> dict[str, Handler]:
        return {
            path: Handler(
                self._wrap(path.rsplit("/")[-1], handler),
                handler.cardinality,
                handler.request_type,
                handler.reply_type,
            )
            for path, handler in self._described.items()
        }

    def implemented(self) -> list[str]:
        names = [path.rsplit("/")[-1] for path in self._described]
        return sorted(name for name in names if self._method(name))

    def _method(self, name: str) -> Any:
        return next((getattr(part, name) for part in self._parts if hasattr(part, name)), None)

    def _wrap(self, name: str, handler: Handler) -> Callable[[Any], Awaitable[None]]:

        async def call(stream: Stream[Any, Any]) -> None:
            try:
                await self._serve(name, handler, stream)
            except Cut:
                await stream.cancel()
            except (GRPCError, StreamTerminatedError, TimeoutError):
                raise
            except Exception:
                self._faults.errors.append(f"{name}: {traceback.format_exc()}")
                raise

        return call

    async def _serve(self, name: str, handler: Handler, stream: Stream[Any, Any]) -> None:
        method, cardinality = self._method(name), handler.cardinality
        metadata: Mapping[str, str] = stream.metadata or {}  # type: ignore[assignment]
        request = None if cardinality.client_streaming else await stream.recv_message()
        later = await self._faults.enter(name, request, self._control_plane)
        self._admit(name, metadata)
        if method is None:
            refuse(Status.UNIMPLEMENTED, f"this test server has no {name}")
        context = Context(name, metadata)
        source = stream if cardinality.client_streaming else request
        if not cardinality.server_streaming:
            answer = await method(source, context)
            for fault in later:
                await self._faults.strike(fault)
            await stream.send_message(handler.reply_type() if answer is None else answer)
            return
        async for message in method(source, context):
            await stream.send_message(message)
            while later:
                await self._faults.strike(later.pop())
        for fault in later:
            await self._faults.strike(fault)
