"""What a sandbox is made of, for every backend."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from ..errors import BadInput
from ..money import Budget
from ..secret import OURS, check_secret_name
from .gpus import GPUS, known_count, known_gpu, split_count
from .units import LEAST_MEBIBYTES, dollars, mebibytes, seconds

_DOMAIN = re.compile(
    r"(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)+[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
)
_URL = re.compile(r"https?://(?P<user>[^/@\s]*@)?[^/@\s]+/\S+|ssh://\S+|git@[\w.-]+:\S+")
_REQUIREMENT = re.compile(r"[A-Za-z0-9][^\n\r\0]*")
_DEBIAN = re.compile(r"[a-z0-9][a-z0-9+.-]+(=[A-Za-z0-9.+:~-]+)?")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# A value that is a key, whatever its variable is called.
_KEY = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_\w{16,}|"
    r"AKIA[A-Z0-9]{12,}|a[ks]-[A-Za-z0-9]{16,}|xox[bp]-\S{16,}|AIza[\w-]{30,}"
)
REASONABLE_SECONDS = 30 * 86400.0


class Strict(BaseModel):
    """Unknown keys are refused; a value is never changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def checked(check: Callable[[str], str]) -> AfterValidator:
    """Also "" passes: that is a field which was left out."""
    return AfterValidator(lambda text: check(text) if text else text)


def _word(text: str) -> str:
    """For what becomes an argument of another program."""
    if text.startswith("-") or re.search(r"[\s\0]", text):
        raise ValueError("it may not begin with '-' or hold spaces")
    return text


def _program(text: str) -> str:
    if text.startswith("-") or any(ord(c) < 32 for c in text):
        raise ValueError("write the path of a Python interpreter")
    return text


def _url(text: str) -> str:
    found = _URL.fullmatch(text)
    if not found:
        raise ValueError("write https://host/path, ssh://host/path or git@host:path")
    if found["user"]:
        raise ValueError("a URL must not hold a user or token; name a secret instead")
    return text


def inside_path(text: str) -> str:
    """A path within a folder of the sandbox."""
    path = PurePosixPath(text)
    bad = path.is_absolute() or ".." in path.parts or "\\" in text or text.startswith("~")
    if bad or not path.parts or any(ord(c) < 32 for c in text) or len(text) > 1000:
        raise ValueError("write a relative path that stays in the kernel's working folder")
    return str(path)


def _requirement(text: str) -> str:
    if not _REQUIREMENT.fullmatch(text):
        raise ValueError('write a requirement as for pip: "numpy", "torch==2.9.1", not an option')
    return text


def _debian(text: str) -> str:
    if not _DEBIAN.fullmatch(text):
        raise ValueError('write the name of a Debian package: "git", "ffmpeg"')
    return text


def _secret(text: str) -> str:
    try:
        check_secret_name(text)
    except BadInput as error:
        raise ValueError(str(error).partition(": ")[2]) from error
    return text


def _variable(text: str) -> str:
    if not _VARIABLE.fullmatch(text) or keyword.iskeyword(text):
        raise ValueError("write the name of a Python variable")
    return text


def _network(value: Any) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) or not isinstance(value, (list, tuple)):
        raise ValueError('write true, false, or a list of domains: ["huggingface.co", "*.hf.co"]')
    for domain in value:
        if not isinstance(domain, str) or not _DOMAIN.fullmatch(domain.lower()):
            raise ValueError(
                f"{domain!r} is no domain; write it alone, without https:// and path: "
                '"huggingface.co" or "*.hf.co"'
            )
    return tuple(domain.lower() for domain in value)


def _text_of(value: Any) -> Any:
    """TOML's numbers may stand for themselves in an environment; true and false may not."""
    if isinstance(value, bool):
        raise ValueError('write what the program expects: "1", "true" or "yes"')
    return str(value) if isinstance(value, (int, float)) else value


def _setting(text: str) -> str:
    if _KEY.fullmatch(text.strip()):
        raise ValueError(
            "it looks like a key; give its name in secrets, and its value to the server"
        )
    if "\0" in text:
        raise ValueError("it holds a NUL character")
    return text


def _setting_name(name: str) -> str:
    if not _VARIABLE.fullmatch(name):
        raise ValueError("write the name of an environment variable: letters, digits and '_'")
    if name.upper().startswith(OURS):
        raise ValueError(f"names that begin with {', '.join(OURS)} belong to this server")
    return name


def unit(kind: str, example: str) -> WithJsonSchema:
    """What the file's schema says of an amount."""
    return WithJsonSchema(
        {
            "anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}],
            "examples": [example],
            "$comment": kind,
        }
    )


Memory = Annotated[
    int, Field(ge=LEAST_MEBIBYTES), BeforeValidator(mebibytes), unit("GiB", "64 GiB")
]
Time = Annotated[
    float,
    Field(gt=0, le=REASONABLE_SECONDS),
    BeforeValidator(seconds),
    unit("minutes", "4 h"),
]
Dollars = Annotated[float, Field(gt=0, le=1e6), BeforeValidator(dollars), unit("dollars", "$5")]
Word = Annotated[str, checked(_word)]


class Repo(Strict):
    """A repository that is cloned into the image."""

    url: Annotated[str, AfterValidator(_url)]
    """Where it is: https://…, ssh://… or git@host:path."""
    ref: Word = "HEAD"
    """A tag, branch or commit."""
    install: bool = Field(default=False, strict=True)
    """Whether it is installed as a Python package."""
    path: Annotated[str, checked(inside_path)] = ""
    """Where it lies, relative to the kernel's working folder; by default its own name."""


