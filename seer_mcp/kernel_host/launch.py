"""The kernel's own entry point: `python launch.py CONNECTION_FILE`.

What differs from `python -m ipykernel_launcher`:
- the kernel dies with its host (Linux), so that a killed host leaves nothing behind;
- what it says waits for its host, and is never dropped;
- what was printed is kept even if the kernel is killed before it was sent (see last_words.py);
- what forked children print arrives in the order in which they printed it;
- what a thread prints belongs to the cell that started it, also while another cell runs;
- text that is not valid Unicode (lone surrogates) is sent escaped, where ipykernel would lose it;
- tqdm draws its bars as text: a widget's state is in no output, and the bar would stay at 0 %.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import importlib.machinery
import json
import os
import pickle
import signal
import socket
import sys
import threading
from typing import Any, Dict, FrozenSet, List, Tuple

written, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # not into the host's folder
import last_words  # noqa: E402

sys.dont_write_bytecode = written

PR_SET_PDEATHSIG = 1
DATAGRAM = 400  # characters; with their header below the 2 kB that some systems allow
PIECE = last_words.SIZE // 8  # characters; as UTF-8 they fit into half a slot
SENDING = "seer_sending"  # in the parent header of a stream message: the number of its sending


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ["JPY_PARENT_PID"]):  # it died before the line above
            sys.exit("the kernel host is gone")


def pack(obj: Any) -> bytes:
    """JSON in ASCII, which can hold every str (ipykernel's own packer loses lone surrogates)."""
    from jupyter_client.jsonutil import json_clean, json_default

    try:
        return json.dumps(obj, default=json_default, allow_nan=False).encode("ascii")
    except (TypeError, ValueError):  # not quite JSON: NaN, keys that are no text
        return json.dumps(json_clean(obj), default=json_default, allow_nan=False).encode("ascii")


def drop_nothing(app: Any) -> None:
    """Let messages wait for a host that is away for a moment.

    By default a publisher drops all above a thousand: lines, and the word that a cell is done.
    """
    init_iopub = getattr(app, "init_iopub", None)
    if init_iopub is None:
        return  # an ipykernel that we do not know

    def init_unlimited(context: Any) -> None:
        context.sndhwm = 0  # for the sockets that are made from now on
        init_iopub(context)

    app.init_iopub = init_unlimited


def keep_last_words(stream: Any, path: str) -> None:
    """Let a stream of ipykernel also write to memory that survives the process."""
    used = ("_buffers", "_buffer_lock", "_rotate_buffers", "_schedule_flush", "_is_master_process")
    if not all(hasattr(stream, name) for name in used):
        return  # an ipykernel that we do not know
    ring = last_words.Ring(path)
    write, rotate, lock = stream.write, stream._rotate_buffers, stream._buffer_lock

    is_master, schedule = stream._is_master_process, stream._schedule_flush
    # The header last seen, as the key of its buffer and its id: most writes come from one cell.
    seen: List[Any] = [None, frozenset(), ""]

    def buffered(parent: Dict[str, Any], text: str) -> bool:
        with lock:  # not held while the flush is scheduled, which may wait for the sending thread
            if parent is not seen[0]:
                seen[:] = [parent, frozenset(parent.items()), parent["msg_id"]]
            if kept := ring.add(seen[2], text):
                stream._buffers[seen[1]].write(text)
        return kept

    def write_and_keep(text: Any) -> Any:
        parent = stream.parent_header
        if not parent or not isinstance(text, str) or not is_master():
            return write(text)
        if len(text) <= PIECE and buffered(parent, text):
            schedule()
            return len(text)
        for at in range(0, len(text), PIECE):
            while not buffered(parent, text[at : at + PIECE]):
                stream.flush()  # makes room
            schedule()
        return len(text)

    def rotate_and_number() -> Dict[FrozenSet[Any], Any]:
        with lock:
            buffers = rotate()
            if not buffers or not stream._is_master_process():
                return buffers
            mark = (SENDING, ring.turn())
            return {
                (parent | {mark} if parent else parent): text for parent, text in buffers.items()
            }

    stream.write, stream._rotate_buffers = write_and_keep, rotate_and_number


def children_speak_in_order() -> None:
    """Take what forked children print by one line of datagrams.

    ipykernel makes a connection for each piece that a child writes, and these overtake each other.
    """
    streams: Dict[str, Any] = {"stdout": sys.stdout, "stderr": sys.stderr}
    used = ("_buffers", "_buffer_lock", "_schedule_flush", "_is_master_process", "parent_header")
    if not all(hasattr(stream, name) for stream in streams.values() for name in used):
        return  # an ipykernel that we do not know
    hearing, speaking = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def give_to_children(name: str, stream: Any) -> None:
        write, flush, is_master = stream.write, stream.flush, stream._is_master_process
        # By process and thread: a child sends whole lines, as every program does to a terminal.
        pending: Dict[Tuple[int, int], str] = {}

        def send(key: Tuple[int, int]) -> None:
            text, parent = pending.pop(key, ""), stream.parent_header
            for at in range(0, len(text), DATAGRAM):
                speaking.send(pickle.dumps((name, parent, text[at : at + DATAGRAM])))

        def write_in_order(text: Any) -> Any:
            if is_master() or not isinstance(text, str):
                return write(text)
            key = (os.getpid(), threading.get_ident())
            pending[key] = pending.get(key, "") + text
            if "\n" in text or len(pending[key]) > DATAGRAM:
                send(key)
            return len(text)

        def flush_in_order() -> None:
            if is_master():
                flush()
                return
            for key in [key for key in pending if key[0] == os.getpid()]:
                send(key)

        stream.write, stream.flush = write_in_order, flush_in_order

    def hear() -> None:
        while True:
            name, parent, text = pickle.loads(hearing.recv(65536))
            stream = streams[name]
            with stream._buffer_lock:
                stream._buffers[frozenset(parent.items())].write(text)
            stream._schedule_flush()

    for name, stream in streams.items():
        give_to_children(name, stream)
    threading.Thread(target=hear, name="what children say", daemon=True).start()


def threads_belong_to_their_cell(shell: Any) -> None:
    """Give each new thread the cell that started it as the parent of its output.

    ipykernel 7 gives a thread the cell that runs at the moment.
    """
    ends: List[Any] = [sys.stdout, sys.stderr, shell.display_pub, shell.displayhook]
    if not all(hasattr(end, "set_thread_parent") for end in ends):
        return  # an older ipykernel, which does this itself
    start, begin = threading.Thread.start, threading.Thread._bootstrap_inner  # type: ignore

    def start_in_cell(thread: Any) -> None:
        thread._seer_parent = shell.display_pub.parent_header
        start(thread)

    def begin_in_cell(thread: Any) -> None:
        parent = getattr(thread, "_seer_parent", None)
        if parent:
            for end in ends:
                end.set_thread_parent(parent)
        begin(thread)

    threading.Thread.start = start_in_cell  # type: ignore
    threading.Thread._bootstrap_inner = begin_in_cell  # type: ignore


class TextBars(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Answers an import of tqdm's widget bars with its text bars."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in ("tqdm.autonotebook", "tqdm.notebook"):
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def exec_module(self, module: Any) -> None:
        import tqdm.std

        module.tqdm = module.tqdm_notebook = tqdm.std.tqdm
        module.trange = module.tnrange = tqdm.std.trange


def main() -> None:
    die_with_parent()
    # A script's own folder heads sys.path; the kernel's user must not import from it.
    sys.path[0] = ""
    sys.meta_path.insert(0, TextBars())
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(connection_file=sys.argv[1])
    drop_nothing(app)
    app.initialize([])
    app.session.pack = pack
    for name in ("stdout", "stderr"):
        keep_last_words(getattr(sys, name), os.path.splitext(sys.argv[1])[0] + "." + name)
    children_speak_in_order()
    threads_belong_to_their_cell(app.shell)
    app.start()


if __name__ == "__main__":
    main()
