"""What the agent sees. Each module offers the tools of one noun; `strict` makes their arguments strict."""

from __future__ import annotations

from mcp.server.mcpserver.tools import Tool

from ..sessions import Register
from . import cells, files, findings, outputs, sandboxes, techniques
from .seam import strict

MODULES = (sandboxes, cells, outputs, techniques, files, findings)


def build_tools(register: Register) -> list[Tool]:
    """All tools, in the order in which an agent meets them."""
    return [strict(tool) for module in MODULES for tool in module.tools(register)]