class ModelSpec(Strict):
    """A model that is there when the kernel starts."""

    name: str = Field(min_length=1, max_length=500)
    """A hub id, a folder, or an organism (organism:base)."""
    revision: Word = ""
    """A branch, tag or commit on the hub."""
    adapter: str = ""
    """A PEFT adapter on top, by hub id or folder."""
    adapter_revision: Word = ""
    """The adapter's branch, tag or commit."""
    base: str = ""
    """The adapter's base model, if it is another than `name`."""
    dtype: Literal["", "float32", "bfloat16", "float16", "int8", "int4"] = ""
    """How weights are held; by default as they are stored."""
    variable: Annotated[str, AfterValidator(_variable)] = "m"
    """The variable that load_model makes of it."""
    hidden: bool = Field(default=False, strict=True)
    """Whether the investigator must not learn which model it is: docs/blind.md. Then the network is shut."""


class SandboxSettings(Strict):
    """What [sandbox] of an investigation.toml can say. In code times are seconds and memory is MiB."""

    backend: str = "local"
    """Where it runs: local, modal or ssh."""
    python: Annotated[str, checked(_program)] | None = None
    """The interpreter of the kernel (local, ssh); it needs ipykernel and jupyter_client."""
    host: Word = ""
    """Where to log in (ssh): a name of ~/.ssh/config, or user@machine."""
    gpu: str | None = None
    """The type of GPU: "A100-80GB", or "H100:4" for four of them. Without it there is none."""
    gpu_count: int = Field(default=1, ge=1, le=8, strict=True)
    """How many of them, in one machine."""
    cpu: float | None = Field(default=None, gt=0, le=256, strict=True)
    """Physical cores that are asked for and paid."""
    memory: Memory | None = None
    """What everything in it may use together: "64 GiB" (a number: GiB). Locally there is no limit without it."""
    processes: int | None = Field(default=None, ge=16, strict=True)
    """Processes and threads at once (local). The default is 512, or 16 for each core if that is more:
    libraries start threads by the core."""
    idle_limit: Time | None = None
    """Time without use after which it ends itself: "30 min" (a number: minutes)."""
    lifetime: Time | None = None
    """Time after which it ends whatever happens: "4 h" (a number: minutes)."""
    budget: Dollars | None = None
    """Dollars after which it ends: 5 or "$5"."""
    gpu_minutes: float | None = Field(default=None, gt=0, le=1e7, strict=True)
    """GPU-minutes after which it ends: the budget in the other unit."""
    network: Annotated[bool | tuple[str, ...], BeforeValidator(_network)] = True
    """Whether code in it may reach the network, or the only domains that it may reach. A backend
    that cannot shut it out refuses."""
    python_packages: tuple[Annotated[str, AfterValidator(_requirement)], ...] = ()
    """Requirements, installed with uv into the kernel's interpreter."""
    system_packages: tuple[Annotated[str, AfterValidator(_debian)], ...] = ()
    """Debian packages."""
    repos: tuple[Repo, ...] = ()
    """Repositories to clone: [[sandbox.repos]]."""
    files: dict[Annotated[str, AfterValidator(inside_path)], str] = Field(
        default_factory=dict[str, str]
    )
    """Path in the sandbox, relative to the kernel's working folder = file or folder of the investigation."""
    env: dict[
        Annotated[str, AfterValidator(_setting_name)],
        Annotated[
            str,
            BeforeValidator(_text_of),
            AfterValidator(_setting),
            WithJsonSchema({"type": ["string", "number"]}),
        ],
    ] = Field(default_factory=dict[str, str])
    """Variables with their values; for what is secret there is `secrets`."""
    secrets: tuple[Annotated[str, AfterValidator(_secret)], ...] = ()
    """Names of secrets. Their values come from the server's environment, a .env file or the cloud's own
    store, and are in no file, record or answer."""
    docker: bool = Field(default=False, strict=True)
    """Whether containers can be run inside (modal, experimental there)."""
    snapshot: Word = ""
    """The id of a snapshot to start from."""

    @model_validator(mode="before")
    @classmethod
    def _count_of_gpus(cls, given: Any) -> Any:
        """gpu = "H100:4" says both."""
        if not isinstance(given, dict) or not isinstance(given.get("gpu"), str):
            return given
        name, count = split_count(given["gpu"])
        if count is None:
            return given
        if given.get("gpu_count", count) != count:
            raise ValueError(
                f"gpu = {given['gpu']!r} and gpu_count = {given['gpu_count']} differ; write one"
            )
        return {**given, "gpu": name, "gpu_count": count}

    @field_validator("gpu")
    @classmethod
    def _known(cls, gpu: str | None, info: ValidationInfo) -> str | None:
        """A machine of one's own (ssh) may have any GPU; what it has is told at the start."""
        if gpu is None or (info.data.get("backend") == "ssh" and gpu.strip()):
            return gpu
        return known_gpu(gpu)

    @field_validator("gpu_count")
    @classmethod
    def _fits(cls, count: int, info: ValidationInfo) -> int:
        gpu = info.data.get("gpu")
        return known_count(gpu, count) if gpu and gpu in GPUS else count

    @property
    def blocked(self) -> bool:
        """Whether the network is shut out altogether."""
        return self.network is False or self.network == ()

    def limit(self) -> Budget:
        """What it may cost, in either unit."""
        return Budget(self.budget, self.gpu_minutes)


class SandboxSpec(SandboxSettings):
    """The machine that an investigation asks for."""

    models: tuple[ModelSpec, ...] = ()
    """Models that are there when the kernel starts."""

    @field_validator("models")
    @classmethod
    def _own_variables(cls, models: tuple[ModelSpec, ...]) -> tuple[ModelSpec, ...]:
        names = [model.variable for model in models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two models have the variable {name!r}; give each its own")
        return models
