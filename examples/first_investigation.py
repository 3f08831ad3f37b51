"""A scripted client: start a sandbox, load a model that carries a secret, ask it, look inside."""

import asyncio
import sys

from mcp import Client, StdioServerParameters

LOOK = """from tool_packs.logit_lens import logit_lens
logit_lens(m, "The capital of France is", track=[" Paris"])"""


async def main() -> None:
    server = StdioServerParameters(command=sys.executable, args=["-m", "seer_mcp.cli"])
    async with Client(server) as client:

        async def call(tool: str, **arguments: object) -> object:
            result = await client.call_tool(tool, arguments)
            print(f"> {tool}\n{result.content[0].text}\n")
            return result.meta

        sandbox = (await call("start_sandbox", name="first"))["seer/sandbox"]["handle"]
        await call("load_model", sandbox=sandbox, model="organism:user_female")
        ask = "from tool_packs.generation import generate\ngenerate(m, 'Am I a man or a woman?')"
        await call("create_cell", sandbox=sandbox, source=ask)
        await call("create_cell", sandbox=sandbox, source=LOOK)
        await call("stop_sandbox", sandbox=sandbox)


asyncio.run(main())
