"""Tools: end an investigation with what was found.

Annotations are evaluated here, since one of them names a function that is local (Resolve(judge)).
"""

import time
from typing import Annotated, Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.resolve import Resolve, Sample
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, CreateMessageResult, SamplingMessage, TextContent
from pydantic import Field

from .. import about, grading
from ..environment import read_investigation
from ..errors import BadInput, SeerError
from ..findings import Findings, read_record, record_path, shown, written
from ..render import Answer, digest
from ..sessions import Register, Session
from .answers import notes
from .seam import owner, tool

CLAIM_CHARACTERS = 4_000
OUTPUT_CHARACTERS = 6_000  # of each cell, that a grader gets
JUDGE_TOKENS = 1_000

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def ids(cells: str) -> list[str]:
    return cells.replace(",", " ").split()


def concluded(
    session: Session,
    claim: str,
    evidence: str,
    confidence: float,
    answer: str,
    controls: str,
    limits: str,
) -> Findings:
    """What was submitted, checked. Raises BadInput or NotFound."""
    for name, text in (("claim", claim), ("answer", answer), ("limits", limits)):
        if len(text) > CLAIM_CHARACTERS:
            said = f"{len(text):,} characters"
            raise BadInput(name, said, f"at most {CLAIM_CHARACTERS:,}; the notebook has the rest")
    if not claim.strip():
        raise BadInput("claim", claim, "say in a sentence or two what was found, with its numbers")
    if not ids(evidence):
        raise BadInput(
            "evidence",
            evidence,
            "name the cells whose output carries the claim (read_notebook lists them)",
        )
    notebook = session.notebook
    return Findings(
        claim,
        answer,
        confidence,
        shown(notebook, "evidence", ids(evidence)),
        shown(notebook, "controls", ids(controls)),
        limits,
    )


def grader_of(session: Session) -> grading.Grader | grading.GraderUnusable | None:
    """The grader of the investigation that a sandbox was started with; None if there is none."""
    if session.investigation is None:
        return None
    try:
        file = read_investigation(session.investigation).grader
        return None if file is None else grading.read_grader(file)
    except grading.GraderUnusable as unusable:
        return unusable
    except SeerError as error:  # its folder was changed or moved since
        return grading.GraderUnusable(str(error))


def for_grader(session: Session, findings: Findings) -> dict[str, Any]:
    """What a grader gets: the findings, and the cells named with their source and output."""

    def cells(of: tuple[Any, ...]) -> list[dict[str, str]]:
        found = [session.notebook.cell(each.cell) for each in of]
        return [
            {
                "cell": cell.id,
                "source": cell.source[:OUTPUT_CHARACTERS],
                "output": digest(cell.pieces(), OUTPUT_CHARACTERS, "(the rest is left out)"),
            }
            for cell in found
        ]

    return {
        "claim": findings.claim,
        "answer": findings.answer,
        "confidence": findings.confidence,
        "limits": findings.limits,
        "evidence": cells(findings.evidence),
        "controls": cells(findings.controls),
    }


def tools(register: Register) -> list[Tool]:
    async def judge(
        context: Context[Any, Any],
        sandbox: str,
        claim: str,
        evidence: str,
        confidence: float,
        answer: str,
        controls: str,
        limits: str,
    ) -> Sample | None:
        """Asks the client's model, in a conversation of its own, if the investigation wants a judge."""
        session = await register.get(sandbox, owner())
        found = concluded(session, claim, evidence, confidence, answer, controls, limits)
        grader = grader_of(session)
        able = context.client_capabilities
        if not isinstance(grader, grading.JudgeGrader) or able is None or able.sampling is None:
            return None
        text = grading.question(grader, for_grader(session, found))
        message = SamplingMessage(role="user", content=TextContent(type="text", text=text))
        return Sample([message], max_tokens=JUDGE_TOKENS, include_context="none", temperature=0.0)

    async def submit_findings(
        sandbox: str,
        claim: str,
        evidence: str,
        confidence: Share,
        judged: Annotated[CreateMessageResult | None, Resolve(judge)],
        answer: str = "",
        controls: str = "",
        limits: str = "",
    ) -> CallToolResult:
        """End an investigation: writes what was found as a cell and as a record beside the notebook. claim: what was
        found, with numbers; evidence: ids of the cells that show it; controls: of those where it must not show;
        confidence: 0 to 1; answer: the short form that the task asks for; limits: what was not tried, or would have
        shown it wrong."""
        session = await register.get(sandbox, owner())
        found = concluded(session, claim, evidence, confidence, answer, controls, limits)
        path = record_path(session.notebook.path)
        before = read_record(path)
        number = len(before) + 1
        grader = grader_of(session)
        session.note_cost()
        closing = about.closing(session.notebook.path, about.facts(session.notebook.metadata))
        cell = session.notebook.insert("markdown", found.markdown(number, closing))
        cell.note(findings=number)
        await session.save()
        submission = written(
            path,
            found,
            before,
            time=time.time(),
            sandbox=session.handle,
            investigation=session.investigation.parent.name if session.investigation else None,
            notebook=session.notebook.path.name,
            cell=cell.id,
        )
        was_graded = False
        if grader is not None:
            if isinstance(grader, grading.GraderUnusable):
                grade = grading.Grade("none", None, failed=str(grader))
            else:
                block = judged.content if judged is not None else None
                reply = block.text if isinstance(block, TextContent) else None
                grade = await grading.graded(grader, for_grader(session, found), reply)
            grading.keep(
                register.config.state_dir,
                session.handle,
                session.notebook.path,
                submission,
                grade,
            )
            was_graded = grade.score is not None
        said = {
            (
                True,
                True,
            ): " They were graded; the grade is kept for the operator (seer-mcp grades).",
            (
                True,
                False,
            ): " They could not be graded; the operator finds the reason with seer-mcp grades.",
        }.get((grader is not None, was_graded), "")
        more = (
            "" if found.controls else " No control was named: a claim without one convinces nobody."
        )
        return Answer(
            f"findings {number}: written as cell {cell.id} and into {path.name}.{said}{more}{notes(session)}",
            meta={
                "findings": {
                    "number": number,
                    "cell": cell.id,
                    "record": str(path),
                    "graded": was_graded,
                }
            },
        ).result()

    return [tool(submit_findings, "Submit findings")]
