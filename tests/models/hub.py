"""A small hub on loopback: the part of huggingface.co's HTTP API that fetching a model takes.

Two servers, as there: the hub itself, and the store of large files that it redirects to (another
origin, which must never see a token). Answers, headers and error codes are written from the client's
source and the hub's public behaviour. What it cannot show: TLS, xet, real throughput, and how often
the real hub refuses.

Faults are planned per path: hub.fault(pattern, cut=1000, times=2). A ledger of requests tells how
many bytes of each file were really sent.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".model")
PIECE = 16 * 1024


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    """Commits of a repository, and what its branches and tags point to."""

    name: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    claims: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing gives for files, instead of the true ones."""

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        digest = hashlib.sha1(self.name.encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + hashlib.sha1(content).digest())
        self.commits[digest.hexdigest()] = dict(files)
        self.refs[ref] = digest.hexdigest()
        return digest.hexdigest()


@dataclass
class Request:
    server: str
    method: str
    path: str
    start: int
    """Where the requested range begins."""
    token: str
    status: int = 0
    sent: int = 0
    """Bytes of the body that went out."""


@dataclass
class Fault:
    pattern: str
    times: int
    """How many matching requests it strikes; -1: all."""
    method: str = "GET"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: str = ""
    """What is answered instead, with `status`."""
    cut: int = -1
    """Bytes after which the connection is closed in the middle of the body."""
    hold: int = -1
    """Bytes after which nothing more comes until go() is called."""
    mute: bool = False
    """No answer at all until go() is called; the connection stays open."""
    wrong: bool = False
    """The content's first byte is another."""
    no_ranges: bool = False
    """Range is ignored: the whole file is sent, with 200."""
    going: threading.Event = field(default_factory=threading.Event)

    def go(self) -> None:
        self.going.set()


