"""A server on the same SDK with one tool that does nothing: what starting a server costs anybody."""

from mcp.server import MCPServer

server = MCPServer("trivial", log_level="WARNING")


@server.tool()
def nothing() -> str:
    """Do nothing."""
    return ""


if __name__ == "__main__":
    server.run(transport="stdio")
