"""Checks of the machine: interpreters, packages, limits, GPU, the cloud's token."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import operator
import os
import platform
import re
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..kernel_host import limits
from .findings import Finding, Patient, fail, ok, warn

# As counted on Linux: a kernel with torch has 63 files open and, with its host, 19 threads (more on
# many cores); the server has 10 files open, 3 more for each sandbox, and one for each connection.
FILES_AT_LEAST = 128
FILES_OF_SERVER = 64
FILES_PER_SANDBOX = 4
THREADS_PER_SANDBOX = 25
TOOL_SECONDS = 30.0
KERNEL_PYTHON = (3, 9)
KERNEL_NEEDS = ("ipykernel", "jupyter-client")
OPERATORS = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
    "==": operator.eq,
    "!=": operator.ne,
}

# Run by the sandboxes' interpreter: what is installed there, without importing any of it.
LOOK = r"""
import importlib.metadata, importlib.util, json, pathlib, re, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        versions[name] = None
cuda = None
spec = importlib.util.find_spec("torch")
if spec is not None and spec.origin:
    path = pathlib.Path(spec.origin).parent / "version.py"
    if path.exists():
        found = re.search(r"^cuda\b[^=\n]*=\s*'([^']+)'", path.read_text(), re.M)
        cuda = found.group(1) if found else None
