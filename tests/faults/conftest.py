from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from mcp import Client

from seer_mcp.server import build_server

from ..support import Lab
from .ground import Ground, ground


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Ground]:
    """A folder and a socket folder for servers of this test."""
    with ground(tmp_path) as made:
        yield made


@pytest.fixture
async def lab(place: Ground) -> AsyncIterator[Lab]:
    """A server in this process that leaves its sockets in `place`."""
    async with Client(build_server(place.config())) as client:
        yield Lab(client, place.folder)
