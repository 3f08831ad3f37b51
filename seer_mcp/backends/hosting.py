"""What every backend brings to a machine, and what it tells the kernel host there.

The kernel host is the same everywhere. A backend copies `bundle()` to a folder there, writes
`host_config()` beside it as JSON, and starts `python -m kernel_host CONFIG` with that folder as its
PYTHONPATH. Values of secrets are in neither: they are in the environment of the host alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .. import kernel_host
from ..config import Config
from ..environment import SandboxSpec
from ..errors import BadInput, NotFound
from ..kernel_host.fault import in_host
from ..kernel_host.identity import INSTANCE, MARK
from . import Place, Sandbox

START_SECONDS = 30.0  # for the host to answer; its kernel has a little less
LINE_LIMIT = 256 * 1024 * 1024  # bytes of one line of the host
CODE = "kernel_host"
PACKS = "packs"
IGNORED = {"__pycache__", ".git", ".DS_Store"}


@dataclass(frozen=True)
class There:
    """Where things lie on the machine of a sandbox, as that machine names them."""

    directory: str
    """The host's own folder: configuration, journal, logs."""
    runtime: str
    """A private folder for sockets, short (a socket's address has about 100 characters)."""
    cwd: str
    """The kernel's working folder; put and get stay in it."""
    packs: str
    """What the kernel can import."""
    protected: Sequence[str] = ()
    """Files that nothing but the server may write."""

    @property
    def config(self) -> str:
        return f"{self.directory}/host.json"

    @property
    def socket(self) -> str:
        return f"{self.runtime}/host"

    @property
    def journal(self) -> str:
        return f"{self.directory}/journal.jsonl"

    @property
    def log(self) -> str:
        return f"{self.directory}/host.log"


def instance_of(config: Config) -> str:
    """A name for the state folder: what is not this one's belongs to another installation."""
    return hashlib.sha256(os.fsencode(os.path.realpath(config.state_dir))).hexdigest()[:12]


def marks(config: Config, handle: str) -> dict[str, str]:
    """What tells a sandbox's processes from all others: they carry it in their environment."""
    return {MARK: handle, INSTANCE: instance_of(config)}


def host_config(
    config: Config,
    spec: SandboxSpec,
    place: Place,
    there: There,
    *,
    base: Mapping[str, str] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What the kernel host is told. Holds the values of spec.env, and no secret.

    `base` is the environment of what runs in the sandbox, before the spec's; None: that of the host
    itself, on its own machine. The values of place.secrets must be in the host's environment: it
    hands them on by name. `more` is what only some backends say: limits, keep, hard_end_at, ….
    """
    path = [there.packs, *filter(None, [spec.env.get("PYTHONPATH")])]
    env = {**(base or {}), **spec.env, **marks(config, place.handle)}
    return {
        "owner": place.owner,
        "directory": there.directory,
        "ipc_directory": there.runtime,
        "socket": there.socket,
        "cwd": there.cwd,
        "protected": list(there.protected),
        "env": {**env, "PYTHONPATH": ":".join(path), "PYTHONUNBUFFERED": "1"},
        "inherit": base is None,
        "secrets": sorted(place.secrets),
        "idle_limit": spec.idle_limit or config.idle_limit,
        "lifetime": spec.lifetime,
        "output_cap": config.output_cap,
        "kernel_timeout": START_SECONDS - 5,
        "fault": config.fault if in_host(config.fault) else "",
        **more,
    }


def code_files() -> dict[str, Path]:
    """The kernel host: path in the bundle -> file on this side."""
    return _below(CODE, Path(kernel_host.__file__).parent)


def pack_files(packs: Mapping[str, Path]) -> dict[str, Path]:
    """The packs: path in the bundle -> file on this side."""
    found: dict[str, Path] = {}
    for name, source in packs.items():
        if source.is_dir():
            found |= _below(f"{PACKS}/{name}", source)
        else:
            found[f"{PACKS}/{name}.py"] = source
    return found


def _below(name: str, folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for here, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(set(folders) - IGNORED)
        at = PurePosixPath(name, Path(here).relative_to(folder).as_posix())
        for file in sorted(set(files) - IGNORED):
            if (path := Path(here, file)).is_file():
                found[str(at / file)] = path
    return found


def digest(files: Mapping[str, Path]) -> str:
    """A short name for these files and what is in them: the same for the same, on every machine."""
    total = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()[:16]


def packed(files: Mapping[str, Path]) -> bytes:
    """The files as a gzipped tar: their owner's alone there, whatever they are here."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", compresslevel=1) as tar:
        for name, path in sorted(files.items()):
            content = path.read_bytes()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), 0o600
            tar.addfile(info, io.BytesIO(content))
    return target.getvalue()


def refuse(spec: SandboxSpec, backend: str, reasons: Mapping[str, str]) -> None:
    """Raise BadInput for the first of these fields that the spec sets: no wish is passed over."""
    for name, why in reasons.items():
        value = getattr(spec, name)
        if value != SandboxSpec.model_fields[name].get_default(call_default_factory=True):
            raise BadInput(name, value, f"{why} (backend {backend})")


def regular(path: Path) -> os.stat_result:
    """What a file to send is like. Raises NotFound or BadInput."""
    try:
        info = path.stat()
    except FileNotFoundError:
        raise NotFound("file", str(path)) from None
    if not stat.S_ISREG(info.st_mode):
        raise BadInput("local", str(path), "it is not a file")
    return info


async def place_files(sandbox: Sandbox, spec: SandboxSpec) -> None:
    """Put the spec's files and folders into a sandbox that was just started."""
    for name, source in spec.files.items():
        path = Path(source)
        files = _below(name, path) if path.is_dir() else {name: path}
        for remote, local in files.items():
            await sandbox.put(local, remote)
