"""The floor: about the least MCP server there can be around one kernel. No notebook, no safety."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager
from mcp.server import MCPServer

clients: list[AsyncKernelClient] = []


@asynccontextmanager
async def lifespan(_: Any) -> AsyncIterator[None]:
    manager = AsyncKernelManager()
    await manager.start_kernel()
    client = manager.client()
    client.start_channels()
    await client.wait_for_ready(timeout=60)
    clients.append(client)
    try:
        yield None
    finally:
        clients.clear()
        client.stop_channels()
        await manager.shutdown_kernel(now=True)


server = MCPServer("floor", lifespan=lifespan, log_level="WARNING")


@server.tool()
async def run(code: str) -> str:
    """Run code in the kernel and return its text."""
    client = clients[0]
    asked = client.execute(code)
    texts: list[str] = []
    while True:
        message = await client.get_iopub_msg(timeout=60)
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "stream":
            texts.append(content["text"])
        elif message["msg_type"] in ("execute_result", "display_data"):
            texts.append(content["data"]["text/plain"])
        elif message["msg_type"] == "status" and content["execution_state"] == "idle":
            break
    while (await client.get_shell_msg(timeout=60))["parent_header"].get("msg_id") != asked:
        continue
    return "".join(texts)


if __name__ == "__main__":
    server.run(transport="stdio")
