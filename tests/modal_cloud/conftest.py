"""One cloud for all tests of this folder, and a client of it in this process."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Iterator

import modal
import pytest

from .control import Controller
from .fixtures import RunningCloud, available, client_environment, running_cloud


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="package")  # the environment of other tests has no token in it
def running() -> Iterator[RunningCloud]:
    if not available():
        pytest.skip("sandboxes need root on Linux here, for namespaces and overlays")
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud


@pytest.fixture
def cloud(running: RunningCloud) -> Iterator[Controller]:
    """The control client; what a test planned is forgotten after it, and no defect may show."""
    yield running.control
    running.control.clear()
    assert running.control.errors() == []


@pytest.fixture
async def app(cloud: Controller) -> AsyncIterator[modal.App]:
    yield await modal.App.lookup.aio(f"app-{uuid.uuid4().hex[:8]}", create_if_missing=True)
