"""Run a finished notebook again, from the top, and say cell by cell what came out alike."""

from .command import add_replay, run_replay

__all__ = ["add_replay", "run_replay"]
