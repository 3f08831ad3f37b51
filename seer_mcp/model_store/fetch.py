"""Fetch one model of the hub into one folder. Runs alone, wherever huggingface_hub is installed.

Reads JSON, its one argument or without one a line of stdin: name,
revision ("" for the main branch), folder, and if wanted token, endpoint, sync (true: `sync FOLDER`
before and after the manifest, for a volume that commits then), every (seconds between lines of
progress), tries and pause (of failures that may pass), and timeout (seconds that the hub has for
its listing). A token comes with it, or huggingface_hub finds its own; it is written nowhere.

Writes lines of JSON to stdout: {"bytes", "total", "rate", "left", "file"} about each second (with
"waiting": true while another process fetches the same), {"note"}, and at last {"done": manifest} or
{"failed": code, "error": sentence}. Ends with 0 after "done", else with 1.

    FOLDER/files/          whole, verified files: what a kernel sees, and nothing else
    FOLDER/parts/          what has come so far of the others, named by content
    FOLDER/plan.json       what a fetch is bringing, or was when it was cut off
    FOLDER/manifest.json   written last: where it is, all files were there and verified
    FOLDER.lock            held by the process that fetches

Whatever moment it is killed at, the next one goes on where it stopped. snapshot_download of recent
versions (2.4) begins a file anew then; so only the hub's transport is used here (http_get).

Python 3.9 and later; imports nothing of the server.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import fnmatch
import hashlib
import importlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from typing import Any

Entry = dict[str, Any]  # a file of a model: path, size, and sha256 or git (a blob's id)

NEVER = (
    ".git*",
    "*/.git*",
    "original/*",
    "onnx/*",
    "openvino/*",
    "coreml/*",
    "runs/*",
    "checkpoint-*/*",
    "global_step*/*",
    "*.pth",
    "*.ckpt",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data*",
    "*.h5",
    "*.msgpack",
    "*.ot",
    "*.tflite",
    "*.mlmodel",
    "training_args.bin",
    "optimizer.*",
    "scheduler.*",
    "rng_state*",
)
# The same weights again, where there are safetensors.
DUPLICATES = ("*.bin", "*.bin.index.json", "*.pt", "consolidated*")
SAFETENSORS = {"model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"}
WEIGHTS = (".safetensors", ".bin", ".pt")
INDEXES = (".safetensors.index.json", ".bin.index.json")
CONFIGS = {"config.json", "adapter_config.json"}
TOKENIZERS = {
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
}
WORKERS = 4
PIECE = 1 << 20
SPARE = 16 << 20  # bytes that the disk must have beyond the model
MORE_ROOM = (
    "Make room there (seer-mcp models list --backend modal shows what is kept, models remove deletes it) and start "
    "again: the fetch goes on where it stopped."
)
LARGEST = 50_000_000_000  # bytes of a file that the hub serves over plain HTTP
LONGEST_PAUSE = 60.0
TRANSIENT = {"cut", "hub_away", "hub_down", "rate_limited"}
# Classes of httpx and of requests, which huggingface_hub used before; found by name in an error's family.
AWAY = {
    "ChunkedEncodingError",
    "ConnectError",
    "ConnectionError",
    "NetworkError",
    "ProtocolError",
    "RemoteProtocolError",
    "Timeout",
    "TimeoutException",
    "TransportError",
}


class Failed(Exception):
    """Why the model is not there: a code for programs, a sentence for people."""

    def __init__(self, code: str, sentence: str, wait: float | None = None) -> None:
        super().__init__(sentence)
        self.code = code
        self.wait = wait  # seconds after which the hub wants to be asked again


class Lines:
    """stdout, for several threads. The token never gets through."""

    def __init__(self, token: str | None) -> None:
        self._token = token
        self._lock = threading.Lock()

    def write(self, **fields: Any) -> None:
        line = json.dumps(fields)
        if self._token and len(self._token) >= 8:
            line = line.replace(json.dumps(self._token)[1:-1], "***")
        with self._lock:
            try:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            except BrokenPipeError:  # who asked is gone; the next fetch goes on from here
                os._exit(1)


class Notes(logging.Handler):
    """What huggingface_hub warns about (it waits, it tries again) becomes a line of ours."""

    def __init__(self, lines: Lines) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.write(note=" ".join(record.getMessage().split())[:300])


# -- what the hub has, and what of it is wanted -------------------------------------------------


def listing(info: Any, name: str) -> list[Entry]:
    """The files of a revision, as the hub lists them with sizes and digests."""
    found: list[Entry] = []
    for sibling in info.siblings or []:
        path = sibling.rfilename
        if {"", ".", ".."} & set(path.split("/")) or "\\" in path or "\0" in path:
            raise Failed(
                "bad_listing",
                f"{name} names a file {path[:200]!a}, which would leave its folder. Nothing was fetched; do not "
                "use this repository.",
            )
        if sibling.lfs:
            entry = {"path": path, "size": sibling.lfs["size"], "sha256": sibling.lfs["sha256"]}
        else:
            entry = {"path": path, "size": sibling.size, "git": sibling.blob_id}
        if None in entry.values():
            raise Failed(
                "not_a_hub",
                f"the listing of {name} lacks sizes and digests, so nothing could be verified. If HF_ENDPOINT is "
                "set, let it point to a complete mirror.",
            )
        found.append(entry)
    return found


def wanted(files: Sequence[Entry]) -> list[Entry]:
    """The files that loading a model takes: safetensors rather than the same weights otherwise."""
    names = {entry["path"] for entry in files}
    skip = NEVER + (DUPLICATES if names & SAFETENSORS else ())
    return [e for e in files if not any(fnmatch.fnmatchcase(e["path"], p) for p in skip)]


def judge(name: str, files: Sequence[Entry], chosen: Sequence[Entry]) -> None:
    """Raise Failed where no model can come of these files, before anything large is fetched."""
    names = {entry["path"] for entry in chosen}
    if not names & CONFIGS:
        gguf = [e["path"] for e in files if e["path"].endswith(".gguf")]
        held = (
            f"only GGUF files, as {gguf[0]}"
            if gguf
            else "neither config.json nor adapter_config.json"
        )
        raise Failed(
            "not_a_model",
            f"{name} has {held}: transformers cannot load it. Name the repository that holds the model in safetensors.",
        )
    if not any(path.endswith(WEIGHTS) for path in names):
        raise Failed(
            "no_weights",
            f"{name} has a configuration and no weights that transformers loads (safetensors or pytorch_model.bin). "
            "Name the repository that holds them.",
        )
    large = [entry for entry in chosen if entry["size"] > LARGEST]
    if large:
        raise Failed(
            "too_large",
            f"{large[0]['path']} of {name} has {big(large[0]['size'])}; the hub serves files of more than "
            f"{big(LARGEST)} only over xet, which is not used here. Name a repository or revision with smaller shards.",
        )


def with_shards(name: str, files: Sequence[Entry], chosen: list[Entry], folder: str) -> list[Entry]:
    """`chosen`, and every shard that an index names. The indexes are in the folder already."""
    known = {entry["path"]: entry for entry in files}
    names = {entry["path"] for entry in chosen}
    for index in sorted(path for path in names if path.endswith(INDEXES)):
        content = read_json(os.path.join(folder, index)) or {}
        shards = {
            os.path.join(os.path.dirname(index), shard)
            for shard in content.get("weight_map", {}).values()
        }
        absent = sorted(shards - known.keys())
        if absent:
            raise Failed(
                "incomplete_at_hub",
                f"{name} is incomplete on the hub: {index} names {absent[0]}, which the repository does not hold "
                f"({len(absent)} of {len(shards)} shards are absent). Tell its owner, or take another revision.",
            )
        chosen = [*chosen, *(known[shard] for shard in sorted(shards - names))]
        names |= shards
    return chosen


# -- files --------------------------------------------------------------------------------------


def expected(entry: Entry) -> str:
    return entry.get("sha256") or entry["git"]


def digest_of(path: str, entry: Entry) -> str:
    """The digest of a file, of the kind that its entry has: sha256, or git's of a blob."""
    prefix = b"" if "sha256" in entry else b"blob %d\0" % os.path.getsize(path)
    digest = hashlib.new("sha256" if "sha256" in entry else "sha1", prefix)
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def size_of(path: str) -> int:
    """Bytes of a file; 0 where there is none."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def amiss(folder: str, entries: Sequence[Entry], deep: bool = False) -> list[tuple[Entry, str]]:
    """The entries whose files are not as they should be, with what is wrong. Content only if `deep`."""
    wrong: list[tuple[Entry, str]] = []
    for entry in entries:
        path = os.path.join(folder, "files", entry["path"])
        if not os.path.isfile(path):
            wrong.append((entry, "is missing"))
        elif (size := os.path.getsize(path)) != entry["size"]:
            wrong.append((entry, f"has {size} bytes instead of {entry['size']}"))
        elif deep and digest_of(path, entry) != expected(entry):
            wrong.append((entry, "has other content than the hub's"))
    return wrong


def part_of(folder: str, entry: Entry) -> str:
    name = hashlib.sha256(f"{entry['path']}\0{expected(entry)}".encode()).hexdigest()[:40]
    return os.path.join(folder, "parts", name)


def came(folder: str, entries: Sequence[Entry]) -> int:
    """Bytes of these files that are there, in whole files and in parts."""
    return sum(
        min(
            entry["size"],
            size_of(os.path.join(folder, "files", entry["path"]))
            or size_of(part_of(folder, entry)),
        )
        for entry in entries
    )


def read_json(path: str) -> dict[str, Any] | None:
    """A JSON object that was written as a whole, or None."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def planned(folder: str) -> list[Entry]:
    """The files that a fetch is bringing, or was when it was cut off."""
    return (read_json(os.path.join(folder, "plan.json")) or {}).get("files", [])


