"""One IPython kernel as a child process: start, talk, interrupt, end, and tell how it died."""

from __future__ import annotations

import asyncio
import collections
import datetime
import os
import secrets
import signal
import sys
import time
from typing import Any, Callable, Deque, Dict, Iterable, List, Optional, Tuple

import psutil  # a dependency of ipykernel
import zmq
import zmq.asyncio
from jupyter_client.connect import write_connection_file
from jupyter_client.session import Session

from . import last_words
from .fault import fault_point
from .limits import Limits

Message = Dict[str, Any]
HOST_PID = "JPY_PARENT_PID"  # in the environment of a kernel and what it starts (ipykernel's name)
BEHIND = 0.5  # seconds that messages may wait for us before the kernel has to
SLICE = 0.005  # seconds of listening after which requests get a turn
CHANNELS = ("shell", "iopub", "control")
# What reading a message can raise: not signed, no JSON, nested too deep, a date out of range, …
UNUSABLE = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class KernelFailedToStart(Exception):
    """`why` and the end of what the kernel wrote to stderr."""

    def __init__(self, why: str, stderr: str) -> None:
        super().__init__(why)
        self.why = why
        self.stderr = stderr


def how_it_died(code: int, out_of_memory: str) -> str:
    """Exit code, signal and the likely cause (the OOM killer's, if it is known), as a phrase."""
    if code >= 0:
        return "exit code %d" % code
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    cause = "; " + out_of_memory if out_of_memory else ""
    if not cause and -code == signal.SIGKILL:
        cause = "; most likely out of memory"
    return "signal %d, %s%s" % (-code, name, cause)


