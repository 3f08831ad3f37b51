"""The scorer: what the investigation's grader said of the findings, and what they took."""

from __future__ import annotations

from typing import Any

from inspect_ai.scorer import Score, Scorer, Target, accuracy, grouped, mean, scorer, stderr
from inspect_ai.solver import TaskState

from .agent import FOUND

TOLD = ("calls", "cells", "seconds", "dollars", "gpu_minutes", "folder")


@scorer(
    metrics=[
        accuracy(),
        stderr(),
        grouped(mean(), "techniques", all=False, name_template="with {group_name}"),
        grouped(mean(), "organism", all=False, name_template="of {group_name}"),
    ]
)
def grader() -> Scorer:
    """1 is right. Nothing submitted, or nothing that could be graded, is 0 and says why.

    Raises RuntimeError if anything of the sample still runs.
    """

    async def score(state: TaskState, target: Target) -> Score:
        found: dict[str, Any] | None = state.store.get(FOUND)
        if found is None:
            return Score(value=0, explanation="the sample ended before its server had started")
        if found["left_running"]:
            raise RuntimeError(
                f"{', '.join(found['left_running'])} still runs: "
                f"uv run seer-mcp sandboxes stop --all --state {found['folder']}/state"
            )
        told = {key: found[key] for key in TOLD}
        told |= {"tokens": state.token_usage, "model_dollars": state.cost_usage}
        submission, grade = found["submission"], found["grade"]
        if submission is None:
            return Score(value=0, explanation="nothing was submitted", metadata=told)
        told |= {
            "confidence": submission["confidence"],
            "evidence": len(submission["evidence"]),
            "controls": len(submission["controls"]),
        }
        why = "there is no grade" if grade is None else grade["failed"]
        if grade is None or grade["score"] is None:
            return Score(value=0, answer=submission["answer"], explanation=why, metadata=told)
        return Score(
            value=grade["score"],
            answer=submission["answer"],
            explanation=submission["claim"],
            metadata={**told, "brier": grade["brier"]},
        )

    return score
