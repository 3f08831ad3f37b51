"""What a client sees before it calls anything, and the resources: stable, portable, small."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import anyio
import pytest
from mcp import Client, MCPError
from mcp.shared.exceptions import MCPDeprecationWarning
from mcp.types import ResourceUpdatedNotification, Tool

from seer_mcp.server import build_server

from ..support import Lab
from .ground import Ground, http_server

pytestmark = pytest.mark.anyio

READ_ONLY = {
    "list_sandboxes",
    "read_outputs",
    "read_notebook",
    "list_techniques",
    "read_file",
    "list_files",
}
DESTRUCTIVE = {
    "stop_sandbox",
    "restart_kernel",
    "interrupt",
    "edit_cell",
    "delete_cell",
    "run_command",
    "write_file",
}


async def listed(lab: Lab) -> list[Tool]:
    return (await lab.client.list_tools(cache_mode="bypass")).tools


def nested(schema: Any) -> list[str]:
    """Every key at any depth."""
    if isinstance(schema, dict):
        return [*schema, *(key for value in schema.values() for key in nested(value))]
    if isinstance(schema, list):
        return [key for value in schema for key in nested(value)]
    return []


async def test_every_schema_is_portable(lab: Lab) -> None:
    tools = await listed(lab)
    assert 5 < len(tools) <= 21
    for tool in tools:
        schema = tool.input_schema
        assert re.fullmatch(r"[a-z0-9_]{1,30}", tool.name)
        assert schema["type"] == "object"
        assert schema["additionalProperties"] is False
        assert not {"anyOf", "oneOf", "allOf", "not", "enum"} & schema.keys()
        assert not {"$ref", "$defs", "definitions"} & set(nested(schema)), tool.name
        assert set(schema.get("required", ())) <= schema["properties"].keys()
        for name, described in schema["properties"].items():
            assert re.fullmatch(r"[a-z_]{1,20}", name)
            assert described["type"] in ("string", "number", "integer", "boolean"), (
                tool.name,
                name,
            )
        assert tool.output_schema is None
        assert 20 < len(tool.description or "") < 700
        assert tool.title


async def test_every_tool_says_what_it_may_do(lab: Lab) -> None:
    for tool in await listed(lab):
        hints = tool.annotations
        assert hints is not None
        for value in (
            hints.read_only_hint,
            hints.destructive_hint,
            hints.idempotent_hint,
            hints.open_world_hint,
        ):
            assert isinstance(value, bool), tool.name
        assert hints.read_only_hint == (tool.name in READ_ONLY), tool.name
        assert hints.destructive_hint == (tool.name in DESTRUCTIVE), tool.name
        assert not (hints.read_only_hint and hints.destructive_hint)


async def test_the_listing_and_the_instructions_are_small(lab: Lab) -> None:
    listing = json.dumps(
        [t.model_dump(by_alias=True, exclude_none=True, mode="json") for t in await listed(lab)]
    )
    assert len(listing.encode()) <= 16 * 1024
    instructions = lab.client.instructions or ""
    assert 200 < len(instructions.encode()) < 2048
    for name in re.findall(r"\b([a-z]+_[a-z_]+)\(", instructions):
        assert name in {t.name for t in await listed(lab)}, name


async def test_the_listing_is_unchanged_by_calls(lab: Lab) -> None:
    before = [t.model_dump_json() for t in await listed(lab)]
    handle = await lab.start()
    await lab.cell(handle, "1")
    await lab.ok("list_techniques")
    await lab.no("no_such_tool")
    await lab.ok("stop_sandbox", sandbox=handle)
    assert [t.model_dump_json() for t in await listed(lab)] == before


async def test_notebooks_and_cells_are_resources(lab: Lab) -> None:
    handle = await lab.start()
    cell = (await lab.cell(handle, "print('seen')")).meta["seer/run"]["cell"]
    *fixed, resource = (await lab.client.list_resources()).resources
    assert {str(one.uri) for one in fixed} == {"seer://methodology", "ui://seer/notebook.html"}
    assert str(resource.uri) == f"seer://sandboxes/{handle}/notebook"
    (content,) = (await lab.client.read_resource(str(resource.uri), cache_mode="bypass")).contents
    book = json.loads(content.text)
    assert content.mime_type == "application/x-ipynb+json"
    assert book["cells"][0]["outputs"][0]["text"] == ["seen\n"]
    uri = f"seer://sandboxes/{handle}/cells/{cell}"
    (content,) = (await lab.client.read_resource(uri, cache_mode="bypass")).contents
    assert json.loads(content.text)["id"] == cell
    for wrong in (
        f"seer://sandboxes/{handle}x/notebook",
        f"seer://sandboxes/{handle}/cells/zzzz",
        "seer://x",
        "x:",
    ):
        with pytest.raises(MCPError) as caught:
            await lab.client.read_resource(wrong, cache_mode="bypass")
        assert caught.value.error.code in (-32002, -32602), caught.value.error
        assert "Traceback" not in caught.value.error.message


async def test_a_legacy_subscriber_hears_of_updates(place: Ground) -> None:
    heard: list[str] = []

    async def handler(message: Any) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            heard.append(str(message.params.uri))

    async def until_heard(uri: str) -> None:
        with anyio.fail_after(15):
            while uri not in heard:
                await anyio.sleep(0.02)

    async with Client(
        build_server(place.config()), mode="legacy", message_handler=handler
    ) as client:
        lab = Lab(client, place.folder)
        handle = await lab.start()
        uri = f"seer://sandboxes/{handle}/notebook"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MCPDeprecationWarning)
            await client.subscribe_resource(uri)
            await lab.cell(handle, "1")
            await until_heard(uri)
            await client.unsubscribe_resource(uri)
        await anyio.sleep(1.5)
        heard.clear()
        await lab.cell(handle, "2")
        await anyio.sleep(1.5)
        assert heard == []


async def test_a_listener_of_2026_hears_of_updates(place: Ground) -> None:
    async with http_server(place.config()) as endpoint, endpoint.lab() as lab:
        handle = await lab.start()
        uri = f"seer://sandboxes/{handle}/notebook"
        async with lab.client.listen(resource_subscriptions=[uri]) as events:
            await lab.cell(handle, "1")
            with anyio.fail_after(15):
                async for event in events:
                    assert event.uri == uri
                    break


async def test_a_lively_cell_makes_about_one_notice_a_second(place: Ground) -> None:
    heard: list[str] = []

    async def handler(message: Any) -> None:
        if isinstance(message, ResourceUpdatedNotification):
            heard.append(str(message.params.uri))

    async with Client(
        build_server(place.config()), mode="legacy", message_handler=handler
    ) as client:
        lab = Lab(client, place.folder)
        handle = await lab.start()
        uri = f"seer://sandboxes/{handle}/notebook"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MCPDeprecationWarning)
            await client.subscribe_resource(uri)
        await lab.cell(handle, "import time\nfor i in range(1000): print(i); time.sleep(0.003)")
    assert 2 <= heard.count(uri) <= 12
