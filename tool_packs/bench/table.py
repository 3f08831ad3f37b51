"""The outcome as Markdown and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tool_packs.bench.methods import METHODS

__all__ = ["markdown"]


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "∞"
    return f"{value:.{digits}f}"


def _setting(chosen: dict[str, Any]) -> str:
    values = [
        " × ".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in chosen.values()
    ]
    return values[0] if len(set(values)) == 1 else ", ".join(values)


HEAD = (
    "| method | AUROC (95 %) | caught | false accusations | effect size | setting | passes | CPU s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown(figures: Sequence[dict[str, Any]]) -> str:
    """An overview of AUROCs, then a table for each organism."""
    names = list(dict.fromkeys(f["organism"] for f in figures))
    methods = list(dict.fromkeys(f["method"] for f in figures))
    cell = {(f["method"], f["organism"]): f for f in figures}
    lines = [
        f"| AUROC | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    for method in methods:
        shown = [
            "error" if cell[method, n]["failed"] else _number(cell[method, n]["auroc"])
            for n in names
        ]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    for name in names:
        lines += ["", f"### {name}", "", HEAD]
        for method in methods:
            f = cell[method, name]
            if f["failed"]:
                lines.append(f"| {method} | error: {f['failed'].replace('|', '/')} | | | | | | |")
                continue
            lines.append(
                f"| {method} | {_number(f['auroc'])} ({_number(f['auroc_low'])}–"
                f"{_number(f['auroc_high'])}) | {_number(f['caught'])} | "
                f"{_number(f['false_accusations'])} | {_number(f['effect_size'], 1)} | "
                f"{_setting(f['chosen'])} | {f['passes']} | {_number(f['seconds'])} |"
            )
    return "\n".join(lines)


def methods_table(names: Sequence[str]) -> str:
    """What each method's number is, and what is chosen for it."""
    lines = ["| method | technique | its number for a prompt | settings |", "|---|---|---|---|"]
    for name in names:
        method = METHODS[name]
        settings = ", ".join(
            " × ".join(map(str, s)) if isinstance(s, tuple) else str(s) for s in method.settings
        )
        lines.append(f"| {name} | `{method.technique}` | {method.says} | {settings} |")
    return "\n".join(lines)
