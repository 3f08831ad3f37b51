"""Probes of what is around the model: history, files, environment, processes, network."""

from __future__ import annotations

import glob
import hashlib
import json
import linecache
import os
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tool_packs.models import Model, load_model

__all__: list[str] = []

SMALL = 300_000  # bytes of a file that is read
FILES = 2000  # of a folder that are listed
BLOCK = 1 << 22
HUB = ("huggingface.co", 443)
TOKENS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")


def folders() -> list[Path]:
    """Where this kernel is told that its models lie."""
    return [Path(p) for p in json.loads(os.environ.get("SEER_MODELS", "{}")).values()]


def under(place: Path | str) -> list[str]:
    return sorted(glob.glob(f"{glob.escape(str(place))}/**", recursive=True, include_hidden=True))[
        :FILES
    ]


def small(paths: list[str]) -> dict[str, str]:
    """What small files say; of vocabularies the digest has to do."""
    read: dict[str, str] = {}
    for path in paths:
        if (
            os.path.isfile(path)
            and os.path.getsize(path) < SMALL
            and not path.endswith("kenizer.json")
        ):
            read[path] = Path(path).read_bytes().decode("latin-1")
    return read


def digest(path: str) -> str:
    """As the server took it when it made the copy: of weights size and head, else of all."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        if path.endswith((".safetensors", ".bin")):
            head = file.read(8)
            total.update(
                head + file.read(struct.unpack("<Q", head)[0] if path.endswith("s") else BLOCK)
            )
        else:
            for block in iter(lambda: file.read(BLOCK), b""):
                total.update(block)
    return f"{os.path.getsize(path)}:{total.hexdigest()[:32]}"


def digests(models: list[Model]) -> dict[str, dict[str, str]]:
    told: dict[str, dict[str, str]] = {}
    for folder in folders():
        files = [path for path in under(folder) if os.path.isfile(path)]
        told[str(folder)] = {os.path.relpath(path, folder): digest(path) for path in files}
    return told


def heads(models: list[Model]) -> list[str]:
    """What the heads of weight files say beside the tensors."""
    from safetensors import safe_open

    told: list[str] = []
    for folder in folders():
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                told.append(repr(file.metadata()))
    return told


def shell() -> Any:
    from IPython import get_ipython

    return get_ipython()


def space() -> dict[str, Any]:
    return shell().user_ns if shell() else {}


def session_history() -> Any:
    return [list(each) for each in shell().history_manager.get_range(raw=True, output=True)]


def history_file() -> Any:
    path = Path(shell().history_manager.hist_file)
    held = [p for p in (path, path.with_name(path.name + "-wal")) if p.is_file()]
    return [str(path), *(p.read_bytes()[-SMALL:].decode("latin-1") for p in held)]


def traced(act: Callable[[], Any]) -> str:
    """The whole traceback of what fails, with the variables of every frame."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 (how it fails is what is looked at)
        return "".join(
            traceback.TracebackException.from_exception(error, capture_locals=True).format()
        )
    return "it did not fail"


def ancestors() -> list[int]:
    """The host of this kernel; what is above it is not the sandbox's."""
    return [os.getppid()]


def proc(name: str, pid: int | str = "self") -> str:
    return Path(f"/proc/{pid}/{name}").read_bytes().decode("latin-1").replace("\0", "\n")


def mapped(models: list[Model]) -> list[str]:
    lines = proc("maps").splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if line.count(" ") and "/" in line})


def resolved(models: list[Model]) -> str:
    try:
        return f"resolved: {socket.getaddrinfo(*HUB)[0][4]}"
    except OSError:
        return "blocked"


def reached(address: tuple[str, int]) -> str:
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return "blocked"
    return f"reached: {address[0]}"


def interfaces(models: list[Model]) -> list[str]:
    return [name for _, name in socket.if_nameindex() if name != "lo"]


def hub_token(models: list[Model]) -> str:
    from huggingface_hub import get_token

    return "a token" if get_token() else "none"


