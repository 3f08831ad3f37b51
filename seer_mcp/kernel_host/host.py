"""Queue, runs, requests and the lease: what happens in one sandbox.

Requests and answers are JSON lines over a unix socket. A request is {"id": …, "op": …, …}, its
answer {"id": …, "ok": true, …} or {"id": …, "ok": false, "code": …, "error": …}. After `subscribe`
events of the journal follow on the same connection as {"n": …, "type": …, …}.
"""

from __future__ import annotations

import asyncio
import collections
import ctypes
import json
import math
import os
import signal
import sys
import time
from typing import Any, Awaitable, Callable, Deque, Dict, List, Optional, Set

from .commands import Commands
from .door import Door
from .events import (
    Event,
    count_of,
    display_event,
    escape_surrogates,
    of_type,
    output_event,
    pages_of,
)
from .fault import fault_point
from .folder import Folder
from .journal import Journal
from .keep import GROW_SECONDS, grow, keep
from .kernel import Kernel, KernelFailedToStart, Message, came_from_kernel, descendants, end_all
from .limits import WATCH_SECONDS, Limits, remove

STREAM_PIECE = 256 * 1024  # characters of one stream event
PR_SET_CHILD_SUBREAPER = 36


class Refused(Exception):
    """A request that cannot be done: a code for programs and a sentence for people."""

    def __init__(self, code: str, error: str) -> None:
        super().__init__(error)
        self.code = code


class Run:
    """One execution of one cell (or of one shell command)."""

    def __init__(self, id: str, kind: str, code: str, group: str, stop_on_error: bool) -> None:
        self.id = id
        self.kind = kind
        self.code = code
        self.group = group
        self.stop_on_error = stop_on_error
        self.state = "queued"
        self.first = 0  # number of its first event
        self.started = 0.0
        self.interrupted = False
        self.reply: Optional[Dict[str, Any]] = None
        self.idle = False
        self.heard_of = False  # the kernel has said something about it
        self.output_bytes = 0
        self.dropped_bytes = 0

    @property
    def over(self) -> bool:
        return self.state not in ("queued", "running")


def environment(config: Dict[str, Any]) -> Dict[str, str]:
    """What the kernel and the commands find in theirs; the host's own has the secrets."""
    env: Dict[str, str] = dict(os.environ) if config.get("inherit") else {}
    env.update(config["env"])
    env.update((name, os.environ[name]) for name in config.get("secrets", []))
    # `python` in a cell or command is the kernel's own.
    first = os.path.dirname(os.path.abspath(sys.executable))
    env["PATH"] = os.pathsep.join(filter(None, [first, env.get("PATH")]))
    return env


