"""Drive an installed server over stdio, with the client of its own environment: python drive.py base|local

Run outside the checkout, by the interpreter of the environment that the wheel was installed into.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client


def text_of(result) -> str:
    return "\n".join(block.text for block in result.content if block.type == "text")


async def drive(local: bool) -> None:
    folder = tempfile.mkdtemp()
    server = StdioServerParameters(
        command=str(Path(sys.prefix) / "bin" / "seer-mcp"),
        args=["--state", f"{folder}/state", "--outputs", f"{folder}/out", "--on-exit", "stop"],
        cwd=folder,
    )
    async with Client(stdio_client(server)) as client:
        tools = {tool.name for tool in (await client.list_tools()).tools}
        assert {"start_sandbox", "create_cell", "list_techniques"} <= tools, tools
        prompts = {prompt.name for prompt in (await client.list_prompts()).prompts}
        assert {"methodology", "hidden_preference", "sandbox_intro"} <= prompts, prompts
        techniques = text_of(await client.call_tool("list_techniques", {}))
        assert "logit_lens" in techniques, techniques
        started = await client.call_tool("start_sandbox", {"name": "wheel"})
        if not local:
            assert started.is_error and "seer-mcp[local]" in text_of(started), text_of(started)
            return
        assert not started.is_error, text_of(started)
        sandbox = started.meta["seer/sandbox"]["handle"]
        loaded = await client.call_tool(
            "load_model", {"sandbox": sandbox, "model": "organism:control"}
        )
        assert not loaded.is_error, text_of(loaded)
        cell = {"sandbox": sandbox, "source": "print(6 * 7, len(m.layers) > 0)"}
        ran = await client.call_tool("create_cell", cell)
        assert "42 True" in text_of(ran), text_of(ran)
        ended = await client.call_tool("stop_sandbox", {"sandbox": sandbox})
        assert not ended.is_error, text_of(ended)


asyncio.run(drive(sys.argv[1] == "local"))
print(f"{sys.argv[1]}: driven over stdio on Python {sys.version.split()[0]}")
