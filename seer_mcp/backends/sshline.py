"""The way to one machine: the system's own ssh client, and a program that is sent over its stdin.

All of ~/.ssh/config holds. Nobody is asked for anything: a login that needs a password or an unknown
host key is an error with a sentence. Connections to one machine are shared (ControlMaster), and a
client that is gone leaves a shared connection behind for a minute at most.
"""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import json
import os
import re
import shlex
import tempfile
import zlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .. import kernel_host
from ..errors import SandboxUnreachable
from .hosting import LINE_LIMIT

CONNECT_SECONDS = 10
ANSWER_SECONDS = 20.0  # for a login to be over, and for an interpreter to start
ENDING_SECONDS = 5.0
OPTIONS = {
    "BatchMode": "yes",
    "ConnectTimeout": str(CONNECT_SECONDS),
    "ServerAliveInterval": "15",
    "ServerAliveCountMax": "3",
    # What runs there gets nothing of ours: no agent, no display, no ports.
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ClearAllForwardings": "yes",
    "PermitLocalCommand": "no",
    "RequestTTY": "no",
    "RemoteCommand": "none",
    "LogLevel": "ERROR",
}
CONTROL_BYTES = 104 - 18  # of a socket's address; ssh adds a suffix while it makes one
SHARED_SECONDS = 60
HOST = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._+-]*@)?[A-Za-z0-9_\[:][A-Za-z0-9._:%\]-]*")
ANSWERS = b"seer-mcp answers\n"  # what a login prints stands before it
NOISE_BYTES = 1 << 20

# Read from stdin and run: the program, packed into one line. Nothing in the home folder is imported.
BOOT = (
    "import sys;sys.path[:1]=[];import zlib,base64;"
    "exec(zlib.decompress(base64.b64decode(sys.stdin.buffer.readline())))"
)
LOADER = """
import sys
sys.stdout.buffer.write(%(answers)r)
sys.stdout.buffer.flush()
wanted = [] if sys.version_info >= (3, 9) else ["Python 3.9 or later (it is %%d.%%d)" %% sys.version_info[:2]]
if not wanted:
    import importlib.util
    wanted = [name for name in %(needed)r if importlib.util.find_spec(name) is None]
if wanted:
    import json
    print(json.dumps({"ok": False, "code": "needs", "error": ", ".join(wanted)}))
else:
    import types
    package = types.ModuleType("kernel_host")
    package.__path__ = []
    sys.modules["kernel_host"] = package
    for name, text in %(modules)r:
        module = types.ModuleType("kernel_host." + name)
        module.__package__ = "kernel_host"
        sys.modules[module.__name__] = module
        setattr(package, name, module)
        exec(compile(text, "<%%s of seer-mcp>" %% name, "exec"), module.__dict__)
    module.main()
"""
# The modules of the kernel host that an operation uses, in the order of their imports.
PROCESSES = ("limits", "identity")
FILES = (*PROCESSES, "fault", "folder", "transfer")
MODULES = {
    "look": PROCESSES,
    "start": PROCESSES,
    "find": PROCESSES,
    "end": PROCESSES,
    "clear": PROCESSES,
    "sweep": PROCESSES,
    "put": FILES,
    "get": FILES,
    "attach": ("attach",),
}
KERNEL_NEEDS = ("ipykernel", "jupyter_client", "psutil", "zmq")

WHY = (
    (
        "REMOTE HOST IDENTIFICATION HAS CHANGED",
        "its host key is not the one that is known here. Either the machine was set up anew, or something else answers "
        "in its place. If you know why, remove the old key with ssh-keygen -R and log in once",
    ),
    (
        "Host key verification failed|host key is known",
        "its host key is not known here. Log in once in a terminal (ssh {host}) and check it",
    ),
    (
        "Permission denied|Too many authentication failures|sign_and_send_pubkey",
        "it refused the login ({line}). `ssh {host} true` must work without a password: see IdentityFile in "
        "~/.ssh/config, or ssh-agent",
    ),
    (
        "Could not resolve hostname",
        "there is no such host. Name one of ~/.ssh/config, or user@machine",
    ),
    (
        "Connection refused",
        "no ssh server listens there (connection refused)",
    ),
    ("timed out", "it did not answer in time"),
    ("No route to host|Network is unreachable", "there is no way to it from here ({line})"),
)


