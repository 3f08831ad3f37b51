"""The image of a sandbox, in layers: what changes seldom below, what a pack or a file changes on top.

Our code, the packs and the files are added when a machine starts, not when an image is built, so
that a change of theirs builds nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import importlib.metadata
import json
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import modal
import modal.exception
from modal._output.manager import DisabledOutputManager
from modal.output import OutputManager

from ...environment import SandboxSpec
from ...errors import BadInput, NotFound
from ...files import private_dir
from .. import Place, Progress, hosting

UV = "0.13.9"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
CODE = "/seer/code"  # the host and the packs
FILES = "/seer/files"  # copies of the spec's, to be copied into the working folder
WORK = "/work"
LOG_LINES = 40
REPORT_SECONDS = 0.5
BUILD_SECONDS = 3600.0  # for an image to be built: an API that says nothing must not be waited for
DOCKER = ("docker.io", "docker-buildx")


class BuildLog:
    """What a build said, and who is told."""

    def __init__(self, report: Progress) -> None:
        self._report = report
        self._lines: deque[str] = deque(maxlen=LOG_LINES)
        self._rest = ""
        self._told = 0.0

    def take(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).replace("\r", "\n").split("\n")
        kept = [line.strip() for line in lines if line.strip()]
        self._lines.extend(kept)
        if kept and time.monotonic() - self._told > REPORT_SECONDS:
            self._told = time.monotonic()
            self._report(f"building the image: {kept[-1][:160]}")

    def text(self) -> str:
        return "\n".join([*self._lines, *filter(None, [self._rest.strip()])])


# Which build the code that runs now belongs to: the client's tasks inherit it from who asked.
_BUILD: contextvars.ContextVar[BuildLog | None] = contextvars.ContextVar("build", default=None)


class BuildOutput(DisabledOutputManager):
    """Passes the log of a build to who waits for it; the client would print it, or drop it."""

    async def put_streaming_log(self, log: Any, prefix: str = "") -> None:
        if (build := _BUILD.get()) is not None and log.data:
            build.take(log.data)


class Images:
    """Makes images, and remembers those that this server has made: they need no question any more."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Any] = {}
        OutputManager._set(BuildOutput())  # pyright: ignore[reportPrivateUsage]

    async def ready(
        self, spec: SandboxSpec, place: Place, app: Any, report: Progress
    ) -> tuple[Any, str]:
        """The image with everything on it, and the name by which `forget` knows it.

        Raises modal's ImageBuildError with `log` set to what the build said last.
        """
        bundle = {**hosting.code_files(), **hosting.pack_files(place.packs)}
        files = sent_files(spec)
        code, sent = await asyncio.to_thread(
            lambda: (hosting.digest(bundle), hosting.digest(files))
        )
        name = json.dumps([_recipe(spec), code, sent], sort_keys=True)
        if name not in self._made:
            image = layers(spec)
            stage = await asyncio.to_thread(self._stage, code, bundle)
            image = image.add_local_dir(stage, CODE)
            if files:
                stage = await asyncio.to_thread(self._stage, sent, files)
                image = image.add_local_dir(stage, FILES)
            self._made[name] = await build(image, app, report)
        return self._made[name], name

    async def made(self, name: str, make: Callable[[], Any], app: Any) -> Any:
        """Another image, made once."""
        if name not in self._made:
            self._made[name] = await build(make(), app, lambda line: None)
        return self._made[name]

    def stage_text(self, name: str, text: str) -> Path:
        """A folder with one file, to be added to an image."""
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._made_once(digest, lambda part: (part / name).write_text(text))

    def forget(self, name: str) -> None:
        """Make it anew the next time: Modal did not know a part of it any more."""
        self._made.pop(name, None)

    def _stage(self, digest: str, files: dict[str, Path]) -> Path:
        """A folder with these files, of the place where they will lie."""

        def fill(part: Path) -> None:
            for name, path in files.items():
                target = part / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
                target.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)

        return self._made_once(digest, fill)

    def _made_once(self, digest: str, fill: Callable[[Path], object]) -> Path:
        """The folder of that content. It appears whole and is not touched again: others may be sending it."""
        folder = private_dir(self._folder) / digest
        if not folder.exists():
            part = self._folder / f".{digest}.{time.monotonic_ns()}.part"
            part.mkdir()
            fill(part)
            try:
                part.rename(folder)
            except OSError:  # another start was quicker
                shutil.rmtree(part)
        return folder


async def build(image: Any, app: Any, report: Progress) -> Any:
    """Build what Modal has not built before. Raises modal's errors; ImageBuildError with a `log`."""
    log = BuildLog(report)
    token = _BUILD.set(log)
    try:
        async with asyncio.timeout(BUILD_SECONDS):
            return await image.build.aio(app)
    except modal.exception.ImageBuildError as error:
        error.log = log.text()  # type: ignore[attr-defined]
        raise
    finally:
        _BUILD.reset(token)


def _recipe(spec: SandboxSpec) -> list[Any]:
    """All that the layers are made of."""
    repos = [repo.model_dump() for repo in spec.repos]
    return [
        spec.snapshot,
        PYTHON,
        base_packages(),
        spec.python_packages,
        spec.system_packages,
        repos,
        spec.docker,
    ]


def base_packages() -> list[str]:
    """What every kernel has: the requirements of our extra `local`, and psutil for the host."""
    wanted = importlib.metadata.requires("seer-mcp") or []
    local = [line.partition(";")[0].strip() for line in wanted if "extra == 'local'" in line]
    host = [line for line in wanted if line.startswith("psutil") and ";" not in line]
    return sorted([*local, *host])


def layers(spec: SandboxSpec) -> Any:
    """An image without our files, not yet built."""
    if spec.snapshot:
        return modal.Image.from_id(spec.snapshot)
    image = modal.Image.debian_slim(python_version=PYTHON)
    system = [*spec.system_packages, *(DOCKER if spec.docker else ())]
    # git for repos and for requirements that are repositories; procps, as notebooks expect ps.
    image = image.apt_install("git", "procps", *sorted(set(system)))
    image = image.uv_pip_install(*base_packages(), uv_version=UV)
    if spec.python_packages:
        image = image.uv_pip_install(*spec.python_packages, uv_version=UV)
    for repo in spec.repos:
        image = image.run_commands(*clone(repo))
    return image


def clone(repo: Any) -> list[str]:
    name = repo.path or PurePosixPath(repo.url.rstrip("/")).name.removesuffix(".git")
    folder = shlex.quote(f"{WORK}/{name}")
    url, ref = shlex.quote(repo.url), shlex.quote(repo.ref)
    commands = [
        f"git clone --quiet {url} {folder}",
        f"git -C {folder} checkout --quiet {ref}",
    ]
    if repo.install:
        commands.append(f"/.uv/uv pip install --python $(command -v python) -e {folder}")
    return commands


def sent_files(spec: SandboxSpec) -> dict[str, Path]:
    """Path in the working folder -> file of this side, for all files and folders of the spec."""
    found: dict[str, Path] = {}
    for name, source in spec.files.items():
        at = PurePosixPath(name)
        if at.is_absolute() or ".." in at.parts or not at.parts:
            raise BadInput("files", name, "the path in the sandbox leads out of the working folder")
        path = Path(source).expanduser()
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                if not hosting.IGNORED & set(file.relative_to(path).parts):
                    found[str(at / file.relative_to(path).as_posix())] = file
        elif path.is_file():
            found[str(at)] = path
        else:
            raise NotFound("file", str(source))
    return found
