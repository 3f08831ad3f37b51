"""Settings and fixtures for every test: no hub, few threads, real servers, real kernels."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Hundreds of servers and kernels start here: each would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .support import Lab, open_lab


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    """A server in this process and a client connected to it; its sandboxes end with the test."""
    async with open_lab(tmp_path) as opened:
        yield opened
