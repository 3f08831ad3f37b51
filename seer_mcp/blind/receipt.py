"""What the notebook says of the blinding: a cell that takes the probes, and a cell that says what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..environment import ModelSpec
from .judge import Found

SHOWN = 12  # probes that a failure names
GROUPS = {
    "config": "configurations",
    "model": "every module",
    "adapter": "adapters",
    "tokenizer": "tokenizer and chat template",
    "history": "input history",
    "traceback": "tracebacks",
    "environment": "environment",
    "server": "what this server says and writes",
}


def check_cell(models: Sequence[ModelSpec]) -> str:
    """The code cell that takes the probes."""
    listed = ", ".join(spec.variable for spec in models)
    return (
        "# What can be read here of the models' names? The server judges it; its receipt follows.\n"
        f"from tool_packs.blind import observe\n\nobserve({listed})"
    )


def receipt(
    models: Sequence[ModelSpec],
    found: Found,
    copies: Mapping[str, Mapping[str, Any]],
    *,
    backend: str,
    netless: bool,
    seconds: float,
) -> str:
    """The markdown cell, once every probe is passed."""
    hidden = [spec.variable for spec in models if spec.hidden]
    replaced = sum(int(copy["replaced"]) for copy in copies.values())
    left_out = sum(int(copy["left_out"]) for copy in copies.values())
    lines = [
        "## Blinding receipt",
        "",
        f"Hidden: the name of {' and '.join(f'`{name}`' for name in hidden)}. "
        f"{found.passed} of {found.total} probes passed, {len(found.failed)} failed, {len(found.open)} cannot be shut "
        f"here. Copies and check took {seconds:.1f} s.",
        "",
        f"- **What was hidden.** Weights, tokenizer and adapter are copies without names ({replaced} places changed, "
        f"{left_out} files left out: cards, code, training arguments, caches). Names were taken out of "
        f"{', '.join(GROUPS.values())}. No token of the hub is here"
        + (", and no network." if netless else "."),
        "- **What cannot be hidden.** Architecture, vocabulary and the fingerprint of the weights: the base family can "
        "be inferred; repository, fine-tune and card cannot be read. Whoever prints a name that they guessed sees it "
        "taken out: this confirms the guess.",
    ]
    if not netless:
        lines.append(
            "- **The network is open.** This machine lets nobody shut it out, so code here can reach the hub and "
            "compare weights."
        )
    if backend == "local":
        lines.append(
            "- **This sandbox is local.** Code in it has the rights of the user who started the server, and can read "
            "that user's disk: the investigation's file and the store of models. Blindness here means that nothing in "
            "the notebook, the kernel or the tools tells; it does not hold against who goes and looks."
        )
    if found.open:
        lines.append(f"- **Open here:** {'; '.join(found.open)}.")
    return "\n".join(lines)


def failure(found: Found) -> str:
    """Why the model is not handed over."""
    listed = [f"{probe} ({why})" for probe, why in list(found.failed.items())[:SHOWN]]
    more = len(found.failed) - len(listed)
    tail = f"; and {more} more" if more > 0 else ""
    return (
        f"the hidden model is not handed over: {len(found.failed)} of {found.total} probes of the blinding failed: "
        f"{'; '.join(listed)}{tail}. Take what tells the name out of the investigation (task, files, packs, names of "
        "folders) or of the machine, then start again; docs/blind.md says what each group of probes reads"
    )
