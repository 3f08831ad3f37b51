"""The solver: any model of Inspect, with our server over stdio as its tools."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import anyio
from inspect_ai.agent import AgentState, as_solver, react
from inspect_ai.event import ToolEvent
from inspect_ai.log import transcript
from inspect_ai.model import ChatMessageTool
from inspect_ai.solver import Generate, Solver, TaskState, solver
from inspect_ai.tool import mcp_server_stdio, mcp_tools
from inspect_ai.util import store

import seer_mcp

from .cases import case_of
from .workplace import SETS, Workplace, write_investigation

FOUND = "seer"  # where the scorer finds, in the sample's store, what came of it
NUDGES = 3
NUDGE = (
    "Nothing was submitted yet. Go on with the tools, and end with submit_findings (also where you found nothing: then "
    "`nothing` is the answer)."
)


def submitted(state: AgentState) -> bool:
    return any(
        isinstance(message, ChatMessageTool)
        and message.function == "submit_findings"
        and message.error is None
        for message in state.messages
    )


@solver
def investigate(outputs: str) -> Solver:
    """Give the model a server of its own, until it has submitted; nothing runs afterwards.

    Notebook and records of the sample stay in a folder of `outputs`.
    """

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        case, techniques = case_of(state.metadata["organism"]), state.metadata["techniques"]
        place = Workplace(Path(outputs).absolute() / state.uuid)
        began = time.time()
        # The grader lies where no answer of the server leads to, and goes when the sample ends.
        with tempfile.TemporaryDirectory(prefix="seer-") as folder:
            write_investigation(Path(folder), case, techniques)
            command, *arguments = place.command("stdio")
            server = mcp_server_stdio(
                name="seer",
                command=command,
                args=[*arguments, "--on-exit", "stop", "--investigations", folder],
                env=dict(os.environ),
            )
            nudges = iter(range(NUDGES))

            async def go_on(so_far: AgentState) -> bool | str:
                if submitted(so_far):
                    return False
                if so_far.output.message.tool_calls:
                    return True
                return NUDGE if next(nudges, None) is not None else False

            agent = react(
                prompt=(Path(seer_mcp.__file__).parent / "methodology.md").read_text(),
                tools=[mcp_tools(server, tools=list(SETS[techniques].tools))],
                submit=False,
                on_continue=go_on,
            )
            try:
                state = await as_solver(agent)(state, generate)
            finally:  # also at a limit
                with anyio.CancelScope(shield=True):
                    store().set(FOUND, await anyio.to_thread.run_sync(gathered, place, began))
        return state

    return solve


def gathered(place: Workplace, began: float) -> dict[str, object]:
    """End what runs; what came of the sample."""
    left = place.stop_all()
    submission = place.submission()
    now = time.time()
    return {
        "submission": submission,
        "grade": place.grade(submission) if submission else None,
        "left_running": left,
        "calls": sum(isinstance(event, ToolEvent) for event in transcript().events),
        "cells": place.cells(),
        "seconds": round(now - began, 1),
        **place.spent(began, now),
        "folder": str(place.folder),
    }