class Kernel:
    """A started kernel. `on_message(channel, message)` hears everything it says."""

    def __init__(
        self,
        directory: str,
        generation: int,
        env: Dict[str, str],
        cwd: str,
        log_path: str,
        limits: Limits,
        on_message: Callable[[str, Message], None],
        on_exit: Callable[["Kernel", str], None],
    ) -> None:
        self.generation = generation
        self.pid = 0
        self.alive = False
        self._directory = directory
        self._env = env
        self._cwd = cwd
        self._log_path = log_path
        self._limits = limits
        self._condemned = ""
        self._on_message = on_message
        self._on_exit = on_exit
        self._process: Optional[asyncio.subprocess.Process] = None
        self._context = zmq.asyncio.Context()
        self._sockets: Dict[str, zmq.asyncio.Socket] = {}
        self._tasks: List[asyncio.Task] = []
        self._held = False
        self._probe: Optional[str] = None
        self._heard_probe = asyncio.Event()
        self._oom_before = limits.oom_kills()
        self._sendings: Deque[Tuple[str, int, str]] = collections.deque(maxlen=200)

    async def start(self, timeout: float) -> None:
        """Start the process and wait until its outputs are sure to be heard.

        A fresh kernel publishes before a subscriber is connected, and that is lost. So a harmless
        request is repeated until its own status message has come back on iopub.
        """
        prefix = self._prefix = os.path.join(self._directory, "k%d" % self.generation)
        file, found = write_connection_file(
            prefix + ".json",
            transport="ipc",
            ip=prefix,
            shell_port=1,
            iopub_port=2,
            stdin_port=3,
            control_port=4,
            hb_port=5,
            key=secrets.token_hex(16).encode("ascii"),  # without one nothing would be signed
        )
        info: Dict[str, Any] = dict(found)
        self._session = Session(key=info["key"].encode(), username="seer")
        for channel in CHANNELS:
            socket = self._context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER)
            socket.linger = 0
            socket.rcvhwm = 0  # the default drops messages for a reader that is slow for a moment
            if channel == "iopub":
                socket.subscribe(b"")
            else:
                socket.identity = self._session.bsession
            socket.connect("ipc://%s-%d" % (prefix, info[channel + "_port"]))
            self._sockets[channel] = socket
        launch = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")
        with open(self._log_path, "ab", opener=_private) as log:
            self._log_start = log.tell()
            fault_point("host.kernel.create")
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *self._limits.wrap([sys.executable, launch, file]),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=self._cwd,
                    env={**self._env, HOST_PID: str(os.getpid())},
                    start_new_session=True,
                )
            except OSError as error:
                self._close()
                raise KernelFailedToStart(
                    "its process could not be made: %s" % error, ""
                ) from error
        self.pid = self._process.pid
        self.alive = True
        fault_point("host.kernel.created")
        for channel in CHANNELS:
            self._tasks.append(asyncio.ensure_future(self._receive(channel)))
        exited = asyncio.ensure_future(self._process.wait())
        heard = asyncio.ensure_future(self._heard_probe.wait())
        end = time.monotonic() + timeout
        while not heard.done() and not exited.done() and time.monotonic() < end:
            self._probe = self.send("shell", "kernel_info_request", {})
            await asyncio.wait({exited, heard}, timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
        if self._heard_probe.is_set():
            self._make_private()
            self._tasks.append(asyncio.ensure_future(self._watch(exited)))
            return
        heard.cancel()
        if exited.done():
            why = "it ended at once (%s)" % how_it_died(exited.result(), self._oom())
        else:
            exited.cancel()
            why = "it gave no sign of life in %.0f s" % timeout
        await self.kill()
        raise KernelFailedToStart(why, self._stderr())

    def send(self, channel: str, kind: str, content: Dict[str, Any]) -> str:
        """Send one request; its message id tells the answers."""
        message = self._session.msg(kind, content)
        parts = self._session.serialize(message)
        # zmq queues it at once; the future only says so.
        self._sockets[channel].send_multipart(parts, flags=zmq.NOBLOCK)
        return str(message["header"]["msg_id"])

    def interrupt(self) -> None:
        """Ctrl-C, for the kernel and what its cell started in the foreground."""
        if self.alive:
            os.killpg(self.pid, signal.SIGINT)

    def _hold_if_behind(self, sent: Any) -> None:
        """Stop a kernel that speaks faster than we write, until what it said is in the journal.

        Messages that wait for us are in our memory, and there is no other way to push back: a
        publisher drops what its readers are too slow for.
        """
        if self._held or not isinstance(sent, datetime.datetime) or sent.tzinfo is None:
            return
        if time.time() - sent.timestamp() > BEHIND and self._pending("iopub"):
            self._held = self._signal(signal.SIGSTOP)

    def _go_on(self) -> None:
        if self._held:
            self._held = False
            self._signal(signal.SIGCONT)

    def _signal(self, signum: int) -> bool:
        """To the kernel's own process, if it is there."""
        if self._process is None or self._process.returncode is not None:
            return False
        try:
            os.kill(self.pid, signum)
        except ProcessLookupError:
            return False
        return True

    def _pending(self, channel: str) -> bool:
        return bool(int(self._sockets[channel].getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def condemn(self, how: str) -> None:
        """End the process because it is over a limit; `how` becomes what it died of."""
        if self.alive:
            self._condemned = "ended by the kernel host: " + how
            os.killpg(self.pid, signal.SIGKILL)

    async def kill(self) -> None:
        """End the process and everything it started that is still its own; returns when gone.

        What it had said by then is heard first.
        """
        unheard, self.alive = self.alive, False
        if self._process is not None and self._process.returncode is None:
            await kill_tree(self._process.pid)
            await self._process.wait()
        if unheard:
            await self._silence()
            self._hear_last_words()
        self._close()

    def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        for socket in self._sockets.values():
            socket.close()
        self._context.term()
        for name in self._files():
            os.unlink(os.path.join(self._directory, name))

    async def _receive(self, channel: str) -> None:
        socket = self._sockets[channel]
        began = time.monotonic()
        while True:
            if self._held and channel == "iopub" and not self._pending(channel):
                self._go_on()
            parts = await socket.recv_multipart()
            if time.monotonic() - began > SLICE:  # a flood of messages must not starve requests
                await asyncio.sleep(0)
                began = time.monotonic()
            try:
                _, signed = self._session.feed_identities(parts)
                message = self._session.deserialize(signed)
                parent = message["parent_header"]
                if channel == "iopub":
                    self._hold_if_behind(message["header"].get("date"))
                if channel == "iopub" and parent.get("msg_id") == self._probe:
                    self._heard_probe.set()
                if "seer_sending" in parent:
                    name = message["content"]["name"]
                    self._sendings.append((name, parent["seer_sending"], parent["msg_id"]))
                self._on_message(channel, message)
            except UNUSABLE as error:
                # Code in the kernel can send anything; the next message counts as well.
                print("message on %s passed over: %r" % (channel, error), file=sys.stderr)

    async def _watch(self, exited: "asyncio.Future[int]") -> None:
        code = await exited
        if not self.alive:
            return
        await self._silence()
        if not self.alive:
            return  # it is ended on purpose meanwhile
        self.alive = False
        self._hear_last_words()
        how = self._condemned or how_it_died(code, self._oom())
        await kill_tree(self.pid)
        self._on_exit(self, how)

    async def _silence(self) -> None:
        """Wait until what it said last, which is still in the sockets, has been heard."""
        quiet = 0
        while quiet < 3:
            pending = any(self._pending(channel) for channel in CHANNELS)
            quiet = 0 if pending else quiet + 1
            await asyncio.sleep(0.02)

    def _oom(self) -> str:
        killed = self._limits.oom_kills() > self._oom_before
        return self._limits.out_of_memory() if killed else ""

    def _make_private(self) -> None:
        """The kernel made its sockets by its user's umask."""
        for name in self._files():
            os.chmod(os.path.join(self._directory, name), 0o600)

    def _files(self) -> List[str]:
        try:
            names = os.listdir(self._directory)
        except OSError:
            return []  # a logout took the folder away
        own = "k%d" % self.generation
        return [name for name in names if name.startswith((own + "-", own + "."))]

    def _hear_last_words(self) -> None:
        """What it wrote and could not send any more."""
        for name in ("stdout", "stderr"):
            for number, parent, text in last_words.read("%s.%s" % (self._prefix, name)):
                if (name, number, parent) not in self._sendings:
                    message = {
                        "msg_type": "stream",
                        "parent_header": {"msg_id": parent},
                        "content": {"name": name, "text": text},
                    }
                    self._on_message("iopub", message)

    def _stderr(self) -> str:
        with open(self._log_path, "rb") as log:
            log.seek(max(self._log_start, os.path.getsize(self._log_path) - 20_000))
            return log.read().decode("utf-8", "backslashreplace")


def _private(path: str, flags: int) -> int:
    """An opener of files that are their owner's alone."""
    return os.open(path, flags, 0o600)


def descendants(pid: int) -> "List[psutil.Process]":
    """What a process started, and what that started, as far as it still runs."""
    try:
        family = psutil.Process(pid).children(recursive=True)
        return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


def came_from_kernel(process: "psutil.Process") -> bool:
    """Whether a descendant of the host is a kernel's (and not a command's)."""
    try:
        return process.environ().get(HOST_PID) == str(os.getpid())
    except psutil.Error:
        return False  # gone, or out of reach


def end_all(processes: "Iterable[psutil.Process]") -> None:
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            pass


async def kill_tree(pid: int) -> None:
    """SIGKILL a group leader, its group and its descendants, until none is left."""
    for _ in range(100):
        family = descendants(pid)
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # it is gone, or only its zombie is left
        end_all(family)
        if not family:
            return
        await asyncio.sleep(0.01)
