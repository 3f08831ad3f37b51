"""The stub itself: what `kernel_host/launch.py` needs of ipykernel, and the wire protocol by hand."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import signal
import time
import uuid
from datetime import UTC, datetime
from typing import Any

import zmq

DELIMITER = b"<IDS|MSG>"
Message = dict[str, Any]


class Place:
    """Stands where launch.py looks for parts of IPython; has nothing that it would change."""


class IPKernelApp:
    """The names that launch.py uses."""

    def __init__(self, connection_file: str) -> None:
        self.session = Place()
        self.shell = Place()
        self.shell.display_pub = self.shell.displayhook = Place()
        with open(connection_file, encoding="utf-8") as file:
            self._stub = Stub(json.load(file))

    @classmethod
    def instance(cls, connection_file: str) -> IPKernelApp:
        return cls(connection_file)

    def initialize(self, arguments: list[str]) -> None:
        signal.signal(signal.SIGINT, self._stub.interrupted)

    def start(self) -> None:
        self._stub.serve()


class Stub:
    def __init__(self, info: dict[str, Any]) -> None:
        self._key = info["key"].encode()
        self._session = uuid.uuid4().hex
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        kinds = {"shell": zmq.ROUTER, "control": zmq.ROUTER, "stdin": zmq.ROUTER, "iopub": zmq.PUB}
        for channel, kind in {**kinds, "hb": zmq.REP}.items():
            socket = self._context.socket(kind)
            socket.linger = 1000
            socket.sndhwm = 0
            socket.bind(f"ipc://{info['ip']}-{info[channel + '_port']}")
            self._sockets[channel] = socket
        self._count = 0
        self._executing = False
        self._deaf = False  # to interrupts
        self._identity: list[bytes] = []
        self._parent: Message = {}
        self._previous: Message = {}
        self._timers: list[tuple[float, list[bytes], Message, list[dict[str, Any]]]] = []

    def interrupted(self, signum: int, frame: Any) -> None:
        if self._executing and not self._deaf:
            raise KeyboardInterrupt

    # -- the wire -----------------------------------------------------------------------------

    def _pack(self, kind: str, content: Any, parent: Any, sign: str) -> list[bytes]:
        header = {
            "msg_id": uuid.uuid4().hex,
            "session": self._session,
            "username": "stub",
            "date": datetime.now(UTC).isoformat(),
            "msg_type": kind,
            "version": "5.3",
        }
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        parts = [*(json.dumps(p).encode() for p in (header, parent, {})), content]
        key = self._key if sign == "right" else b"not the key"
        signature = hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        return [DELIMITER, b"" if sign == "none" else signature, *parts]

    def _send(self, channel: str, parts: list[bytes], identity: list[bytes]) -> None:
        lead = [b"stub"] if channel == "iopub" else identity
        self._sockets[channel].send_multipart([*lead, *parts])

    def _say(self, channel: str, kind: str, content: Any, step: Message) -> None:
        """Send one message; the step may say whose parent it names and how it is signed."""
        parent = self._parent_of(step.get("parent", "own"))
        parts = self._pack(kind, content, parent, step.get("sign", "right"))
        for _ in range(step.get("times", 1)):
            self._send(channel, parts, self._identity)
            if step.get("times", 1) > 1:  # a message twice is refused for its signature alone
                parts = self._pack(kind, content, parent, step.get("sign", "right"))

    def _parent_of(self, named: Any) -> Any:
        if named == "own":
            return self._parent
        if named == "previous":
            return self._previous
        if named == "none":
            return {}
        if named == "unknown":
            return {**self._parent, "msg_id": "no-such-message"}
        if isinstance(named, dict) and "huge" in named:
            return {**self._parent, "more": "x" * named["huge"]}
        return named["literal"]

    # -- the loop -----------------------------------------------------------------------------

    def serve(self) -> None:
        poller = zmq.Poller()
        for channel in ("shell", "control", "hb"):
            poller.register(self._sockets[channel], zmq.POLLIN)
        while True:
            wait = min((t[0] for t in self._timers), default=time.monotonic() + 60)
            ready = dict(poller.poll(max(0.0, wait - time.monotonic()) * 1000))
            if self._sockets["hb"] in ready:
                self._sockets["hb"].send(self._sockets["hb"].recv())
            for channel in ("control", "shell"):
                if self._sockets[channel] in ready:
                    self._request(channel)
            due = [t for t in self._timers if t[0] <= time.monotonic()]
            self._timers = [t for t in self._timers if t not in due]
            for _, identity, parent, steps in due:
                now = self._identity, self._parent
                self._identity, self._parent = identity, parent
                self.play(steps)
                self._identity, self._parent = now

    def _request(self, channel: str) -> None:
        parts = self._sockets[channel].recv_multipart()
        at = parts.index(DELIMITER)
        header, content = json.loads(parts[at + 2]), json.loads(parts[at + 5])
        self._identity = parts[:at]
        kind = header["msg_type"]
        if kind == "execute_request":
            self._previous, self._parent = self._parent, header
            self._execute(content["code"])
            return
        before, self._parent = self._parent, header
        self._say("iopub", "status", {"execution_state": "busy"}, {})
        if kind == "kernel_info_request":
            info = {"status": "ok", "protocol_version": "5.3", "implementation": "stub"}
            self._say(channel, "kernel_info_reply", info, {})
        self._say("iopub", "status", {"execution_state": "idle"}, {})
        self._parent = before  # `previous` is about cells

    def _execute(self, code: str) -> None:
        self._count += 1
        self._executing, self._deaf = True, False
        try:
            self.play(steps_of(code))
        except KeyboardInterrupt:
            error = {"ename": "KeyboardInterrupt", "evalue": "", "traceback": ["KeyboardInterrupt"]}
            self._executing = False
            self.play([{"error": error}, {"reply": "error", "content": error}, {"idle": 1}])
        finally:
            self._executing = False

    # -- scripts ------------------------------------------------------------------------------

    def play(self, steps: list[dict[str, Any]]) -> None:
        """Play the steps of a script in order. A step is a dict; its first key says what it does:

        busy, idle             a status message
        reply: "ok"|"error"|…  an execute_reply with that status; `content` adds to it
        stdout, stderr: text   a stream message
        result: text           an execute_result
        display: data          a display_data
        error: content         an error message
        say: msg_type          any message, with `content` (or its `json`, as text) and `on` a
                               channel (default "iopub")
        raw: [text, …]         these parts as they are, `on` a channel (signed by nobody)
        sleep: seconds         an interrupt ends the script here, as KeyboardInterrupt
        deaf                   from here on interrupts are ignored
        exit: code             the process ends
        kill: number           the process sends itself a signal
        later: seconds         `steps` are played then, whatever runs at that time

        A message may name its parent: own (default), previous (the cell before), unknown, none,
        {"huge": characters} or {"literal": anything}; be signed right (default), wrong or none; and
        be sent several times.
        """
        for step in steps:
            name, value = next(iter(step.items()))
            getattr(self, "_play_" + name)(value, step)

    def _play_busy(self, value: Any, step: Message) -> None:
        self._say("iopub", "status", {"execution_state": "busy"}, step)

    def _play_idle(self, value: Any, step: Message) -> None:
        self._say("iopub", "status", {"execution_state": "idle"}, step)

    def _play_reply(self, value: str, step: Message) -> None:
        content = {"status": value, "execution_count": self._count, "payload": []}
        self._say("shell", "execute_reply", {**content, **step.get("content", {})}, step)

    def _play_stdout(self, value: str, step: Message) -> None:
        self._say("iopub", "stream", {"name": "stdout", "text": value}, step)

    def _play_stderr(self, value: str, step: Message) -> None:
        self._say("iopub", "stream", {"name": "stderr", "text": value}, step)

    def _play_result(self, value: str, step: Message) -> None:
        data = {"text/plain": value}
        content = {"data": data, "metadata": {}, "execution_count": self._count}
        self._say("iopub", "execute_result", content, step)

    def _play_display(self, value: Any, step: Message) -> None:
        self._say("iopub", "display_data", {"data": value, "metadata": {}}, step)

    def _play_error(self, value: Any, step: Message) -> None:
        self._say("iopub", "error", value, step)

    def _play_say(self, value: str, step: Message) -> None:
        content = step["json"].encode() if "json" in step else step.get("content", {})
        self._say(step.get("on", "iopub"), value, content, step)

    def _play_raw(self, value: list[str], step: Message) -> None:
        self._send(step.get("on", "iopub"), [part.encode() for part in value], self._identity)

    def _play_sleep(self, value: float, step: Message) -> None:
        time.sleep(value)

    def _play_deaf(self, value: Any, step: Message) -> None:
        self._deaf = True

    def _play_exit(self, value: int, step: Message) -> None:
        self._context.destroy(linger=1000)  # what was said is heard
        os._exit(value)

    def _play_kill(self, value: int, step: Message) -> None:
        time.sleep(0.2)  # what was said is heard
        os.kill(os.getpid(), value)

    def _play_later(self, value: float, step: Message) -> None:
        due = time.monotonic() + value
        self._timers.append((due, self._identity, self._parent, step["steps"]))


def steps_of(code: str) -> list[dict[str, Any]]:
    """The script that a cell is, or that of an echo."""
    try:
        found = json.loads(code)
    except ValueError:
        found = None
    if isinstance(found, dict) and "script" in found:
        return found["script"]
    return [
        {"busy": 1},
        {"stdout": code + "\n"},
        {"result": str(len(code))},
        {"reply": "ok"},
        {"idle": 1},
    ]
