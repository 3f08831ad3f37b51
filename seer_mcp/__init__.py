"""An MCP server through which any MCP client investigates a language model."""

__version__ = "0.1.0"