class NoProgram(SandboxUnreachable):
    """The machine answers, and has no such interpreter."""


class Refusal(Exception):
    """The answer of the program there, which says no."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__(str(answer.get("error")))
        self.answer = answer
        self.code = str(answer.get("code"))


Feed = Callable[[StreamWriter], Awaitable[None]]
Take = Callable[[dict[str, Any], StreamReader], Awaitable[None]]


class Call:
    """A running ssh client, and the file of what it writes to stderr."""

    def __init__(self, process: asyncio.subprocess.Process, errors: IO[bytes]) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.given, self.said = process.stdin, process.stdout
        self._process = process
        self._errors = errors

    async def past_noise(self) -> None:
        """Read what a login prints, up to where our program speaks."""
        read = 0
        while (line := await self.said.readline()) != ANSWERS:
            read += len(line)
            if not line.endswith(b"\n") or read > NOISE_BYTES:
                raise ConnectionResetError

    async def failed(self) -> tuple[int | None, str]:
        """How it ended, and what it said, when its stream had ended."""
        try:
            async with asyncio.timeout(2.0):
                code = await self._process.wait()
        except TimeoutError:
            code = None
        self._errors.seek(0)
        return code, self._errors.read()[-8000:].decode("utf-8", "backslashreplace")

    async def over(self) -> None:
        """Wait until nobody writes to it any more, and then for its end."""
        try:
            await self.given.wait_closed()
            async with asyncio.timeout(ENDING_SECONDS):
                await self._process.wait()
        except (OSError, TimeoutError):
            return
        finally:
            await self.end()

    async def end(self) -> None:
        # Kills it if it is there, and closes its pipes: a process would wait for who reads them.
        self._process._transport.close()  # pyright: ignore
        try:
            await self._process.wait()
        finally:
            self._errors.close()


class Line:
    """The way to `host`, whose interpreter is `python`."""

    def __init__(self, ssh: Sequence[str], host: str, python: str, folder: Path) -> None:
        self.host = host
        self.python = python
        self._ssh = [*ssh]
        for name, value in OPTIONS.items():
            self._ssh += ["-o", f"{name}={value}"]
        digest = hashlib.sha256("\0".join([*ssh, host]).encode()).hexdigest()[:12]
        control = folder / f"ssh-{digest}"
        if len(os.fsencode(control)) <= CONTROL_BYTES:
            self._ssh += ["-o", f"ControlPath={str(control).replace('%', '%%')}"]
            self._share = ["-o", "ControlMaster=auto", "-o", f"ControlPersist={SHARED_SECONDS}"]
        else:
            self._share = ["-o", "ControlMaster=no", "-o", "ControlPath=none"]
        self._bridges: set[asyncio.Task[None]] = set()

    async def ask(
        self,
        op: str,
        seconds: float = 60.0,
        feed: Feed | None = None,
        take: Take | None = None,
        **fields: Any,
    ) -> dict[str, Any]:
        """The answer to one request. `feed` writes what follows it, `take` reads what follows the answer.

        `seconds` are for the answer; what is fed and taken may take as long as the line lives. Raises
        Refusal, or SandboxUnreachable.
        """
        call = await self._begin(op, fields)
        try:
            if feed is not None:
                with suppress(
                    ConnectionError
                ):  # a program that refuses does not read it: it answers
                    await feed(call.given)
            async with asyncio.timeout(seconds):
                line = await call.said.readline()
            if not line.endswith(b"\n"):
                raise ConnectionResetError
            answer: dict[str, Any] = json.loads(line)
            if answer.get("ok") is not True:
                raise Refusal(answer)
            if take is not None:
                await take(answer, call.said)
            return answer
        except TimeoutError:
            await self.forget()
            raise self._unreachable(f"it gave no answer to {op!r} in {seconds:.0f} s") from None
        except (ConnectionError, asyncio.IncompleteReadError, ValueError) as error:
            raise self._failure(*await call.failed()) from error
        finally:
            await call.end()

    async def open(self, op: str, **fields: Any) -> tuple[StreamReader, StreamWriter]:
        """The streams of a program that says with an empty line that they lead on to something.

        Raises SandboxUnreachable.
        """
        call = await self._begin(op, fields)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                line = await call.said.readline()
            if line != b"\n":
                raise self._failure(*await call.failed())
        except TimeoutError:
            await call.end()
            raise self._unreachable("its kernel host cannot be asked for") from None
        except BaseException:
            await call.end()
            raise
        bridge = asyncio.create_task(call.over(), name=f"bridge to {self.host}")
        self._bridges.add(bridge)
        bridge.add_done_callback(self._bridges.discard)
        return call.said, call.given

    async def forget(self) -> None:
        """Let the next call make a connection of its own: the shared one may be dead."""
        process = await asyncio.create_subprocess_exec(
            *self._ssh,
            *("-O", "stop", "--", self.host),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            async with asyncio.timeout(2.0):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def _begin(self, op: str, fields: dict[str, Any]) -> Call:
        """A call whose program has its request, and from where on its answer is to be read."""
        command = f"{quoted(self.python)} -B -c {shlex.quote(BOOT)}"
        # A file, not a pipe: a shared connection that stays behind may hold it open.
        errors = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            process = await asyncio.create_subprocess_exec(
                *self._ssh,
                *self._share,
                *("--", self.host, command),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=LINE_LIMIT,
                start_new_session=True,  # a Ctrl-C at the server's terminal is not for it
            )
        except BaseException as error:
            errors.close()
            if isinstance(error, OSError):
                why = f"ssh itself could not be started here ({error})"
                raise self._unreachable(why) from error
            raise
        call = Call(process, errors)
        try:
            call.given.write(
                program(op) + b"\n" + json.dumps({"op": op, **fields}).encode() + b"\n"
            )
            async with asyncio.timeout(CONNECT_SECONDS + ANSWER_SECONDS):
                await call.past_noise()
        except ConnectionError as error:
            why = await call.failed()
            await call.end()
            raise self._failure(*why) from error
        except TimeoutError:
            await call.end()
            await self.forget()
            raise self._unreachable("the login there does not come to an end") from None
        except BaseException:
            await call.end()
            raise
        return call

    def _failure(self, code: int | None, text: str) -> SandboxUnreachable:
        """What ended a call, in one sentence."""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if code in (126, 127):
            said = f" ({lines[-1]})" if lines else ""
            return NoProgram(f"The machine {self.host} has no program {self.python!r}{said}.")
        for pattern, why in WHY:
            if found := re.search(pattern, text):
                line = next(one for one in lines if found[0] in one)
                return self._unreachable(why.format(host=self.host, line=line))
        last = lines[-1] if lines else "the connection broke"
        return self._unreachable(last if code in (255, None) else f"{last}, exit code {code}")

    def _unreachable(self, why: str) -> SandboxUnreachable:
        return SandboxUnreachable(f"The machine {self.host} cannot be reached: {why.rstrip('.')}.")


def quoted(python: str) -> str:
    """For the shell there, which makes a home folder of ~."""
    if python.startswith("~/"):
        return f'"$HOME"/{shlex.quote(python[2:])}'
    return shlex.quote(python)


@functools.cache
def program(op: str) -> bytes:
    """The program that does `op`, as one line."""
    folder = Path(kernel_host.__file__).parent
    names = (*MODULES.get(op, ()), "remote")
    modules = [(name, (folder / f"{name}.py").read_text()) for name in names]
    needed = KERNEL_NEEDS if op == "look" else ()
    text = LOADER % {"answers": ANSWERS, "needed": needed, "modules": modules}
    return base64.b64encode(zlib.compress(text.encode()))