def write_json(path: str, value: dict[str, Any]) -> None:
    """Readers see the old file or the new one, whole."""
    descriptor, part = tempfile.mkstemp(dir=os.path.dirname(path), suffix=".part")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o644)
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


# -- failures as sentences ----------------------------------------------------------------------


def big(count: float) -> str:
    """Bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def disk_full(folder: str, need: int, volume: bool = False) -> Failed:
    """`volume`: the folder is one of a cloud, which has no other folder to offer."""
    room = f"{big(need + SPARE)} are needed, {big(shutil.disk_usage(folder).free)} are free"
    if volume:
        return Failed(
            "disk_full", f"the volume that it is fetched to is full ({room}). {MORE_ROOM}"
        )
    return Failed(
        "disk_full",
        f"the disk of {folder} is full: {room}. Free some (seer-mcp models list shows what is kept, models remove "
        "deletes it) or use another folder. The fetch then goes on where it stopped.",
    )


def retry_after(response: Any) -> float | None:
    """Seconds that the hub asks to wait, or None."""
    for part in (response.headers.get("ratelimit") or "").split(";"):
        key, _, value = part.strip().partition("=")
        if key == "t" and value.isdigit():
            return float(value) + 1
    value = (response.headers.get("retry-after") or "").strip()
    return float(value) if value.isdigit() else None


class Asked:
    """What was asked of which hub: the words for sentences about failures."""

    def __init__(
        self, name: str, revision: str, folder: str, endpoint: str, token: bool, volume: bool
    ) -> None:
        self.name = name
        self.volume = volume  # whether the folder is one of a cloud
        self.revision = revision
        self.folder = folder
        self.endpoint = endpoint
        self.token = token  # whether there is one

    def failure(self, error: BaseException) -> Failed | None:
        """The Failed of whatever the hub's client, its transport or the disk raised; None of a bug."""
        if isinstance(error, Failed):
            return error
        kinds = {kind.__name__ for kind in type(error).__mro__}
        reason = " ".join(str(error).split())[:300]
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return self._refusal(kinds, status, error, reason)
        if "OfflineModeIsEnabled" in kinds:
            return Failed(
                "offline",
                f"{self.name} is not here, and the hub is switched off (HF_HUB_OFFLINE is set). Unset it and start "
                "again.",
            )
        if "HFValidationError" in kinds:
            return Failed(
                "bad_name",
                f"{self.name!a} is no name of a model on the hub: give owner/name, of letters, digits, '-', '_', '.'.",
            )
        if kinds & AWAY:
            return Failed(
                "hub_away",
                f"{self.endpoint} cannot be reached ({reason or type(error).__name__}). Check the network and the "
                "proxy. The fetch goes on where it stopped.",
            )
        if isinstance(error, ValueError):
            return Failed(
                "not_a_hub",
                f"{self.endpoint} does not answer as a hub does ({reason}). Check HF_ENDPOINT and the proxy.",
            )
        return self._disk(error, reason) if isinstance(error, OSError) else None

    def _disk(self, error: OSError, reason: str) -> Failed | None:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            entries = planned(self.folder)
            total = sum(entry["size"] for entry in entries)
            return disk_full(self.folder, total - came(self.folder, entries), self.volume)
        if error.errno is not None:
            return Failed(
                "folder",
                f"{error.filename or self.folder} cannot be written: {error.strerror}. Use another folder for models, "
                "or mend its permissions.",
            )
        if "onsistency check failed" in reason:
            return Failed(
                "cut",
                f"the connection to {self.endpoint} ended too early, again and again. Try again: the fetch goes on "
                "where it stopped.",
            )
        return None

    def _refusal(self, kinds: set[str], status: int, error: Any, reason: str) -> Failed:
        name, page = self.name, f"{self.endpoint}/{self.name}"
        if "RevisionNotFoundError" in kinds:
            return Failed(
                "no_revision",
                f"{name} has no revision {self.revision!a}. Its branches and tags are on {page}/tree/main; a commit is "
                "given in full.",
            )
        if "GatedRepoError" in kinds and not self.token:
            return Failed(
                "gated",
                f"{name} is gated, and HF_TOKEN is not set. Ask for access on {page}, make a token on "
                f"{self.endpoint}/settings/tokens, and set HF_TOKEN in the server's environment.",
            )
        if "GatedRepoError" in kinds:
            return Failed(
                "gated",
                f"{name} is gated, and the account of this HF_TOKEN has no access to it. Ask for access on {page}; a "
                "fine-grained token must allow public gated repositories.",
            )
        if status == 401 and "Invalid credentials" in reason:
            return Failed(
                "bad_token",
                f"{self.endpoint} does not accept this HF_TOKEN: it is mistyped, expired or revoked. Make one on "
                f"{self.endpoint}/settings/tokens and set HF_TOKEN in the server's environment.",
            )
        if "DisabledRepoError" in kinds:
            return Failed("disabled", f"{name} was disabled on the hub. Its page says why: {page}")
        if "EntryNotFoundError" in kinds:
            return Failed(
                "incomplete_at_hub",
                f"{name} lists a file that the hub does not serve ({reason}). Tell its owner, or take another "
                "revision.",
            )
        if "RepositoryNotFoundError" in kinds or status in (401, 404):
            hidden = (
                "this HF_TOKEN may not see it"
                if self.token
                else "it is private and HF_TOKEN is not set"
            )
            return Failed(
                "not_found",
                f"the hub has no model {name}, or {hidden}. Check the spelling (owner/name) on {self.endpoint}.",
            )
        if status == 416:
            return Failed(
                "corrupt",
                f"the hub serves a shorter file of {name} than it lists. Try again later, or tell its owner.",
            )
        if status == 429:
            wait = retry_after(error.response)
            when = f"in {wait:.0f} s" if wait else "in a few minutes"
            more = "" if self.token else " With HF_TOKEN set the limit is higher."
            return Failed(
                "rate_limited",
                f"the hub answers no more requests just now (429). Try again {when}: the fetch goes on where it "
                f"stopped.{more}",
                wait,
            )
        if status in (408, 500, 502, 503, 504):
            return Failed(
                "hub_down",
                f"the hub at {self.endpoint} is out of order ({status}). Look at https://status.huggingface.co and try "
                "again later: the fetch goes on where it stopped.",
            )
        return Failed(
            "refused", f"the hub refused {name} ({status}: {reason}). Check what HF_TOKEN may do."
        )