print(json.dumps({"python": list(sys.version_info[:3]), "versions": versions, "cuda": cuda}))
"""


@dataclass(frozen=True)
class Requirement:
    name: str
    bounds: tuple[tuple[str, str], ...]
    extra: str


def requirements(lines: list[str]) -> list[Requirement]:
    """Requirement lines of metadata, as far as ours go: a name, bounds, perhaps an extra."""
    made: list[Requirement] = []
    for line in lines:
        needed, _, marker = line.partition(";")
        found = re.match(r"\s*([A-Za-z0-9._-]+)(\[[^\]]*\])?\s*(.*)", needed)
        extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
        if found is not None:
            bounds = re.findall(r"(>=|<=|==|!=|<|>)\s*([^,\s]+)", found[3])
            made.append(Requirement(found[1], tuple(bounds), extra[1] if extra else ""))
    return made


def release(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def within(version: str, bounds: tuple[tuple[str, str], ...]) -> bool:
    """Whether a version keeps the bounds, by its release numbers."""
    have = release(version)
    for sign, bound in bounds:
        want = release(bound)
        width = max(len(have), len(want))
        padded = [numbers + (0,) * (width - len(numbers)) for numbers in (have, want)]
        if not OPERATORS[sign](*padded):
            return False
    return True


def needed_packages() -> list[Requirement]:
    """What the installed metadata of this program asks for; raises PackageNotFoundError."""
    return requirements(importlib.metadata.requires("seer-mcp") or [])


def judged(
    needs: list[Requirement], versions: dict[str, str | None]
) -> tuple[list[str], list[str]]:
    """Names that are missing, and sentences on those out of range."""
    missing: list[str] = []
    wrong: list[str] = []
    for need in needs:
        version = versions[need.name]
        if version is None:
            missing.append(need.name)
        elif not within(version, need.bounds):
            bounds = ",".join(sign + bound for sign, bound in need.bounds)
            wrong.append(f"{need.name} {version} (needed: {bounds})")
    return missing, wrong


async def python(patient: Patient) -> list[Finding]:
    """The interpreter of the server."""
    said = f"Python {platform.python_version()} at {sys.executable}"
    try:
        wanted = str(importlib.metadata.metadata("seer-mcp").json.get("requires_python", ""))
    except importlib.metadata.PackageNotFoundError:
        return [warn(f"{said}; seer-mcp itself is not installed in it", "run: uv sync")]
    bounds = requirements([f"python{wanted}"])[0].bounds
    if not within(platform.python_version(), bounds):
        return [fail(f"{said}, but it has to be {wanted}", "install seer-mcp in a newer one")]
    return [ok(said)]


async def packages(patient: Patient) -> list[Finding]:
    """What the server imports, against the bounds in its metadata."""
    try:
        needs = [need for need in needed_packages() if not need.extra]
    except importlib.metadata.PackageNotFoundError:
        return [warn("the bounds are not known: seer-mcp is not installed", "run: uv sync")]
    versions = {need.name: installed(need.name) for need in needs}
    missing, wrong = judged(needs, versions)
    if missing or wrong:
        said = [*(f"{name} is missing" for name in missing), *wrong]
        return [fail("; ".join(said), "run: uv sync (or: pip install --upgrade seer-mcp)")]
    return [ok(f"{len(needs)} packages of the server are in range")]


def installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


async def output_of(*command: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output of a short program; raises OSError or TimeoutError."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=env,
    )
    try:
        async with asyncio.timeout(TOOL_SECONDS):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise TimeoutError(f"{command[0]} did not end within {TOOL_SECONDS:.0f} s") from None
    return process.returncode or 0, said.decode(errors="replace")


async def looked(patient: Patient) -> dict[str, Any] | Finding:
    """What is installed in the interpreter of local sandboxes, or why that cannot be told."""
    if "interpreter" not in patient.kept:
        patient.kept["interpreter"] = await _look(patient)
    return patient.kept["interpreter"]


async def _look(patient: Patient) -> dict[str, Any] | Finding:
    program = patient.config.python
    mend = "give another one with --python, or mend it"
    if shutil.which(program) is None:
        return fail(f"there is no program {program}", mend)
    try:
        names = {need.name for need in needed_packages() if need.extra == "local"}
    except importlib.metadata.PackageNotFoundError:
        names = set(KERNEL_NEEDS)
    try:
        code, said = await output_of(
            program, "-c", LOOK, *sorted(names), env=dict(patient.config.sandbox_env)
        )
        if code == 0:
            return json.loads(said)
    except (OSError, ValueError) as error:
        said, code = str(error), 1
    return fail(f"{program} does not run (exit code {code}): {said.strip()[-300:]}", mend)


async def interpreter(patient: Patient) -> list[Finding]:
    """The interpreter of local sandboxes, and the packages of kernels and packs in it."""
    found = await looked(patient)
    if isinstance(found, Finding):
        return [found]
    program = patient.config.python
    version = ".".join(map(str, found["python"]))
    if tuple(found["python"][:2]) < KERNEL_PYTHON:
        return [fail(f"{program} is Python {version}", "a kernel needs Python 3.9 or later")]
    versions: dict[str, str | None] = found["versions"]
    try:
        needs = [need for need in needed_packages() if need.name in versions and need.extra]
    except importlib.metadata.PackageNotFoundError:
        needs = [Requirement(name, (), "local") for name in KERNEL_NEEDS]
    missing, wrong = judged(needs, versions)
    install = f"{program} -m pip install"
    findings = [
        fail(f"{name} is missing in {program}: no kernel can start", f"run: {install} {name}")
        for name in missing
        if name in KERNEL_NEEDS
    ]
    others = [name for name in missing if name not in KERNEL_NEEDS]
    if others:
        mend = f"run: {install} {' '.join(others)}"
        findings.append(warn(f"not in {program}: {', '.join(others)}; packs need them", mend))
    if wrong:
        mend = "notebooks may run all the same; change the versions if a pack does not"
        findings.append(warn(f"untried versions in {program}: {'; '.join(wrong)}", mend))
    return findings or [ok(f"Python {version} at {program}, {len(needs)} packages in range")]


async def ulimits(patient: Patient) -> list[Finding]:
    """Open files and processes, against what the configured number of sandboxes takes."""
    return [files_limit(patient), process_limit(patient)]


def files_limit(patient: Patient) -> Finding:
    count = patient.config.max_sandboxes
    need = FILES_OF_SERVER + FILES_PER_SANDBOX * count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("no limit on open files")
    said = f"{soft} open files for each process"
    top = "" if hard == resource.RLIM_INFINITY or hard >= need else f" (the hard limit is {hard})"
    mend = f"raise it before the server starts: ulimit -n {max(need, 1024)}{top}"
    if soft < FILES_AT_LEAST:
        return fail(f"{said}: too few for one kernel with torch ({FILES_AT_LEAST})", mend)
    if soft < need:
        room = (soft - FILES_OF_SERVER) // FILES_PER_SANDBOX
        return warn(f"{said}: enough for about {room} of {count} sandboxes", mend)
    return ok(f"{said}, {need} are needed for {count} sandboxes")


def process_limit(patient: Patient) -> Finding:
    count = patient.config.max_sandboxes
    room, by = free_threads()
    if room is None:
        return ok("no limit on processes and threads binds here")
    said = f"{room:,} more processes and threads may be started ({by})"
    mend = "raise the limit (ulimit -u, or the container's pids limit), or run fewer sandboxes"
    if room < 3 * THREADS_PER_SANDBOX:
        return fail(f"{said}: too few for a kernel with torch", mend)
    if room < THREADS_PER_SANDBOX * count:
        able = room // THREADS_PER_SANDBOX
        return warn(f"{said}: enough for about {able} of {count} sandboxes", mend)
    return ok(said)


def free_threads() -> tuple[int | None, str]:
    """How many threads may still be started, and which limit says so; (None, "") without one."""
    found: list[tuple[int, str]] = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY and os.getuid() != 0:  # it does not bind root
        found.append((soft - threads_of(os.getuid()), "ulimit -u"))
    for folder in own_groups():
        try:
            top = (folder / "pids.max").read_text().strip()
            used = int((folder / "pids.current").read_text())
        except (OSError, ValueError):
            continue  # the root group has no such files
        if top.isdigit():
            found.append((int(top) - used, f"pids.max of {folder}"))
    return min(found) if found else (None, "")


def threads_of(uid: int) -> int:
    count = 0
    for process in psutil.process_iter():
        try:
            if process.uids().real == uid:
                count += process.num_threads()
        except psutil.Error:
            continue
    return count


def own_groups() -> list[Path]:
    """The control groups of this process that may limit processes, up to the root."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    folders: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "pids"):
            top = Path("/sys/fs/cgroup") / controllers
            own = top / path.lstrip("/")
            folders += [own, *(p for p in own.parents if p.is_relative_to(top))]
    return folders


