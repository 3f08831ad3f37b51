"""`seer-mcp doctor`: what is wrong with this machine or with what earlier servers left, and how to mend it."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass

import psutil

from ..errors import BadInput, SeerError
from . import machine, places, sandboxes
from .findings import Check, Finding, Patient, fail

__all__ = ["CHECKS", "Finding", "Line", "Patient", "examine"]

# In this order: a folder that is closed or full explains what follows, a record settled is no orphan.
CHECKS: dict[str, Check] = {
    "python": machine.python,
    "packages": machine.packages,
    "interpreter": machine.interpreter,
    "gpu": machine.gpu,
    "modal": machine.modal,
    "disk": places.disk,
    "writing": places.writing,
    "modes": places.modes,
    "socket-path": places.socket_path,
    "locks": places.locks,
    "ulimits": machine.ulimits,
    "cgroups": machine.cgroups,
    "records": sandboxes.records,
    "processes": sandboxes.processes,
    "sockets": sandboxes.sockets,
    "parts": places.parts,
    "kernel": sandboxes.kernel,
}
TROUBLE = (OSError, SeerError, psutil.Error, subprocess.SubprocessError)


@dataclass(frozen=True)
class Line:
    """One line of the report: a finding of a check, or (status "fixed") what was done."""

    check: str
    status: str
    says: str
    mend: str = ""
    fixable: bool = False


async def examine(
    patient: Patient, names: Iterable[str] = (), fix: bool = False
) -> AsyncGenerator[Line]:
    """The report, line by line as it is found. With `fix`, a check is made again after its repairs."""
    chosen = list(names) or list(CHECKS)
    if unknown := [name for name in chosen if name not in CHECKS]:
        raise BadInput("check", unknown[0], f"there is none; known: {', '.join(CHECKS)}")
    for name in chosen:
        findings = await found(name, patient)
        if fix and (fixes := [finding.fix for finding in findings if finding.fix]):
            for repair in fixes:
                try:
                    yield Line(name, "fixed", await repair())
                except TROUBLE as error:
                    yield Line(name, "fail", f"a repair failed: {error}", "see the line below")
            findings = await found(name, patient)
        for one in findings:
            yield Line(name, one.status, one.says, one.mend, one.fix is not None)


async def found(name: str, patient: Patient) -> list[Finding]:
    try:
        return await CHECKS[name](patient)
    except TROUBLE as error:
        return [fail(f"this could not be checked: {error}", "see what the message names")]
