"""What a sandbox is made of, for every backend."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """Unknown keys are refused; a value is never changed after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Repo(Strict):
    """A repository that is cloned into the image."""

    url: str
    ref: str = "HEAD"
    """A tag, branch or commit."""
    install: bool = False
    """Whether it is installed as a Python package."""
    path: str = ""
    """Where it lies, relative to the kernel's working folder; by default its own name."""


class ModelSpec(Strict):
    """A model that is there when the kernel starts."""

    name: str
    """A hub id, a folder, or an organism (organism:base)."""
    revision: str = ""
    adapter: str = ""
    """A PEFT adapter on top, by hub id or folder."""
    adapter_revision: str = ""
    base: str = ""
    """The adapter's base model, if it is another than `name`."""
    dtype: Literal["", "float32", "bfloat16", "float16", "int8", "int4"] = ""
    variable: str = "m"
    """The variable that load_model makes of it."""
    hidden: bool = False
    """Whether the investigator must not learn which model it is."""


class SandboxSpec(Strict):
    """The machine that an investigation asks for."""

    backend: str = "local"
    python: str | None = None
    """The interpreter of the kernel (local, ssh); it needs ipykernel and jupyter_client."""
    host: str = ""
    """Where to log in (ssh): a name of ~/.ssh/config, or user@machine."""
    gpu: str | None = None
    """The type of GPU, as A100-80GB; None for a machine without one."""
    gpu_count: int = Field(default=1, ge=1, le=8)
    cpu: float | None = Field(default=None, gt=0, le=256)
    """Physical cores that are asked for and paid."""
    memory: int | None = Field(default=None, ge=64)
    """MiB that everything in the sandbox may use together, or None for no limit of our own."""
    processes: int | None = Field(default=None, ge=16)
    """Processes and threads at once (local). The default is 512, or 16 for each core if that is more:
    libraries start threads by the core."""
    idle_limit: float | None = Field(default=None, gt=0)
    """Seconds without use after which the sandbox ends itself."""
    lifetime: float | None = Field(default=None, gt=0)
    """Seconds after which the sandbox ends whatever happens."""
    budget: float | None = Field(default=None, gt=0)
    """Dollars after which it ends."""
    network: bool | tuple[str, ...] = True
    """Whether code in the sandbox may reach the network, or the only domains that it may reach. A backend
    that cannot shut it out refuses."""
    python_packages: tuple[str, ...] = ()
    """Requirements, installed with uv into the kernel's interpreter."""
    system_packages: tuple[str, ...] = ()
    """Debian packages."""
    repos: tuple[Repo, ...] = ()
    files: dict[str, str] = Field(default_factory=dict[str, str])
    """Path in the sandbox, relative to the kernel's working folder -> file or folder on this side."""
    env: dict[str, str] = Field(default_factory=dict[str, str])
    """Variables with their values; for what is secret there is `secrets`."""
    secrets: tuple[str, ...] = ()
    """Names of secrets. Their values come from the server's environment, a .env file or the cloud's own
    store, and are in no file, record or answer."""
    models: tuple[ModelSpec, ...] = ()
    docker: bool = False
    """Whether containers can be run inside (modal, experimental there)."""
    snapshot: str = ""
    """The id of a snapshot to start from."""

    @property
    def blocked(self) -> bool:
        """Whether the network is shut out altogether."""
        return self.network is False or self.network == ()
