"""Finished notebooks for readers: as HTML, script or Markdown, and several of them as one report."""

from .command import add_export, run_export, run_report

__all__ = ["add_export", "run_export", "run_report"]
