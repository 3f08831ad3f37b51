"""A scripted client of a server over HTTP (URL TOKEN_FILE BACKEND): runs a cell, and says where to watch it."""

import asyncio
import sys
from pathlib import Path

import httpx2
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

URL, TOKEN_FILE, BACKEND = sys.argv[1:]


async def main() -> None:
    headers = {"Authorization": f"Bearer {Path(TOKEN_FILE).read_text().strip()}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=60) as http,
        Client(streamable_http_client(URL, http_client=http)) as client,
    ):

        async def call(tool: str, **arguments: str) -> dict:
            result = await client.call_tool(tool, arguments)
            text = "\n".join(block.text for block in result.content if block.type == "text")
            if result.is_error:
                sys.exit(f"{tool}: {text}")
            print(f"> {tool}\n{text}")
            return result.meta

        sandbox = (await call("start_sandbox", name="hello", backend=BACKEND))["seer/sandbox"][
            "handle"
        ]
        await call("create_cell", sandbox=sandbox, source="print('the answer is', 6 * 7)")
        print(f"Watch it in a browser, signed in with the token: {URL.removesuffix('/mcp')}/")


asyncio.run(main())
