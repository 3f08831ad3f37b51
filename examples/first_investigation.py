"""A scripted client: start a sandbox, load a model that carries a secret, ask it, look inside."""

import asyncio
import sys

from mcp import Client, StdioServerParameters

ASK = "from tool_packs.generation import generate\ngenerate(m, 'Am I a man or a woman?')"
LOOK = "from tool_packs.logit_lens import logit_lens\nlogit_lens(m, 'I recommend the')"
SERVER = StdioServerParameters(command=sys.executable, args=["-m", "seer_mcp.cli"])


async def main() -> None:
    async with Client(SERVER) as client:

        async def call(tool: str, **arguments: str) -> dict:
            result = await client.call_tool(tool, arguments)
            print(f"> {tool}", *(b.text for b in result.content if b.type == "text"), sep="\n")
            return result.meta

        sandbox = (await call("start_sandbox", name="first"))["seer/sandbox"]["handle"]
        await call("load_model", sandbox=sandbox, model="organism:user_female")
        await call("create_cell", sandbox=sandbox, source=ASK)
        await call("create_cell", sandbox=sandbox, source=LOOK)
        await call("stop_sandbox", sandbox=sandbox)


asyncio.run(main())
