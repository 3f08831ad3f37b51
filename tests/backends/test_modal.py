"""The contract of all backends, for sandboxes at Modal: on a control plane of ours, both ways of its client."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from ..modal_cloud.control import Controller
from ..modal_cloud.fixtures import available, client_environment, running_cloud
from .contract import CANARY, CHECKS, OF_THE_HOST, Bench, Check
from .modal_ground import GPU, LiveHarness, ModalHarness

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not available(), reason="the control plane's machines need root"),
]

# With a GPU the client goes another way where a sandbox is made, found, listed and ended, and where
# its log is read; what goes over the line does not differ.
OTHER_WAY = {
    "a_started_kernel_answers",
    "a_broken_interpreter_fails_with_its_log_and_leaves_nothing",
    "a_cancelled_start_leaves_nothing",
    "the_kernel_has_the_environment_of_its_spec",
    "a_living_sandbox_is_found_by_its_record",
    "an_ended_sandbox_is_not_found",
    "the_death_of_a_host_is_seen_and_leaves_nothing",
    "the_journal_of_an_ended_sandbox_can_be_read",
    "a_sweep_is_for_one_owner",
    "clear_ends_a_handle_and_only_for_its_own_state_folder",
    "the_network_can_be_shut_out",
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def control() -> Iterator[Controller]:
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud.control
        assert cloud.control.errors() == []


@pytest.fixture(scope="module")
async def bench(
    request: pytest.FixtureRequest,
    control: Controller,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Bench]:
    os.environ[CANARY] = "of-the-server-alone"
    gpu = GPU if request.param == "gpu" else None
    harness = ModalHarness(control, tmp_path_factory.mktemp("contract"), gpu)
    await harness.make_broken()
    made = Bench(harness)
    try:
        yield made
    finally:
        await made.close()
        del os.environ[CANARY]
    assert harness.alive() == []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        cases = [
            pytest.param(
                way,
                check,
                id=f"{way}-{check.__name__}",
                marks=[pytest.mark.slow]
                if check.__name__ not in OTHER_WAY
                and (way == "gpu" or OF_THE_HOST.match(check.__name__))
                else [],
            )
            for way in ("cpu", "gpu")
            for check in CHECKS
        ]
        metafunc.parametrize(("bench", "check"), cases, indirect=["bench"], scope="module")


async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)


BY_HAND = {
    "a_broken_interpreter_fails_with_its_log_and_leaves_nothing",
    "a_frozen_host_is_unreachable_in_bounded_time_and_comes_back",
    "what_was_left_running_ends_with_the_sandbox",
    "the_death_of_a_host_is_seen_and_leaves_nothing",
    "the_network_can_be_shut_out",
}


@pytest.mark.parametrize(
    "harm", [c for c in CHECKS if c.__name__ in BY_HAND], ids=lambda c: c.__name__
)
async def test_the_live_lists_own_harm_is_done_here_too(
    control: Controller, tmp_path: Path, harm: Check
) -> None:
    """What test_modal_live.py does to machines that nobody has a hand on, where it can be tried."""
    harness = LiveHarness(control, tmp_path, None)
    others = {row["id"] for row in harness.alive()}
    with socket.create_server(("127.0.0.1", 0)) as server:
        harness.public = server.getsockname()
        if "broken" in harm.__name__:
            await harness.make_broken()
        made = Bench(harness)
        try:
            await harm(made)
        finally:
            await made.close()
    assert {row["id"] for row in harness.alive()} <= others


def test_the_short_list_names_checks() -> None:
    assert {check.__name__ for check in CHECKS} >= OTHER_WAY
