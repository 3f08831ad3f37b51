"""The contract of all backends on Modal itself: `uv run pytest -m live`. docs/modal.md says what it costs.

It needs a token (modal token new, or MODAL_TOKEN_ID and MODAL_TOKEN_SECRET). SEER_MCP_LIVE_GPU=T4
chooses a machine with that GPU; without it there is none.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import pytest

from seer_mcp.backends import Sandbox
from seer_mcp.backends.modal import ModalBackend

from .contract import CANARY, CHECKS, Bench, Check
from .modal_ground import ModalHarness, token_there

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.live,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not token_there(), reason="no Modal token on this machine"),
]
# What needs a hand on the machine itself, which nobody has there.
BY_FORCE = {
    "a_broken_interpreter_fails_with_its_log_and_leaves_nothing",
    "a_frozen_host_is_unreachable_in_bounded_time_and_comes_back",
    "what_was_left_running_ends_with_the_sandbox",
    "the_network_can_be_shut_out",
}


class LiveHarness(ModalHarness):
    patience = 300.0

    async def kill_host(self, sandbox: Sandbox) -> None:
        there: Any = sandbox._there  # type: ignore[attr-defined]
        process = await there.exec.aio("pkill", "-9", "-f", "kernel_host$")
        await process.wait.aio()

    def frozen(self, sandbox: Sandbox) -> AbstractAsyncContextManager[None]:
        raise NotImplementedError("it is among BY_FORCE")

    async def left(self, handle: str) -> list[str]:
        backend = self.backend
        assert isinstance(backend, ModalBackend)
        return [r["id"] for r in await backend.sweep("") if r["handle"] == handle]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    os.environ[CANARY] = "of-the-server-alone"
    folder: Path = tmp_path_factory.mktemp("live")
    harness = LiveHarness(None, folder, os.environ.get("SEER_MCP_LIVE_GPU") or None)
    made = Bench(harness)
    try:
        yield made
    finally:
        await made.close()
        for record in await harness.backend.sweep(""):  # whatever failed above
            await harness.backend.clear(record["handle"])
        del os.environ[CANARY]
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize(
    "check", [c for c in CHECKS if c.__name__ not in BY_FORCE], ids=lambda c: c.__name__
)
async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)


async def test_the_estimate_is_of_the_workspaces_rates(bench: Bench) -> None:
    price = await bench.harness.backend.price(bench.harness.spec())
    assert price is not None and price.per_second > 0
    print(price.sentence())  # noqa: T201
