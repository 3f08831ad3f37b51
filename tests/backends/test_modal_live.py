"""The contract of all backends on Modal itself: `uv run pytest -m live`. docs/modal.md says what it costs.

It needs a token (modal token new, or MODAL_TOKEN_ID and MODAL_TOKEN_SECRET). SEER_MCP_LIVE_GPU=T4
chooses a machine with that GPU; without it there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from .contract import CANARY, CHECKS, Bench, Check
from .modal_ground import LiveHarness, token_there

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.live,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not token_there(), reason="no Modal token on this machine"),
]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    os.environ[CANARY] = "of-the-server-alone"
    folder: Path = tmp_path_factory.mktemp("live")
    harness = LiveHarness(None, folder, os.environ.get("SEER_MCP_LIVE_GPU") or None)
    await harness.make_broken()
    made = Bench(harness)
    try:
        yield made
    finally:
        await made.close()
        for record in await harness.backend.sweep(""):  # whatever failed above
            await harness.backend.clear(record["handle"])
        del os.environ[CANARY]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)


async def test_the_estimate_is_of_the_workspaces_rates(bench: Bench) -> None:
    price = await bench.harness.backend.price(bench.harness.spec())
    assert price is not None and price.per_second > 0
    print(price.sentence())  # noqa: T201