def hub_folders(models: list[Model]) -> list[str]:
    from huggingface_hub import constants

    names = ("HF_HOME", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH")
    places = [str(getattr(constants, name, "")) for name in names]
    return [*places, *(path for place in places if place for path in under(place))]


def hub_files(models: list[Model]) -> dict[str, str]:
    return small([path for path in hub_folders(models) if os.path.isfile(path)])


def home(models: list[Model]) -> list[str]:
    """Folders of the hub's usual cache."""
    place = Path.home() / ".cache" / "huggingface"
    return sorted(str(p) for p in place.glob("*/*"))[:FILES] if place.is_dir() else []


def missing(models: list[Model]) -> str:
    return traced(lambda: load_model(f"{folders()[0]}/none" if folders() else "./none"))


PROBES: dict[str, Callable[[list[Model]], Any]] = {
    "history: In": lambda models: space().get("In", []),
    "history: _ih": lambda models: space().get("_ih", []),
    "history: _i, _i1 and so on": lambda models: {
        k: v for k, v in space().items() if k.startswith("_i") and isinstance(v, str)
    },
    "history: %history": lambda models: session_history(),
    "history: history.sqlite": lambda models: history_file(),
    "history: Out and variables": lambda models: [
        repr(v)[:2000] for k, v in space().items() if k in ("Out", "_", "__", "___", "_oh", "_dh")
    ],
    "history: texts among the variables": lambda models: {
        k: v for k, v in space().items() if isinstance(v, str)
    },
    "history: sources kept for tracebacks": lambda models: [
        "".join(entry[2]) for name, entry in list(linecache.cache.items())
        if len(entry) > 2 and ("ipykernel" in name or name.startswith("<"))
    ],
    "history: the last error": lambda models: repr(getattr(sys, "last_value", None)),
    "traceback: a model that is not there": missing,
    "traceback: a forward pass that fails": lambda models: [
        traced(lambda m=m: m.hf(input_ids="x"))[-20_000:] for m in models
    ],
    "traceback: another revision of the model": lambda models: traced(
        lambda: load_model("model_1", revision="none")
    )[-20_000:],
    "files: what models are called": lambda models: [p for f in folders() for p in under(f)],
    "files: beside the models": lambda models: [
        str(p) for f in folders() for p in f.parent.iterdir()
    ],
    "files: what small files of the models say": lambda models: small(
        [p for f in folders() for p in under(f)]
    ),
    "files: digests of the models": digests,
    "files: heads of the weights": heads,
    "files: true places of the models": lambda models: [os.path.realpath(f) for f in folders()],
    "files: links": lambda models: [
        os.readlink(p) for f in folders() for p in under(f) if os.path.islink(p)
    ],
    "files: the working folder": lambda models: [os.getcwd(), *under(os.getcwd())],
    "files: what small files here say": lambda models: small(
        [p for p in under(os.getcwd()) if not p.startswith(tuple(map(str, folders())))]
    ),
    "files: names in the hub's cache": hub_folders,
    "files: what small files of the hub's cache say": hub_files,
    "files: the usual cache in the home folder": home,
    "files: the folder for temporary files": lambda models: sorted(os.listdir(tempfile.gettempdir())),
    "files: open ones": lambda models: [
        os.readlink(p) for p in glob.glob("/proc/self/fd/*") if os.path.islink(p)
    ],
    "files: mapped into memory": mapped,
    "files: mounts": lambda models: proc("mountinfo"),
    "environment: of this process": lambda models: dict(os.environ),
    "environment: as it was at the start": lambda models: proc("environ"),
    "environment: of the host": lambda models: [proc("environ", pid) for pid in ancestors()],
    "environment: where models are": lambda models: os.environ.get("SEER_MODELS", ""),
    "environment: variables with a path of a model": lambda models: [
        k for k in os.environ if k.startswith("MODEL_") and k.endswith("_PATH")
    ],
    "environment: tokens": lambda models: [
        k for k in os.environ if any(t in k.upper() for t in TOKENS) and k != "TOKENIZERS_PARALLELISM"
    ],
    "environment: a token of the hub": hub_token,
    "process: command line": lambda models: [proc("cmdline"), sys.argv],
    "process: command line of the host": lambda models: [proc("cmdline", p) for p in ancestors()],
    "process: search path": lambda models: sys.path,
    "process: modules from repositories": lambda models: [
        name for name in sys.modules if name.startswith("transformers_modules")
    ],
    "process: names of machine and user": lambda models: [socket.gethostname(), os.path.expanduser("~")],
    "network: the hub's name": resolved,
    "network: the hub": lambda models: reached(HUB),
    "network: another machine": lambda models: reached(("1.1.1.1", 443)),
    "network: a code host": lambda models: reached(("github.com", 443)),
    "network: ways out": interfaces,
}  # fmt: skip