async def cgroups(patient: Patient) -> list[Finding]:
    """By which means a sandbox's memory and processes can be limited here."""
    name = f"seer-mcp-doctor-{os.getpid()}"
    plan = await asyncio.to_thread(limits.prepare, name, 64, 512)
    await asyncio.to_thread(limits.remove, plan["groups"])
    means = plan["means"]
    if means.startswith("cgroup"):
        return [ok(f"sandboxes can be limited by {means}")]
    why = "no control group can be made here"
    if means == "rlimit":
        return [ok(f"{why}: limits count for each process of a sandbox, not for all together")]
    mend = "nothing has to be done; for hard limits give the server a control group of its own"
    return [warn(f"{why}: a sandbox over its limit is noticed only after some time", mend)]


async def gpu(patient: Patient) -> list[Finding]:
    """torch in the sandboxes' interpreter, and what nvidia-smi says; torch is not imported."""
    found = await looked(patient)
    versions: dict[str, str | None] = {} if isinstance(found, Finding) else found["versions"]
    torch, cuda = versions.get("torch"), None if isinstance(found, Finding) else found["cuda"]
    built = f"torch {torch} ({f'CUDA {cuda}' if cuda else 'CPU only'})" if torch else "no torch"
    if shutil.which("nvidia-smi") is None:
        return [ok(f"{built}; no NVIDIA GPU is visible (no nvidia-smi)")]
    try:
        code, said = await output_of(
            "nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"
        )
    except (OSError, TimeoutError) as error:
        code, said = 1, str(error)
    if code != 0:
        mend = "models run on the CPU until the driver is mended"
        return [warn(f"{built}; nvidia-smi fails: {said.strip()[:200]}", mend)]
    cards = "; ".join(line.strip() for line in said.splitlines() if line.strip())
    if torch and not cuda:
        mend = "install a torch with CUDA into the sandboxes' interpreter"
        return [warn(f"{cards}, but {built}", mend)]
    return [ok(f"{built}; {cards}")]


async def modal(patient: Patient) -> list[Finding]:
    """Whether there is a token for Modal, never which. Local sandboxes do not need it."""
    environ, file = patient.environ, patient.home / ".modal.toml"
    pair = [bool(environ.get(name)) for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET")]
    version = installed("modal")
    package = f"modal {version} is installed" if version else "modal is not installed"
    if any(pair) and not all(pair):
        mend = "set both MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, or neither"
        return [warn(f"only one half of a Modal token is in the environment; {package}", mend)]
    where = "the environment" if all(pair) else str(file) if file.exists() else ""
    token = f"a token is in {where}" if where else "no token"
    return [ok(f"{token}; {package}; local sandboxes need neither")]
