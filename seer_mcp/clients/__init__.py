"""The programs that seer-mcp is added to: where each keeps its servers, and how one is written there."""

from .command import add_install, run_install

__all__ = ["add_install", "run_install"]
