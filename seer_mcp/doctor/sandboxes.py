"""Checks of sandboxes: whether one starts, and what earlier ones and their servers left."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import stat
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from ..backends import Backend, Record, open_backend
from ..backends.local import hosted
from ..environment import SandboxSpec
from ..errors import SeerError
from ..files import Lock, private_dir, write_json
from ..kernel_host.identity import MARK
from ..logs import held
from ..packs import Packs
from ..sessions import Register
from ..sessions.finds import FORGET_SECONDS
from ..sessions.record import read_record, sealed
from .findings import Finding, Fix, Patient, fail, ok, warn
from .places import shortly

RUN_SECONDS = 60.0
NEEDED = ("handle", "backend", "notebook", "created", "owner", "name", "ended", "sandbox")
SOCKETS = re.compile(r"host|k\d+-\d+")
BESIDE = re.compile(r"k\d+\.(json|stdout|stderr)")  # what the kernel host keeps with them


async def kernel(patient: Patient) -> list[Finding]:
    """A real sandbox in a folder of its own: start it, run 1 + 1, end it."""
    folder = Path(tempfile.mkdtemp(prefix="seer-mcp-doctor-"))
    config = replace(
        patient.config,
        project_dir=folder,
        outputs_dir=folder / "outputs",
        state_dir=folder / "state",
        on_exit="stop",
    )
    register = Register(config, Packs([]))
    began = time.monotonic()
    try:
        await register.open()
        try:
            said = await one_and_one(register)
        finally:
            await register.close()
    except (SeerError, OSError, TimeoutError) as error:
        mend = "see the lines above; --python names another interpreter"
        return [fail(f"no kernel can be started: {error}", mend)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    took = time.monotonic() - began
    if said != "2":
        mend = "see the checks of ulimits and of the interpreter, and its IPython settings"
        return [fail(f"a sandbox was started, but 1 + 1 came out as: {said}", mend)]
    return [ok(f"a sandbox was started, computed 1 + 1 and was ended in {took:.1f} s")]


async def one_and_one(register: Register) -> str:
    """What 1 + 1 is in a new sandbox."""
    spec = SandboxSpec(idle_limit=120)
    session = await register.start("doctor", "doctor", spec, "", False, lambda text: None)
    cell = session.notebook.insert("code", "1 + 1")
    (run,) = await session.run_cells([cell])

    async def silent(text: str) -> None:
        return

    if not await session.wait([run], RUN_SECONDS, silent):
        raise TimeoutError(f"1 + 1 took more than {RUN_SECONDS:.0f} s")
    if run.state != "complete":
        return f"{run.state} {run.why}"
    return session.last_line(run)


# -- records ----------------------------------------------------------------------------------


@dataclass
class Kept:
    """One folder of the state, and what runs of it."""

    folder: Path
    busy: bool
    """Whether a living server holds it. Asked before the record is read: a server notes the end of a
    sandbox before it lets go."""
    record: dict[str, Any] | None
    """None if it cannot be read."""
    why: str
    running: Record | None
    """What the machine says runs under this handle."""

    @property
    def host_lives(self) -> bool:
        return self.running is not None and bool(self.running["pid"])


def usable(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """A record with all that a server needs of it, or None and why."""
    try:
        record = read_record(folder)
        missing = [key for key in NEEDED if key not in record]
        float(record["created"])
        return (None, f"it lacks {', '.join(missing)}") if missing else (record, "")
    except FileNotFoundError:
        return None, "there is none"
    except KeyError as error:
        return None, f"it lacks {error}"
    except (OSError, ValueError, TypeError, RecursionError) as error:
        return None, str(error)


async def running(patient: Patient) -> dict[str, Record]:
    """What runs of the local sandboxes of this state folder, by handle."""
    backend = open_backend("local", patient.config)
    return {str(record["handle"]): record for record in await backend.sweep("")}


async def kept(patient: Patient) -> list[Kept]:
    """Every folder of a sandbox in the state."""
    live = await running(patient)
    folder = patient.config.state_dir / "sandboxes"
    folders = sorted(path for path in folder.glob("*") if path.is_dir())
    return [Kept(path, held(path / "lock"), *usable(path), live.get(path.name)) for path in folders]


async def records(patient: Patient) -> list[Finding]:
    """Records of sandboxes: of living ones, of those that are gone, and damaged ones."""
    findings: list[Finding] = []
    living = past = 0
    for one in await kept(patient):
        if one.record is None:
            findings += damaged(patient, one)
        elif one.record["ended"] is not None:
            past += 1
            if forgotten(one.record):
                findings.append(past_one(one))
        elif one.busy:
            living += 1
        elif await gone(patient, one.record):
            findings.append(
                warn(
                    f"sandbox {one.folder.name} has ended and no server has noted it yet",
                    "the next server that starts writes its last outputs into its notebook",
                    settle(patient, one.folder),
                )
            )
        else:
            living += 1
    said = f"{living} living sandboxes, {past} that ended"
    return findings or [ok(said)]


def forgotten(record: dict[str, Any]) -> bool:
    return time.time() - float(record["created"]) > FORGET_SECONDS


async def gone(patient: Patient, record: dict[str, Any]) -> bool:
    """Whether the machine of a record has certainly ended."""
    if record["sandbox"] is None:
        return True  # nobody holds it and it never got a machine: its start was cut off
    try:
        backend: Backend = open_backend(str(record["backend"]), patient.config)
        return await backend.find(record["sandbox"]) is None
    except (SeerError, KeyError, TypeError, ValueError):
        return False


def past_one(one: Kept) -> Finding:
    async def fix() -> str:
        lock = Lock(one.folder / "lock")
        if not lock.take():
            return f"left {one.folder.name}: a server looks at it"
        shutil.rmtree(one.folder)
        lock.release()
        return f"forgot {one.folder.name}"

    days = FORGET_SECONDS / 86400
    said = f"sandbox {one.folder.name} ended more than {days:.0f} days ago"
    return warn(said, f"its record can be forgotten: {one.folder}", fix)


def settle(patient: Patient, folder: Path) -> Fix:
    """As the next server would: its last outputs go into its notebook, its record says it ended."""

    async def fix() -> str:
        register = Register(replace(patient.config, on_exit="keep"), Packs([]))
        try:
            note = await register.settle(folder)
        finally:
            await register.close()
        record, _ = usable(folder)
        if note is None and record is not None and record["ended"] is not None:
            return (
                f"noted that {folder.name} has ended; its notebook {record['notebook']} is complete"
            )
        return f"left {folder.name}: {note or 'it lives after all'}"

    return fix


def damaged(patient: Patient, one: Kept) -> list[Finding]:
    """A record that no server can use: written anew if the sandbox lives, else put aside."""
    name = one.folder.name
    if age(one.folder) < patient.grace or one.busy:
        return []  # a start under way, or a server that holds it and will write it again
    if one.host_lives:
        said = f"sandbox {name} lives, but its record cannot be used ({one.why})"
        mend = "doctor --fix writes it anew from what the sandbox was started with"
        return [fail(said, mend, rebuild(one))]
    if one.running is not None:
        return []  # remains: the check of processes tells them
    said = f"the record of sandbox {name} cannot be used ({one.why}); nothing of it runs"
    mend = f"look whether you need {one.folder}/journal.jsonl, then remove the folder"
    return [warn(said, mend, put_aside(patient, one.folder))]


def age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def rebuild(one: Kept) -> Fix:
    async def fix() -> str:
        assert one.running is not None
        try:
            config = hosted(one.folder)
            notebook = config["protected"][0]
        except (OSError, ValueError, KeyError, IndexError) as error:
            return f"left {one.folder.name}: host.json cannot be used either ({error!r})"
        lock = Lock(one.folder / "lock")
        if not lock.take():
            return f"left {one.folder.name}: a server holds it"
        record = {
            "handle": one.folder.name,
            "name": one.folder.name.rsplit("-", 1)[0],
            "owner": config.get("owner", "local"),
            "backend": "local",
            "notebook": notebook,
            "created": one.running["started"],
            "ended": None,
            "stopping": None,
            "price": None,  # a local one costs nothing
            "secrets": config.get("secrets", []),
            "shared": False,  # until its owner shares it again
            "investigation": None,
            "sandbox": one.running,
        }
        write_json(one.folder / "record.json", sealed(record))
        lock.release()
        return f"wrote the record of {one.folder.name} anew: the next server finds it again"

    return fix


def put_aside(patient: Patient, folder: Path) -> Fix:
    async def fix() -> str:
        lock = Lock(folder / "lock")
        if not lock.take():
            return f"left {folder.name}: a server holds it"
        aside = private_dir(patient.config.state_dir / "damaged")
        target = aside / f"{folder.name}-{int(time.time())}"
        folder.rename(target)
        lock.release()
        return f"put {folder.name} aside: {target}"

    return fix


# -- processes --------------------------------------------------------------------------------


async def processes(patient: Patient) -> list[Finding]:
    """Processes of sandboxes that no record tells of, or whose sandbox has ended."""
    findings: list[Finding] = []
    live = await running(patient)
    for handle, record in live.items():
        folder = patient.config.state_dir / "sandboxes" / handle
        told, why = usable(folder)
        host = int(record["pid"])
        if told is not None and told["ended"] is None and (host or not await gone(patient, told)):
            continue
        if host and told is None and (folder / "host.json").exists():
            continue  # the check of records writes its record anew
        if held(folder / "lock"):
            continue  # a server holds it, and ends what is left
        why = "its sandbox has ended" if told is not None else f"its record: {why}"
        said = f"processes of sandbox {handle} run without an owner ({why})"
        mend = "no server can find them again: doctor --fix ends them"
        findings.append(fail(said, mend, end(patient, handle)))
    return findings or [ok(f"{len(live)} sandboxes run, each with a record")]


def end(patient: Patient, handle: str) -> Fix:
    async def fix() -> str:
        folder = patient.config.state_dir / "sandboxes" / handle
        lock = Lock(folder / "lock") if folder.is_dir() else None
        if lock is not None and not lock.take():
            return f"left {handle}: a server holds it"
        await open_backend("local", patient.config).clear(handle)
        if lock is not None:
            lock.release()
        return f"ended the processes of {handle}"

    return fix


# -- sockets ----------------------------------------------------------------------------------


async def sockets(patient: Patient) -> list[Finding]:
    """Folders of sockets in the runtime folder whose sandbox is gone. Several states share it."""
    folder = patient.config.runtime_dir
    if not folder.is_dir():
        return [ok("no sockets are left over")]
    used = await asyncio.to_thread(sockets_in_use)
    stale: list[Path] = []
    strange: list[Path] = []
    for path in sorted(folder.iterdir()):
        if path in used or age(path) < patient.grace:
            continue
        if not is_socket_folder(path):
            strange.append(path)
        elif not await answers(path / "host"):
            stale.append(path)
    findings: list[Finding] = []
    if stale:
        said = f"{len(stale)} folders of sockets of sandboxes that are gone: {shortly(stale)}"
        findings.append(warn(said, "they can be removed", remove_sockets(stale)))
    if strange:
        said = f"{shortly(strange)}: not ours, in a folder that should hold only sockets"
        findings.append(warn(said, "look what it is; remove it if nobody needs it"))
    return findings or [ok(f"no sockets are left over ({len(used)} sandboxes use theirs)")]


def sockets_in_use() -> set[Path]:
    """Folders of sockets of every living kernel host of this user, of whatever state folder."""
    used: set[Path] = set()
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if "kernel_host" in command and MARK in process.environ():
                used.add(Path(hosted(Path(command[-1]).parent)["ipc_directory"]))
        except (psutil.Error, OSError, ValueError, KeyError):
            continue  # it ended, or tells nothing: then its socket is asked
    return used


def is_socket_folder(path: Path) -> bool:
    if not re.fullmatch(r"[0-9a-f]{12}", path.name) or path.is_symlink() or not path.is_dir():
        return False
    return path.lstat().st_uid == os.getuid() and all(map(is_of_host, path.iterdir()))


def is_of_host(path: Path) -> bool:
    mode = path.lstat().st_mode
    return bool(
        (SOCKETS.fullmatch(path.name) and stat.S_ISSOCK(mode))
        or (BESIDE.fullmatch(path.name) and stat.S_ISREG(mode))
    )


async def answers(socket: Path) -> bool:
    """Whether somebody listens there. One that is too busy to answer counts as listening."""
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_unix_connection(str(socket))
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    except (OSError, TimeoutError):
        return True
    writer.close()
    return True


def remove_sockets(stale: list[Path]) -> Fix:
    async def fix() -> str:
        gone = [path for path in stale if not await answers(path / "host")]
        for path in gone:
            shutil.rmtree(path)
        return f"removed {len(gone)}: {shortly(gone)}"

    return fix
