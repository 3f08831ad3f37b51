"""How a handler refuses: with the status that a client of Modal understands."""

from __future__ import annotations

from typing import Any, NoReturn

from grpclib import GRPCError, Status


def refuse(status: Status, message: str, details: Any = None) -> NoReturn:
    raise GRPCError(status, message, details)


def not_found(what: str) -> NoReturn:
    refuse(Status.NOT_FOUND, f"{what} not found")