# -- fetching -----------------------------------------------------------------------------------


class Progress(threading.Thread):
    """Says every second how far the plan of a folder is, whoever works on it."""

    def __init__(self, lines: Lines, folder: str, every: float, **more: Any) -> None:
        super().__init__(daemon=True)
        self.file = ""
        self._lines = lines
        self._folder = folder
        self._every = every
        self._more = more
        self._seen: list[tuple[float, int]] = []  # (when, bytes) of the last ten
        self._over = threading.Event()

    def run(self) -> None:
        while not self._over.wait(self._every):
            self.say()

    def say(self) -> None:
        plan = planned(self._folder)
        total, there = sum(entry["size"] for entry in plan), came(self._folder, plan)
        self._seen = [*self._seen[-9:], (time.monotonic(), there)]
        (began, then), (now, _) = self._seen[0], self._seen[-1]
        rate = max(0.0, (there - then) / (now - began)) if now > began else 0.0
        left = (total - there) / rate if rate else None
        self._lines.write(
            bytes=there, total=total, rate=rate, left=left, file=self.file, **self._more
        )

    def stop(self) -> None:
        self._over.set()
        self.join()


class Fetch:
    def __init__(self, config: dict[str, Any], hub: Any, lines: Lines) -> None:
        self.hub = hub
        self.lines = lines
        self.name: str = config["name"]
        self.revision: str = config.get("revision") or "main"
        self.folder: str = os.path.abspath(config["folder"])
        self.token: str | None = config.get("token") or None
        self.endpoint: str = (config.get("endpoint") or hub.constants.ENDPOINT).rstrip("/")
        self.sync = bool(config.get("sync"))
        self.every: float = config.get("every", 1.0)
        self.tries: int = config.get("tries", 5)
        self.pause: float = config.get("pause", 1.0)
        self.timeout: float = config.get("timeout", 30.0)
        known = bool(self.token or hub.get_token())
        self.asked = Asked(self.name, self.revision, self.folder, self.endpoint, known, self.sync)
        self.progress = Progress(lines, self.folder, self.every)

    def path(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def run(self) -> dict[str, Any]:
        """The manifest of the model, which is there now. Raises Failed, and what is a bug."""
        os.makedirs(os.path.dirname(self.folder), exist_ok=True)
        with self.alone():
            manifest = read_json(self.path("manifest.json"))
            if manifest and not amiss(self.folder, manifest["files"]):
                return manifest
            if manifest:  # files were lost: the same commit mends it
                self.revision = manifest["commit"]
                write_json(self.path("plan.json"), manifest)
                remove(self.path("manifest.json"))
            self.progress.start()
            manifest = self.fetch()
            self.progress.stop()
            return manifest

    @contextlib.contextmanager
    def alone(self) -> Generator[None]:
        """Within this no other process fetches into this folder; waits while one does."""
        watch = None
        with open(self.folder + ".lock", "ab") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if watch is None:
                        watch = Progress(self.lines, self.folder, self.every, waiting=True)
                        watch.start()
                    time.sleep(min(0.5, self.every))
            if watch is not None:
                watch.stop()
            yield

    def fetch(self) -> dict[str, Any]:
        began = time.time()
        before = {entry["path"]: entry for entry in planned(self.folder)}
        api = self.hub.HfApi(endpoint=self.endpoint, token=self.token)
        info = self.patiently(
            lambda: api.model_info(
                self.name, revision=self.revision, files_metadata=True, timeout=self.timeout
            )
        )
        files = listing(info, self.name)
        chosen = wanted(files)
        judge(self.name, files, chosen)
        os.makedirs(self.path("files"), exist_ok=True)
        os.makedirs(self.path("parts"), exist_ok=True)
        self.keep_only(chosen, before)
        plan = {
            "format": 1,
            "name": self.name,
            "revision": self.asked.revision,
            "commit": info.sha,
            "files": chosen,
        }
        write_json(self.path("plan.json"), plan)
        # Small files first: a closed gate or a missing shard shows before gigabytes have come.
        small = [e for e in chosen if e["path"].endswith(".json") and e["size"] < SPARE]
        self.need_room(chosen)
        self.bring(small, info.sha)
        plan["files"] = chosen = with_shards(self.name, files, chosen, self.path("files"))
        write_json(self.path("plan.json"), plan)
        self.need_room(chosen)
        self.bring(chosen, info.sha)
        if wrong := amiss(self.folder, chosen):
            entry, what = wrong[0]
            raise Failed("changed", f"{entry['path']} {what}: something changed it. Try again.")
        names = {entry["path"] for entry in chosen}
        manifest = {
            **plan,
            "bytes": sum(entry["size"] for entry in chosen),
            "fetched": time.time(),
            "seconds": time.time() - began,
            "tokenizer": bool(names & TOKENIZERS),
            "base": self.base(names),
        }
        self.commit()
        write_json(self.path("manifest.json"), manifest)
        remove(self.path("plan.json"))
        shutil.rmtree(self.path("parts"))
        self.commit()
        return manifest

    def patiently(self, work: Callable[[], Any], part: str = "") -> Any:
        """work(), again after a failure that may pass, until `tries` in a row brought `part` no byte."""
        tries, before = 0, size_of(part)
        while True:
            try:
                return work()
            except Exception as error:
                failed = self.asked.failure(error)
                if failed is None:
                    raise
                tries = 1 if size_of(part) > before else tries + 1
                before = size_of(part)
                pause = failed.wait if failed.wait is not None else self.pause * 2 ** (tries - 1)
                if failed.code not in TRANSIENT or tries >= self.tries or pause > LONGEST_PAUSE:
                    raise failed from error
                self.lines.write(note=f"{failed} Trying again in {pause:.0f} s.")
                time.sleep(pause)

    def keep_only(self, chosen: Sequence[Entry], before: dict[str, Entry]) -> None:
        """Remove what another revision left: only files of the same content may stay."""
        same = {e["path"] for e in chosen if before.get(e["path"]) == e}
        for folder, _, names in os.walk(self.path("files")):
            for path in (os.path.join(folder, name) for name in names):
                if os.path.relpath(path, self.path("files")) not in same:
                    os.unlink(path)
        parts = {part_of(self.folder, entry) for entry in chosen}
        for path in (self.path("parts", name) for name in os.listdir(self.path("parts"))):
            if path not in parts:
                os.unlink(path)

    def need_room(self, entries: Sequence[Entry]) -> None:
        need = sum(entry["size"] for entry in entries) - came(self.folder, entries)
        if need > 0 and need + SPARE > shutil.disk_usage(self.folder).free:
            raise disk_full(self.folder, need, self.sync)

    def bring(self, entries: Sequence[Entry], commit: str) -> None:
        """Those of these files that are not there yet, several at once."""
        absent = [entry for entry, _ in amiss(self.folder, entries)]
        pool = concurrent.futures.ThreadPoolExecutor(WORKERS)
        # The largest first, so that none is begun last and alone.
        order = sorted(absent, key=lambda entry: -entry["size"])
        # The first failure leaves the pool running: main() ends the process, and parts are kept.
        for work in concurrent.futures.as_completed(
            pool.submit(self.bring_one, entry, commit) for entry in order
        ):
            work.result()
        pool.shutdown()

    def bring_one(self, entry: Entry, commit: str) -> None:
        path, part = entry["path"], part_of(self.folder, entry)
        self.progress.file = path
        for _ in range(2):  # a part that a crash of the machine damaged is fetched anew, once
            self.patiently(lambda: self.stream(entry, commit, part), part)
            if digest_of(part, entry) == expected(entry):
                break
            self.lines.write(note=f"{path} came with other content than the hub lists.")
            os.unlink(part)
        else:
            raise Failed(
                "corrupt",
                f"{path} of {self.name} came with other content than the hub lists, twice. Is there a proxy that "
                "changes what passes through it? Try again, or over another network.",
            )
        target = self.path("files", path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(part, target)

    def stream(self, entry: Entry, commit: str, part: str) -> None:
        """Append to `part` what it lacks."""
        url = self.hub.hf_hub_url(self.name, entry["path"], revision=commit, endpoint=self.endpoint)
        headers = dict(self.hub.utils.build_hf_headers(token=self.token))
        headers["Accept-Encoding"] = "identity"
        with open(part, "ab") as file:
            if file.tell() > entry["size"]:
                file.truncate(0)
            self.hub.file_download.http_get(
                url, file, resume_size=file.tell(), headers=headers, expected_size=entry["size"]
            )
            file.flush()
            os.fsync(file.fileno())

    def base(self, names: set[str]) -> str:
        """The model that an adapter goes on, as its configuration names it; "" for a whole model."""
        if "adapter_config.json" not in names or "config.json" in names:
            return ""
        config = read_json(self.path("files", "adapter_config.json")) or {}
        return config.get("base_model_name_or_path") or ""

    def commit(self) -> None:
        """Raises Failed where the volume does not take what was written to it."""
        if not self.sync:
            return
        done = subprocess.run(["sync", self.folder], stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode == 0:
            return
        reason = " ".join(done.stderr.split())[:300]
        if os.strerror(errno.ENOSPC) in reason or os.strerror(errno.EDQUOT) in reason:
            raise Failed(
                "disk_full", f"the volume that it is fetched to is full ({reason}). {MORE_ROOM}"
            )
        raise Failed(
            "folder",
            f"the volume that it is fetched to did not keep it ({reason or done.returncode}). Start again: the fetch "
            "goes on with what the volume has.",
        )


def load_hub() -> Any:
    """huggingface_hub. Raises Failed where it is not installed."""
    try:
        hub = importlib.import_module("huggingface_hub")
        for module in ("constants", "file_download", "utils"):
            importlib.import_module(f"huggingface_hub.{module}")
    except ImportError as error:
        raise Failed(
            "no_client",
            f"{sys.executable} cannot fetch models: {error}. Install it there (pip install huggingface_hub), or choose "
            "another interpreter with --python.",
        ) from error
    hub.utils.disable_progress_bars()
    hub.constants.DOWNLOAD_CHUNK_SIZE = PIECE  # what a kill loses of each file; 10 MiB by default
    return hub


def main() -> None:
    config = json.loads(sys.argv[1] if len(sys.argv) > 1 else sys.stdin.readline())
    lines = Lines(config.get("token"))
    try:
        hub = load_hub()
        lines = Lines(config.get("token") or hub.get_token())
        logging.getLogger("huggingface_hub").handlers[:] = [Notes(lines)]
        fetch = Fetch(config, hub, lines)
        try:
            manifest = fetch.run()
        except Exception as error:
            failed = fetch.asked.failure(error)
            if failed is None:
                raise
            raise failed from error
        lines.write(done=manifest)
    except Failed as failed:
        lines.write(failed=failed.code, error=str(failed))
        os._exit(1)  # other files may still be coming; what came of them is kept
    except Exception:  # noqa: BLE001 (a bug: who started us shows the end of stderr)
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
