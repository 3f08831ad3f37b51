"""Two people at one endpoint: neither can reach what is the other's, or learn that it is there."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from mcp import MCPError
from mcp.shared.exceptions import MCPDeprecationWarning
from mcp.types import ResourceUpdatedNotification

from seer_mcp.config import folder_of
from seer_mcp.http.tokens import SCOPES, TokenFile

from ..faults.ground import ERAS, Endpoint, Ground, http_server
from ..support import Lab, text_of, until

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def team(
    place: Ground, mode: str = "auto", hears: Any = None, **config: Any
) -> AsyncIterator[tuple[Endpoint, Lab, Lab]]:
    users = TokenFile(place.folder / "tokens.json")
    anna, _ = users.create("anna", SCOPES[:3], 1)
    ben, _ = users.create("ben", SCOPES[:3], 1)
    options = {"team": True, "team_backends": ("local",), **config}
    async with (
        http_server(place.config(**options), users=users) as server,
        server.lab(mode, anna, message_handler=hears and hears("anna")) as first,
        server.lab(mode, ben, message_handler=hears and hears("ben")) as second,
    ):
        yield server, first, second


# Arguments with which each tool that takes a handle would do something, to a cell and a run that are there.
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("create_cell", {"source": "1"}),
    ("run_cell", {"cells": "all"}),
    ("edit_cell", {"cell": "CELL", "source": "2"}),
    ("delete_cell", {"cell": "CELL"}),
    ("move_cell", {"cell": "CELL"}),
    ("read_outputs", {"cell": "CELL"}),
    ("read_outputs", {"run": "RUN"}),
    ("read_notebook", {}),
    ("load_model", {"model": "organism:base"}),
    ("run_command", {"command": "id"}),
    ("read_file", {"path": "x"}),
    ("write_file", {"path": "x", "content": "y"}),
    ("list_files", {}),
    ("stop_sandbox", {}),
    ("extend_sandbox", {"minutes": 5}),
    ("snapshot_sandbox", {}),
    ("restart_kernel", {}),
    ("interrupt", {}),
    ("interrupt", {"run": "RUN"}),
    ("submit_findings", {"claim": "c", "evidence": "CELL", "confidence": 0.5}),
]


@pytest.mark.parametrize("mode", ERAS)
async def test_t01_no_tool_reaches_a_handle_of_somebody_else(place: Ground, mode: str) -> None:
    async with team(place, mode) as (server, anna, ben):
        tools = {tool.name: tool.input_schema for tool in (await ben.client.list_tools()).tools}
        takes_handle = {name for name, schema in tools.items() if "sandbox" in schema["properties"]}
        assert takes_handle == {name for name, _ in CALLS}
        running = await anna.start(name="quiet-one")
        made = await anna.cell(running, "secret = 41 + 1; secret")
        run = made.meta["seer/run"]
        named = {"CELL": run["cell"], "RUN": run["id"]}
        ended = await anna.start(name="ended-one")
        await anna.ok("stop_sandbox", sandbox=ended)
        hidden = "google/gemma-2-9b-it"
        (await server.register.get(running, "anna")).redactor.hide([hidden])
        echoes = {"sandbox": running, "wait": hidden}
        assert hidden not in text_of(await anna.call("read_outputs", **echoes))
        assert hidden in text_of(
            await ben.call("read_outputs", **echoes)
        )  # nothing is hidden from him
        allowed = 0
        for handle in (running, ended):
            never = handle[:-6] + "zzzzzz"
            for name, arguments in CALLS:
                given = {key: named.get(str(value), value) for key, value in arguments.items()}
                assert given.keys() <= tools[name]["properties"].keys(), name
                assert {"sandbox", *given} >= set(tools[name]["required"]), name
                theirs = await ben.call(name, sandbox=handle, **given)
                nobodys = await ben.call(name, sandbox=never, **given)
                allowed += not theirs.is_error
                assert text_of(theirs).replace(handle, "X") == text_of(nobodys).replace(never, "X")
                assert theirs.meta == nobodys.meta, name
        assert allowed == 0
        listed = await ben.ok("list_sandboxes")
        assert "quiet" not in listed and "ended" not in listed.replace("0 ended", "")
        assert "another" not in listed and str(place.folder) not in listed
        assert text_of(await anna.cell(running, "secret")).endswith("42")  # and all is as it was


@pytest.mark.parametrize("mode", ERAS)
async def test_t01_no_resource_of_somebody_else_is_read_or_told_of(
    place: Ground, mode: str
) -> None:
    told: list[str] = []

    def hears(name: str) -> Any:
        async def hear(message: Any) -> None:
            if isinstance(message, ResourceUpdatedNotification):
                told.append(name)

        return hear

    async with team(place, mode, hears=hears) as (_, anna, ben):
        handle = await anna.start()
        uri = f"seer://sandboxes/{handle}/notebook"
        assert uri in {str(r.uri) for r in (await anna.client.list_resources()).resources}
        seen = {str(r.uri) for r in (await ben.client.list_resources()).resources}
        assert not {one for one in seen if one.startswith("seer://sandboxes/")}
        pages = (f"seer://sandboxes/{handle}/cells/abc", f"seer://sandboxes/{handle}/page")
        for other in (uri, *pages):
            with pytest.raises(MCPError) as theirs:
                await ben.client.read_resource(other)
            with pytest.raises(MCPError) as nobodys:
                await ben.client.read_resource(other.replace(handle, "never-zzzzzz"))
            assert str(theirs.value).replace(handle, "X") == str(nobodys.value).replace(
                "never-zzzzzz", "X"
            )
        if mode == "legacy":
            with pytest.warns(MCPDeprecationWarning):
                await ben.client.subscribe_resource(uri)
                await anna.client.subscribe_resource(uri)
            await anna.cell(handle, "1")
            await until(lambda: told)
            assert set(told) == {"anna"}


async def test_a_team_has_folders_of_its_own_and_nothing_of_the_operator(place: Ground) -> None:
    (place.project / "private.ipynb").write_text(
        '{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}'
    )
    async with team(place) as (_, anna, ben):
        handle = await anna.start(name="mine")
        path = await anna.notebook_path(handle)
        assert path.parent.parent == place.project / "outputs" / "anna"
        for lab in (anna, ben):
            assert "No notebook" in await lab.no("start_sandbox", notebook="private.ipynb")
            for wrong in (
                str(place.project / "private.ipynb"),
                "../../private.ipynb",
                "../carl/x",
            ):
                assert "outside" in await lab.no("start_sandbox", notebook=wrong)
        assert "outside" in await ben.no("start_sandbox", notebook=str(path))
        assert "No notebook" in (
            said := await ben.no("start_sandbox", notebook="mine/mine.ipynb")
        ), said
        assert "operator's keys" in await anna.no("start_sandbox", backend="ssh", host="gpu")
        assert "operator's choice" in await anna.no("start_sandbox", python="/usr/bin/python3")
        assert await ben.start(name="mine") != handle  # names are each one's own


async def test_local_sandboxes_are_not_a_teams_unless_the_operator_says_so(place: Ground) -> None:
    async with team(place, team_backends=("modal",)) as (_, anna, _ben):
        said = await anna.no("start_sandbox")
        assert "--team-backend local" in said


async def test_each_owner_has_a_limit_of_sandboxes(place: Ground) -> None:
    async with team(place, owner_sandboxes=1, max_sandboxes=2) as (_, anna, ben):
        await anna.start()
        assert "limit for one person" in await anna.no("start_sandbox")
        await ben.start()
        assert "this server's limit" in await ben.no("start_sandbox")


async def test_a_shared_notebook_can_be_read_by_the_team_until_it_is_not(place: Ground) -> None:
    async with team(place) as (server, anna, ben):
        handle = await anna.start()
        await anna.cell(handle, "6 * 7")
        uri = f"seer://sandboxes/{handle}/notebook"
        register = server.register
        session = await register.get(handle, "anna")
        register.share(session, True)
        assert "6 * 7" in str((await ben.client.read_resource(uri)).contents)
        assert (await ben.call("create_cell", sandbox=handle, source="1")).is_error  # read, no more
        register.share(session, False)
        with pytest.raises(MCPError):
            await ben.client.read_resource(uri)


def test_no_two_owners_share_a_folder() -> None:
    owners = [
        "anna",
        "Anna",
        "oidc:anna",
        "oidc-anna",
        "anna@example.org",
        "../anna",
        "con",
        "",
        "ä",
        "é",
        "a" * 200,
    ]
    folders = [folder_of(owner) for owner in owners]
    assert len(set(folders)) == len(owners)
    assert all(re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,60}", folder) for folder in folders)
