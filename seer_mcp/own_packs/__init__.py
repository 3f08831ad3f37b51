"""Packs that users write: `seer-mcp packs new` begins one, `seer-mcp packs check` tells what it lacks."""

from .command import add_packs, begin_pack, check_packs

__all__ = ["add_packs", "begin_pack", "check_packs"]
