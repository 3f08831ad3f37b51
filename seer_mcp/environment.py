"""What a sandbox is made of, for every backend."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class SandboxSpec(BaseModel):
    """The machine that an investigation asks for. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backend: str = "local"
    python: str | None = None
    """The interpreter of the kernel (local); it needs ipykernel and jupyter_client."""
    idle_limit: float | None = Field(default=None, gt=0)
    """Seconds without use after which the sandbox ends itself."""
    lifetime: float | None = Field(default=None, gt=0)
    """Seconds after which the sandbox ends whatever happens."""
    memory: int | None = Field(default=None, ge=64)
    """MiB that everything in the sandbox may use together, or None for no limit of our own."""
    processes: int | None = Field(default=None, ge=16)
    """Processes and threads at once (local). The default is 512, or 16 for each core if that is more:
    libraries start threads by the core."""
    network: bool = True
    """Whether code in the sandbox may reach the network. A backend that cannot shut it out refuses."""
    env: dict[str, str] = Field(default_factory=dict[str, str])
