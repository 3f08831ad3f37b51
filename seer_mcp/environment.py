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
    env: dict[str, str] = Field(default_factory=dict[str, str])