class Host:
    def __init__(self, config: Dict[str, Any]) -> None:
        self.config = config = {**config, "env": environment(config)}
        self.directory: str = config["directory"]
        self.own: str = config.get("own", self.directory)  # what it writes, where it may not all
        self.output_cap: int = config.get("output_cap", 200_000_000)
        self.journal = Journal(os.path.join(self.own, "journal.jsonl"))
        self.folder = Folder(config["cwd"], config.get("protected", []))
        self.limits = Limits(config.get("limits"))
        self.commands = Commands(config["cwd"], config["env"], self.limits, self._command_event)
        self.runs: Dict[str, Run] = {}
        self.queue: Deque[Run] = collections.deque()
        self.active: Optional[Run] = None
        self.by_message: Dict[str, Run] = {}
        self.probes: Dict[str, Run] = {}  # asked behind a run that was interrupted
        self.latest: Optional[Run] = None  # started last: unclaimed output is its
        self.kernel: Optional[Kernel] = None
        self.kernel_state = "starting"
        self.how = ""  # it died, or did not start
        self.stderr = ""
        self.generation = 0
        self.idle_limit: Optional[float] = config.get("idle_limit")
        self.hard_end_at: Optional[float] = config.get("hard_end_at")
        self.end_at: Optional[float] = None
        # A lifetime is by this machine's clock: the server's may be another.
        lifetime_over = time.time() + config["lifetime"] if config.get("lifetime") else None
        self._end_at(lifetime_over, config.get("end_at"))
        self.heard = time.monotonic()
        self.grew = asyncio.Event()
        self.closing = asyncio.Event()
        self.restarting = asyncio.Lock()
        self.tasks: Set[asyncio.Task] = set()

    # -- life ---------------------------------------------------------------------------------

    async def serve(self) -> int:
        """Run until stopped, idle for too long, or told by a signal."""
        if sys.platform == "linux":  # orphans of the kernel come to us, so that they can be ended
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signum, self.close, "told to stop by a signal")
        door = Door(self.config["socket"], self._client)
        await door.open()
        fault_point("host.listening")
        self._spawn(door.keep_open())
        self._spawn(self._start_kernel())
        self._spawn(self._tick())
        if self.limits.watched:
            self._spawn(self._watch_limits())
        if self.config.get("keep"):
            self._spawn(self._keep_growing())
        await self.closing.wait()
        door.close()
        for run in list(self.queue):
            self._end(run, "not_run", "the sandbox ended")
        self.queue.clear()
        fault_point("host.closing")
        await self.commands.stop_all()
        if self.kernel:
            await self.kernel.kill()  # what it said last belongs to the run
        if self.active:
            self._end(self.active, "expired", self.config["why_closed"])
        fault_point("host.closed")
        self._emit({"type": "closing", "why": self.config["why_closed"]})
        await asyncio.sleep(0.2)  # readers that are there get the last lines
        await self._end_everything()
        if self.config.get("keep"):
            log = os.path.join(self.directory, "host.log")
            await loop.run_in_executor(None, keep, self.journal, log, self.config["keep"])
        door.remove()
        return 0

    async def _keep_growing(self) -> None:
        """What is kept has everything but the last seconds, until the closing makes it whole."""
        kept = 1
        while True:
            await asyncio.sleep(GROW_SECONDS)
            lines, after = self.journal.read(kept)
            while lines and not self.closing.is_set():
                work = asyncio.get_running_loop().run_in_executor
                if not await work(None, grow, self.config["keep"], lines):
                    break
                kept = after
                lines, after = self.journal.read(kept)

    async def _end_everything(self) -> None:
        """Nothing of the sandbox goes on, also not what starts another while it is ended."""
        for _ in range(100):
            left = descendants(os.getpid())
            if not left:
                break
            end_all(left)
            self._reap()
            await asyncio.sleep(0.01)
        remove(self.limits.plan["groups"])

    def _end_at(self, *moments: Optional[float]) -> None:
        """Let the sandbox end at the first of them, or when the machine does if that is before."""
        known = [m for m in (*moments, self.hard_end_at) if m is not None]
        if known:
            self.end_at = min(known)

    def _lease(self) -> Event:
        return {
            "now": time.time(),
            "end_at": self.end_at,
            "hard_end_at": self.hard_end_at,
            "idle_limit": self.idle_limit,
        }

    def close(self, why: str) -> None:
        self.config.setdefault("why_closed", why)
        self.closing.set()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self.tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: "asyncio.Task[None]") -> None:
        self.tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            # A host with a part missing must not go on as if it were whole.
            asyncio.get_running_loop().call_exception_handler(
                {"message": "the kernel host failed", "exception": task.exception()}
            )
            self.close("the kernel host failed: %r" % task.exception())

    async def _tick(self) -> None:
        """The lease, and the reaping of orphans."""
        while True:
            await asyncio.sleep(1.0)
            if self.busy:
                self.heard = time.monotonic()
            if self.idle_limit and time.monotonic() - self.heard > self.idle_limit:
                self.close("idle for %d s" % self.idle_limit)
            if self.end_at and time.time() > self.end_at:
                self.close("its lifetime is over")
            self._reap()

    async def _watch_limits(self) -> None:
        """Where no limit can be set: end what has become too large, the kernel or the commands."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if not self.limits.may_breach():
                continue
            family = descendants(os.getpid())
            why = self.limits.breach(family)
            if why is None:
                continue
            of_kernel = [p for p in family if came_from_kernel(p)]
            others = [p for p in family if p not in of_kernel]
            if self.limits.breach(of_kernel) or len(of_kernel) >= len(others):
                if self.kernel:
                    self.kernel.condemn(why)
                self._end_orphans()
            else:
                await self.commands.condemn(why)
                end_all(others)

    def _reap(self) -> bool:
        """Collect orphans that came to us; children that have an owner here are left to it.

        Whether none is left that has ended.
        """
        mine = self.commands.pids()
        if self.kernel:
            mine.add(self.kernel.pid)
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                if info is None:
                    return True
                if info.si_pid in mine:
                    return False
                os.waitpid(info.si_pid, os.WNOHANG)
            except ChildProcessError:
                return True

    @property
    def busy(self) -> bool:
        return bool(self.active or self.queue or self.commands.running or self.restarting.locked())

    # -- the kernel ---------------------------------------------------------------------------

    async def _start_kernel(self) -> None:
        async with self.restarting:
            self.generation += 1
            self.kernel_state, self.how, self.stderr = "starting", "", ""
            self._emit({"type": "kernel", "state": "starting", "generation": self.generation})
            self.kernel = Kernel(
                self.config["ipc_directory"],
                self.generation,
                self.config["env"],
                self.config["cwd"],
                os.path.join(self.own, "kernel.log"),
                self.limits,
                self._on_message,
                self._on_exit,
            )
            try:
                await self.kernel.start(self.config.get("kernel_timeout", 60.0))
            except KernelFailedToStart as error:
                self.kernel_state, self.how, self.stderr = "failed", error.why, error.stderr
            except OSError as error:  # no room, or no folder, for its files and sockets
                await self.kernel.kill()
                self.kernel_state, self.how = "failed", "its files could not be made: %s" % error
            else:
                fault_point("host.kernel.ready")
                self.kernel_state = "ready"
        self._emit(
            {
                "type": "kernel",
                "state": self.kernel_state,
                "generation": self.generation,
                "how": self.how,
                "pid": self.kernel.pid,
            }
        )
        self._next()

    def _on_exit(self, kernel: Kernel, how: str) -> None:
        self.kernel_state, self.how = "dead", how
        if self.active:
            self._end(self.active, "kernel_died", how)
        while self.queue:
            self._end(self.queue.popleft(), "not_run", "the kernel died (%s)" % how)
        self._emit({"type": "kernel", "state": "dead", "generation": kernel.generation, "how": how})
        self._end_orphans()

    def _end_orphans(self) -> None:
        """End what a kernel that is gone left in sessions of their own; commands go on."""
        end_all(p for p in descendants(os.getpid()) if came_from_kernel(p))

    async def _orphans_gone(self) -> None:
        """What the old kernel left is ended and collected: until then it counts for the limit."""
        for _ in range(100):
            self._end_orphans()
            if self._reap():
                return
            await asyncio.sleep(0.01)

    async def _restart(self) -> None:
        if self.kernel_state == "starting":
            raise Refused("starting", "the kernel is starting already")
        kernel, self.kernel_state = self.kernel, "starting"
        while self.queue:
            self._end(self.queue.popleft(), "not_run", "the kernel was restarted")
        if kernel:
            await kernel.kill()  # what it said last belongs to the run
        if self.active:
            self._end(self.active, "interrupted", "the kernel was restarted")
        fault_point("host.restart.killed")
        await self._orphans_gone()
        self.by_message.clear()
        self.probes.clear()
        self.latest = None
        await self._start_kernel()

    def _on_message(self, channel: str, message: Message) -> None:
        fault_point("host.message")
        parent = message["parent_header"].get("msg_id", "")
        run = self.by_message.get(parent)
        kind, content = message["msg_type"], message["content"]
        if channel == "shell":
            if (asked := self.probes.pop(parent, None)) is not None:
                self._spawn(self._end_if_dropped(asked))
            if run and run.reply is None and kind == "execute_reply":
                run.reply = of_type(dict, content)
                for data in pages_of(content):
                    self._output(run, display_event(data), 0)
                self._maybe_over(run)
            return
        if channel != "iopub":
            return
        if run and not run.over:
            run.heard_of = True
        if kind == "status":
            if run and content["execution_state"] == "idle":
                run.idle = True
                self._maybe_over(run)
            return
        run = run or self.latest
        if run is None or run.kind != "cell":
            return
        if kind == "stream":
            self._stream(run, of_type(str, content["name"]), of_type(str, content["text"]))
        elif (event := output_event(kind, content)) is not None:
            size = len(json.dumps(event["data"])) if "data" in event else 0
            self._output(run, event, size)

    async def _end_if_dropped(self, run: Run) -> None:
        """The kernel has gone past an interrupted run: it is over, unless its end is under way."""
        await asyncio.sleep(0.5)
        if self.active is run:
            if run.reply is not None:
                why = "the kernel had answered, but never said that it was idle"
            elif run.heard_of:
                why = "the kernel went on to what was asked behind it, and never said how it ended"
            else:
                why = "the interrupt came before it had begun"
            self._end(run, "interrupted", why)
            self._next()

    def _maybe_over(self, run: Run) -> None:
        if run.reply is None or not run.idle or run.over:
            return
        status = run.reply.get("status")
        if status == "ok":
            state = "complete"
        elif status == "error":
            # What waits with `await` is told of an interrupt by a CancelledError.
            ends = ("KeyboardInterrupt", "CancelledError")
            stopped = run.interrupted and run.reply.get("ename") in ends
            state = "interrupted" if stopped else "error"
        else:
            state = "not_run"
        self._end(run, state, "", count_of(run.reply))
        if state != "complete" and run.stop_on_error:
            self._drop_group(run.group, "an earlier cell of the same call ended with %s" % state)
        self._next()

    # -- runs ---------------------------------------------------------------------------------

    def _enqueue(self, runs: List[Dict[str, str]], stop_on_error: bool) -> List[Dict[str, Any]]:
        for item in runs:  # all of them before the first begins
            of_type(str, item["run"])
            of_type(str, item["code"])
        new = [r for r in runs if r["run"] not in self.runs]
        if new and self.kernel_state in ("dead", "failed"):
            raise Refused("kernel_" + self.kernel_state, self.how)
        group = runs[0]["run"] if runs else ""
        for item in new:
            if item["run"] in self.runs:
                continue  # named twice in this request
            run = Run(item["run"], "cell", item["code"], group, stop_on_error)
            self.runs[run.id] = run
            self.queue.append(run)
        fault_point("host.queued")
        self._next()
        return [self._described(self.runs[r["run"]]) for r in runs]

    def _next(self) -> None:
        if self.active or not self.queue or self.kernel_state != "ready" or not self.kernel:
            return
        run = self.active = self.latest = self.queue.popleft()
        run.state, run.started = "running", time.time()
        fault_point("host.send")
        message = self.kernel.send(
            "shell",
            "execute_request",
            {
                "code": run.code,
                "silent": False,
                "store_history": True,
                "user_expressions": {},
                "allow_stdin": False,
                "stop_on_error": False,
            },
        )
        fault_point("host.sent")
        self.by_message[message] = run
        run.first = self._emit({"type": "start", "run": run.id, "t": run.started})

    def _end(self, run: Run, state: str, why: str, count: Optional[int] = None) -> None:
        if run.over:
            return
        was_queued = run.state == "queued"
        run.state = state
        if self.active is run:
            self.active = None
        number = self._emit(
            {
                "type": "end",
                "run": run.id,
                "state": state,
                "why": why,
                "count": count,
                "t": time.time(),
                "seconds": 0.0 if was_queued else time.time() - run.started,
                "output_bytes": run.output_bytes,
                "dropped_bytes": run.dropped_bytes,
            }
        )
        run.first = run.first or number
        run.code = ""
        fault_point("host.ended")

    def _drop_group(self, group: str, why: str) -> None:
        for run in [r for r in self.queue if r.group == group]:
            self.queue.remove(run)
            self._end(run, "not_run", why)

    def _interrupt(self, id: str, everything: bool) -> Dict[str, Any]:
        self._known(id)
        run = self.runs[id] if id else self.active
        if run and run.kind == "command":
            run.interrupted = True
            self.commands.interrupt(run.id)
            return {"interrupted": run.id, "waiting": len(self.queue)}
        if run in self.queue:
            self.queue.remove(run)
            self._end(run, "not_run", "it was interrupted before it began")
            return {"interrupted": run.id, "waiting": len(self.queue)}
        if everything:
            while self.queue:
                self._end(self.queue.popleft(), "not_run", "it was interrupted before it began")
        if run is None or run is not self.active or self.kernel is None:
            return {"interrupted": None, "waiting": len(self.queue)}
        run.interrupted = True
        self._drop_group(run.group, "an earlier cell of the same call was interrupted")
        self.kernel.interrupt()
        fault_point("host.interrupted")
        # A kernel that is interrupted just before it begins with a cell drops the request without
        # an answer. What is asked behind it is answered then, and tells.
        self.probes[self.kernel.send("shell", "kernel_info_request", {})] = run
        return {"interrupted": run.id, "waiting": len(self.queue)}

    def _stream(self, run: Run, name: str, text: str) -> None:
        text = escape_surrogates(text)
        at = 0
        while at < len(text):
            # Up to the cap to the byte (of ASCII), so that a small cap keeps what it promises.
            room = self.output_cap - run.output_bytes
            piece = text[at : at + (min(STREAM_PIECE, room) if room > 0 else STREAM_PIECE)]
            at += len(piece)
            size = len(piece) if piece.isascii() else len(piece.encode("utf-8"))
            self._output(run, {"type": "stream", "name": name, "text": piece}, size)

    def _output(self, run: Run, event: Event, size: int) -> None:
        """Journal one output of a run, or count it once the run's cap is reached."""
        run.output_bytes += size
        if size and (run.dropped_bytes or run.output_bytes > self.output_cap):
            first = run.dropped_bytes == 0
            run.dropped_bytes += size
            if first:
                self._emit({"type": "capped", "run": run.id, "cap": self.output_cap})
            return
        if run.over:
            event["late"] = True
        if event["type"] != "stream":
            event = escape_surrogates(event)
        self._emit({"run": run.id, **event})

    def _command_event(self, id: str, event: Event) -> None:
        run = self.runs[id]
        if event["type"] == "start":
            run.state, run.started = "running", time.time()
            run.first = self._emit({"run": id, "t": run.started, **event})
        elif event["type"] == "stream":
            self._stream(run, event["name"], event["text"])
        else:
            state = "complete" if event["code"] == 0 else "error"
            self._end(run, "interrupted" if run.interrupted else state, event["why"], event["code"])

    def _emit(self, event: Event) -> int:
        number = self.journal.append(event)
        self.grew.set()
        self.grew = asyncio.Event()
        return number

    def _known(self, id: str) -> None:
        if id and id not in self.runs:
            raise Refused("unknown_run", "no run %s in this sandbox" % id)

    def _described(self, run: Run) -> Dict[str, Any]:
        return {"run": run.id, "state": run.state, "first": run.first, "kind": run.kind}

    # -- clients ------------------------------------------------------------------------------

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        follower: Optional[asyncio.Task] = None
        pending: Set[asyncio.Task] = set()
        try:
            while True:
                line = await reader.readline()
                if not line.endswith(b"\n"):
                    return
                request = of_type(dict, json.loads(line))
                if of_type(str, request["op"]) == "subscribe":
                    start, running = of_type(int, request["from"]), []
                    if request.get("running"):  # whoever comes anew lacks the beginning of these
                        running = sorted(self.commands.running)
                        start = min([start, *(self.runs[id].first for id in running)])
                    if follower:
                        follower.cancel()
                    told = {"last": self.journal.last, "from": start, "running": running}
                    self._answer(writer, request, told)
                    follower = asyncio.ensure_future(self._follow(writer, start))
                    continue
                task = asyncio.ensure_future(self._serve_one(writer, request))
                pending.add(task)
                task.add_done_callback(pending.discard)
        except (ConnectionError, KeyError, RecursionError, TypeError, ValueError) as error:
            # Gone, or not speaking our language: nothing of ours depends on it.
            print("client dropped: %r" % error, file=sys.stderr)
        finally:
            if follower:
                follower.cancel()
            writer.close()

    async def _follow(self, writer: asyncio.StreamWriter, start: int) -> None:
        try:
            while True:
                grew = self.grew
                lines, start = self.journal.read(start)
                if lines:
                    fault_point("host.page")
                    writer.write(lines)
                    await writer.drain()
                else:
                    await grew.wait()
        except ConnectionError:
            return

    async def _serve_one(self, writer: asyncio.StreamWriter, request: Dict[str, Any]) -> None:
        if request["op"] not in ("ping", "status"):
            self.heard = time.monotonic()
        handler: Optional[Callable[..., Any]] = getattr(self, "op_" + request["op"], None)
        try:
            if handler is None:
                raise Refused("unknown_op", "no operation %r" % request["op"])
            answer = await handler(request)
        except Refused as error:
            self._send(
                writer, {"id": request["id"], "ok": False, "code": error.code, "error": str(error)}
            )
        except (OSError, ValueError) as error:
            self._send(
                writer, {"id": request["id"], "ok": False, "code": "failed", "error": str(error)}
            )
        except (KeyError, TypeError) as error:
            self._send(
                writer,
                {"id": request["id"], "ok": False, "code": "bad_request", "error": repr(error)},
            )
        else:
            self._answer(writer, request, answer)

    def _answer(self, writer: asyncio.StreamWriter, request: Event, answer: Event) -> None:
        fault_point("host.answer")
        self._send(writer, {"id": request["id"], "ok": True, **answer})

    def _send(self, writer: asyncio.StreamWriter, answer: Event) -> None:
        if not writer.is_closing():
            writer.write((json.dumps(answer) + "\n").encode("ascii"))

    # -- operations ---------------------------------------------------------------------------

    async def op_ping(self, request: Event) -> Event:
        return {}

    async def op_touch(self, request: Event) -> Event:
        return {}

    async def op_status(self, request: Event) -> Event:
        return {
            "pid": os.getpid(),
            "kernel": self.kernel_state,
            "kernel_pid": self.kernel.pid if self.kernel else 0,
            "generation": self.generation,
            "how": self.how,
            "stderr": self.stderr,
            "active": self.active.id if self.active else None,
            "queued": [run.id for run in self.queue],
            "commands": sorted(self.commands.running),
            "last": self.journal.last,
            "idle_for": 0.0 if self.busy else time.monotonic() - self.heard,
            **self._lease(),
            "limits": self.limits.described(),
        }

    async def op_installed(self, request: Event) -> Event:
        from .installed import installed  # reads the disk: once, and nothing waits for it

        return await asyncio.get_running_loop().run_in_executor(None, installed)

    async def op_run(self, request: Event) -> Event:
        return {"runs": self._enqueue(request["runs"], bool(request.get("stop_on_error", True)))}

    async def op_runs(self, request: Event) -> Event:
        """The state of the runs asked for; unknown ones are left out."""
        known = [self.runs[id] for id in request["runs"] if id in self.runs]
        return {"runs": [self._described(run) for run in known]}

    async def op_interrupt(self, request: Event) -> Event:
        return self._interrupt(request.get("run") or "", bool(request.get("everything")))

    async def op_restart(self, request: Event) -> Event:
        await self._restart()
        return {"kernel": self.kernel_state, "how": self.how, "stderr": self.stderr}

    async def op_command(self, request: Event) -> Event:
        id, command = of_type(str, request["run"]), of_type(str, request["command"])
        if id not in self.runs:
            self.runs[id] = Run(id, "command", "", id, False)
            try:
                await self.commands.start(id, command)
            except OSError as error:
                del self.runs[id]
                raise ValueError("the command could not be started: %s" % error) from error
        return {"runs": [self._described(self.runs[id])]}

    async def op_read_file(self, request: Event) -> Event:
        return self.folder.read(request["path"], request.get("offset", 0), request.get("limit"))

    async def op_write_file(self, request: Event) -> Event:
        return self.folder.write(request["path"], request["data"], bool(request.get("append")))

    async def op_list_files(self, request: Event) -> Event:
        return self.folder.list(request.get("path", "."))

    async def op_extend(self, request: Event) -> Event:
        """Move the lease's end: `end_at` (this machine's clock) or `lifetime` (seconds from now),
        and `idle_limit`. Nothing moves the end of the machine itself."""
        numbers = {name: request.get(name) for name in ("end_at", "lifetime", "idle_limit")}
        given = {name: float(value) for name, value in numbers.items() if value is not None}
        if not given or not all(0 < value < math.inf for value in given.values()):
            raise ValueError("extend needs end_at, lifetime or idle_limit, each above 0")
        end_at = given.get("end_at", 0.0) or time.time() + given.get("lifetime", math.inf)
        if end_at < time.time():
            raise ValueError("end_at lies in the past of this machine's clock")
        if self.closing.is_set():
            raise Refused("closing", "the sandbox is ending: %s" % self.config["why_closed"])
        if end_at < math.inf:
            self._end_at(end_at)
        self.idle_limit = given.get("idle_limit", self.idle_limit)
        return self._lease()

    async def op_stop(self, request: Event) -> Event:
        self.close(request.get("why", "stopped"))
        return {}
