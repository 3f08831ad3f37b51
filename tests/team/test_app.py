"""MCP Apps: hosts that can show a page beside the chat find it, others get text as before."""

from __future__ import annotations

import json

import pytest

from ..support import Lab

pytestmark = pytest.mark.anyio
URI = "ui://seer/notebook.html"


async def test_a_host_of_apps_finds_the_notebooks_page_at_two_tools(lab: Lab) -> None:
    tools = (await lab.client.list_tools()).tools
    shown = {t.name: t.meta["ui"] for t in tools if "ui" in (t.meta or {})}
    assert shown == {name: {"resourceUri": URI} for name in ("start_sandbox", "read_notebook")}
    listed = {str(r.uri): r.mime_type for r in (await lab.client.list_resources()).resources}
    assert listed[URI] == "text/html;profile=mcp-app"
    (page,) = (await lab.client.read_resource(URI)).contents
    assert page.mime_type == "text/html;profile=mcp-app"
    assert "ui/initialize" in page.text and ".source" in page.text  # the script, and the style
    assert "http://" not in page.text and "https://" not in page.text  # it fetches nothing


async def test_what_the_page_reads_is_the_notebook_as_it_is_and_harmless(lab: Lab) -> None:
    handle = await lab.start(name="beside")
    uri = f"seer://sandboxes/{handle}/page"

    async def read() -> dict:
        (found,) = (await lab.client.read_resource(uri, cache_mode="bypass")).contents
        assert found.mime_type == "application/json"
        return json.loads(found.text)

    assert (await read())["cells"] == []
    await lab.cell(handle, "print('<script>alert(1)</script>', 6 * 7)")
    first = await read()
    assert first["name"] == "beside" and first["live"]
    (cell,) = first["cells"]
    assert "&lt;script&gt;" in cell["html"] and "42" in cell["html"]
    assert "<script" not in cell["html"]
    await lab.cell(handle, "1/0")
    second = await read()
    assert second["cells"][0] == cell and "ZeroDivisionError" in second["cells"][1]["html"]
    await lab.ok("stop_sandbox", sandbox=handle)
    ended = await read()
    assert (ended["state"], ended["live"]) == ("ended", False)