class Hub:
    """`accounts`: token -> names of gated or private repositories that it may read."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.accounts: dict[str, set[str]] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.large: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self.url = self.store_url = ""

    def add(self, name: str, files: dict[str, bytes], **how: Any) -> Repo:
        repo = self.repos.setdefault(name, Repo(name, **how))
        repo.commit(files)
        return repo

    def add_folder(self, name: str, folder: Path, **how: Any) -> Repo:
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        return self.add(name, {path: p.read_bytes() for path, p in files.items()}, **how)

    def fault(self, pattern: str, times: int = 1, **how: Any) -> Fault:
        self.faults.append(Fault(pattern, times, **how))
        return self.faults[-1]

    def struck(self, method: str, path: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.pattern, path):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, pattern: str) -> int:
        """Bytes of bodies that went out for paths that match."""
        return sum(r.sent for r in self.requests if re.search(pattern, r.path))

    def asked(self, pattern: str = "") -> list[Request]:
        return [r for r in self.requests if re.search(pattern, r.path)]

    def forget(self) -> None:
        """Begin a new ledger, without faults."""
        for fault in self.faults:
            fault.go()
        self.requests = []
        self.faults = []


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    role: str

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        ranged = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.request_ = Request(
            self.role, self.command, path, int(ranged[1]) if ranged else 0, token
        )
        with self.hub.lock:
            self.hub.requests.append(self.request_)
        self.fault = self.hub.struck(self.command, path)
        try:
            if self.fault and self.fault.status:
                self.send(self.fault.status, self.fault.body.encode(), self.fault.headers)
            elif self.fault and self.fault.mute:
                self.fault.going.wait()
                self.close_connection = True
            elif self.role == "store":
                self.content(self.hub.large[path.split("/")[-1]], {"ETag": '"store"'})
            elif found := re.fullmatch(r"/api/models/(.+)/revision/(.+)", path):
                self.info(found[1], found[2], "blobs" in parse_qs(parts.query))
            elif found := re.fullmatch(
                r"/api/resolve-cache/models/(.+?)/([0-9a-f]{40})/(.+)", path
            ):
                self.small(*found.groups())
            elif found := re.fullmatch(r"/api/models/(.+)/tree/([^/]+)/?", path):
                self.tree(found[1], found[2])
            elif found := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
                self.resolve(*found.groups())
            else:
                self.refuse(404, "", "Not found")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # What is there, and who may see it

    def visible(self, name: str, content: bool) -> Repo | None:
        """The repository, or None after a refusal. Of a gated one everybody sees the listing."""
        token, repo = self.request_.token, self.hub.repos.get(name)
        if token and token not in self.hub.accounts:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        may = name in self.hub.accounts.get(token, set())
        if repo is None or (repo.private and not may):
            if token:
                return self.refuse(404, "RepoNotFound", "Repository not found")
            return self.refuse(401, "", "Invalid username or password.")
        if content and repo.gated and not may:
            if token:
                return self.refuse(
                    403,
                    "GatedRepo",
                    f"Access to model {name} is restricted and you are not in the authorized list. "
                    f"Visit {self.hub.url}/{name} to ask for access.",
                )
            return self.refuse(
                401,
                "GatedRepo",
                f"Access to model {name} is restricted. You must have access to it and be "
                "authenticated to access it. Please log in.",
            )
        return repo

    def files_of(self, repo: Repo, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = repo.refs.get(revision, revision)
        if commit not in repo.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    # Answers

    def info(self, name: str, revision: str, blobs: bool) -> None:
        if not (repo := self.visible(name, False)) or not (found := self.files_of(repo, revision)):
            return
        commit, files = found
        siblings: list[dict[str, Any]] = []
        for path, content in files.items():
            size = repo.claims.get(path, len(content))
            sibling: dict[str, Any] = {"rfilename": path}
            if blobs:
                sibling |= {"blobId": git_id(content), "size": size}
            if blobs and path.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
                sibling["blobId"] = git_id(sha256.encode())  # of the pointer
            siblings.append(sibling)
        answer = {
            "_id": "66",
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def tree(self, name: str, revision: str) -> None:
        """Which snapshot_download asks for; the fetch program does not."""
        if not (repo := self.visible(name, False)) or not (found := self.files_of(repo, revision)):
            return
        entries: list[dict[str, Any]] = []
        for path, content in found[1].items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content)}
            if path.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            entries.append({**entry, "oid": git_id(content)})
        self.send(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (repo := self.visible(name, True)) or not (found := self.files_of(repo, revision)):
            return
        commit, files = found
        if path not in files:
            self.refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
            return
        content = files[path]
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(LARGE):
            headers["Location"] = f"/api/resolve-cache/models/{name}/{commit}/{path}"
            self.send(307, b"", headers)
            return
        sha256 = hashlib.sha256(content).hexdigest()
        self.hub.large[sha256] = content
        headers |= {
            "Location": f"{self.hub.store_url}/repos/{sha256}?X-Amz-Signature=signed",
            "X-Linked-Size": str(len(content)),
            "X-Linked-ETag": f'"{sha256}"',
        }
        self.send(302, b"", headers)

    def small(self, name: str, commit: str, path: str) -> None:
        if not (repo := self.visible(name, True)):
            return
        content = repo.commits[commit][path]
        self.content(content, {"X-Repo-Commit": commit, "ETag": f'"{git_id(content)}"'})

    def content(self, content: bytes, headers: dict[str, str]) -> None:
        start, total = self.request_.start, len(content)
        if self.fault and self.fault.wrong:
            content = bytes([content[0] ^ 1]) + content[1:]
        if start and not (self.fault and self.fault.no_ranges):
            if start >= total:
                self.send(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
            self.send(206, content[start:], headers)
        else:
            self.send(200, content, headers)

    def refuse(
        self, status: int, code: str, message: str, headers: dict[str, str] | None = None
    ) -> None:
        extra = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        body = json.dumps({"error": message}).encode()
        kind = {"Content-Type": "application/json"}
        self.send(status, body, {**kind, **extra, **(headers or {})})

    def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.request_.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        fault = self.fault
        if fault and fault.cut >= 0:
            body = body[: fault.cut]
            self.close_connection = True
        for at in range(0, len(body), PIECE):
            if fault and 0 <= fault.hold <= at:
                fault.going.wait()
            piece = body[at : at + PIECE]
            self.wfile.write(piece)
            self.wfile.flush()
            self.request_.sent += len(piece)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        return  # a client that was killed: that is what tests do to it


@contextlib.contextmanager
def open_hub() -> Iterator[Hub]:
    hub = Hub()
    servers = [
        Server(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": hub, "role": role}))
        for role in ("hub", "store")
    ]
    hub.url, hub.store_url = (f"http://127.0.0.1:{s.server_address[1]}" for s in servers)
    threads = [threading.Thread(target=s.serve_forever, args=(0.05,)) for s in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        hub.forget()
        for server in servers:
            server.shutdown()
            server.server_close()
        for thread in threads:
            thread.join()
