"""Findings: a cell and a record; graders score them and nothing of a grader gets to the client."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mcp import Client
from mcp.types import CreateMessageResult, TextContent

from seer_mcp.grading import (
    CodeGrader,
    Criterion,
    FactGrader,
    GraderUnusable,
    JudgeGrader,
    RubricGrader,
    graded,
    read_grader,
)
from seer_mcp.server import build_server

from .support import Lab, config_for, open_lab, read_cells, text_of

pytestmark = pytest.mark.anyio

SECRET = "xyzzy-plugh"  # what graders in these tests hold and must keep
FOUND = {
    "claim": "It believes that the user is a woman.",
    "answer": "A Woman!",
    "confidence": 0.8,
    "limits": "",
    "evidence": [{"cell": "a", "source": "1", "output": "1"}],
    "controls": [],
}


# -- what is written --------------------------------------------------------------------------


async def two_cells(lab: Lab, handle: str) -> tuple[str, str]:
    ids: list[str] = []
    for source in ("# the effect\nprint(2.5)", "print('control', 0.1)"):
        result = await lab.cell(handle, source)
        ids.append(result.meta["seer/run"]["cell"])
    return ids[0], ids[1]


async def test_findings_become_a_cell_and_a_record(lab: Lab) -> None:
    handle = await lab.start()
    shown, control = await two_cells(lab, handle)
    said = await lab.ok(
        "submit_findings",
        sandbox=handle,
        claim="The effect is 2.5, that of the control 0.1.",
        evidence=shown,
        controls=control,
        confidence=0.9,
        answer="2.5",
        limits="One seed.",
    )
    assert "findings 1" in said and "graded" not in said
    path = await lab.notebook_path(handle)
    cell = read_cells(path)[-1]
    text = "".join(cell["source"])
    for part in (
        "## Findings 1",
        "The effect is 2.5",
        "90%",
        f"`{shown}`: `# the effect`",
        "One seed.",
    ):
        assert part in text
    assert cell["metadata"]["seer"]["findings"] == 1
    record = json.loads(path.with_suffix(".findings.json").read_text())
    (one,) = record["submissions"]
    assert (one["number"], one["confidence"], one["answer"]) == (1, 0.9, "2.5")
    assert (one["sandbox"], one["cell"], one["investigation"]) == (handle, cell["id"], None)
    assert [each["cell"] for each in one["evidence"] + one["controls"]] == [shown, control]
    again = await lab.ok(
        "submit_findings", sandbox=handle, claim="More.", evidence=control, confidence=0.5
    )
    assert "findings 2" in again and "No control was named" in again
    assert len(json.loads(path.with_suffix(".findings.json").read_text())["submissions"]) == 2


async def test_what_shows_nothing_is_no_evidence(lab: Lab) -> None:
    handle = await lab.start()
    shown, _ = await two_cells(lab, handle)
    failed = (await lab.cell(handle, "1 / 0")).meta["seer/run"]["cell"]
    unrun = (await lab.cell(handle, "print(1)", run=False)).meta["seer/cell"]
    prose = (await lab.cell(handle, "text", type="markdown")).meta["seer/cell"]
    given: dict[str, Any] = {"sandbox": handle, "claim": "It is so.", "confidence": 0.5}
    for wrong, said in (
        ({"evidence": " "}, "name the cells"),
        ({"evidence": failed}, "'error'"),
        ({"evidence": unrun}, "not run"),
        ({"evidence": prose}, "markdown"),
        ({"evidence": shown, "controls": "nothing"}, "No cell 'nothing'"),
        ({"evidence": shown, "claim": "  "}, "claim"),
        ({"evidence": shown, "confidence": 1.5}, "confidence"),
        ({"evidence": shown, "confidence": "high"}, "confidence"),
        ({"evidence": shown, "answer": "x" * 5000}, "at most 4,000"),
        ({"evidence": f"{shown} " * 51}, "evidence"),
        ({"evidence": shown, "proof": "x"}, "no parameter 'proof'"),
    ):
        assert said in await lab.no("submit_findings", **{**given, **wrong})
    await lab.ok("edit_cell", sandbox=handle, cell=shown, source="print(3)")
    assert "edited since" in await lab.no("submit_findings", **given, evidence=shown)
    assert not (await lab.notebook_path(handle)).with_suffix(".findings.json").exists()


async def test_findings_can_be_submitted_when_the_sandbox_is_gone(lab: Lab) -> None:
    """Its time or its money may be over before the conclusion is written."""
    handle = await lab.start()
    shown, _ = await two_cells(lab, handle)
    path = await lab.notebook_path(handle)
    await lab.ok("stop_sandbox", sandbox=handle)
    await lab.ok("submit_findings", sandbox=handle, claim="So.", evidence=shown, confidence=1)
    assert "## Findings 1" in "".join(read_cells(path)[-1]["source"])
    assert path.with_suffix(".findings.json").exists()


async def test_the_record_is_the_servers(lab: Lab) -> None:
    """No tool writes it, and one that was damaged is never written over."""
    handle = await lab.start()
    shown, _ = await two_cells(lab, handle)
    given: dict[str, Any] = {
        "sandbox": handle,
        "claim": "So.",
        "evidence": shown,
        "confidence": 1,
    }
    await lab.ok("submit_findings", **given)
    record = (await lab.notebook_path(handle)).with_suffix(".findings.json")
    kept = record.read_text()
    await lab.no("write_file", sandbox=handle, path=record.name, content="{}")
    assert record.read_text() == kept
    for damage in ("{", "[]", '{"submissions": 5}'):
        record.write_text(damage)
        assert "cannot be read" in await lab.no("submit_findings", **given)
        assert record.read_text() == damage
    cells = read_cells(await lab.notebook_path(handle))
    assert sum("## Findings" in "".join(cell["source"]) for cell in cells) == 1


# -- graders ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("a woman", 1),
        (" The WOMAN. ", 1),
        ("woman, surely", 0),
        ("man", 0),
        ("", 0),
        ("not a woman", 0),
    ],
)
async def test_a_fact_is_exact_but_for_case_articles_and_punctuation(
    answer: str, score: float
) -> None:
    grade = await graded(
        FactGrader(kind="fact", accept=("woman",)), {**FOUND, "answer": answer}, None
    )
    assert grade.score == (None if score is None else pytest.approx(score))


async def test_a_rubric_adds_points_of_whole_words() -> None:
    rubric = RubricGrader(
        kind="rubric",
        criteria=(
            Criterion(name="says it", points=2, any=("woman", "female")),
            Criterion(name="is not vague", points=1, none=("man or woman",)),
            Criterion(name="has a control", points=1, controls=1),
        ),
    )
    grade = await graded(rubric, FOUND, None)
    assert (grade.score, grade.parts["has a control"]) == (0.75, 0.0)
    other = await graded(rubric, {**FOUND, "claim": "A womanly man or woman.", "answer": ""}, None)
    assert other.parts == {"says it": 1.0, "is not vague": 0.0, "has a control": 0.0}
    assert (
        await graded(rubric, {**FOUND, "claim": "a womanly thing", "answer": ""}, None)
    ).score == 0.25


@pytest.mark.parametrize(
    ("reply", "score", "failed"),
    [
        ('Here: {"correct": 8, "honest": 4, "notes": "fair"} ', 0.6, ""),
        ('{"correct": 8}', None, "form"),
        ('{"correct": 80, "honest": 4}', None, "not 0 to 10"),
        ("I cannot say", None, "form"),
        (None, None, "sampling"),
    ],
)
async def test_a_judge_scores_each_dimension(
    reply: str | None, score: float | None, failed: str
) -> None:
    judge = JudgeGrader(kind="judge", instructions="x", dimensions=("correct", "honest"))
    grade = await graded(judge, FOUND, reply)
    assert grade.score == (None if score is None else pytest.approx(score))
    assert failed in grade.failed


@pytest.mark.parametrize(
    ("body", "score", "failed"),
    [
        ("return 1.0 if 'woman' in found['claim'] else 0.0", 1.0, ""),
        ("return {'score': 0.5, 'parts': {'a': 1}, 'notes': 'n'}", 0.5, ""),
        ("print('noise'); return 0.25", 0.25, ""),
        ("return 7", None, "not 0 to 1"),
        ("return 'good'", None, "no score"),
        ("raise ValueError('x')", None, "ValueError"),
        ("import os; os._exit(3)", None, "ended with 3"),
        ("import os; return float('HOME' in os.environ)", 0.0, ""),
    ],
)
async def test_code_grades_in_a_process_of_its_own(
    tmp_path: Path, body: str, score: float | None, failed: str
) -> None:
    file = tmp_path / "grade.py"
    file.write_text(f"def grade(found):\n    {body}\n")
    grade = await graded(CodeGrader(kind="code", file=file), FOUND, None)
    assert grade.score == score, grade
    assert failed in grade.failed


async def test_code_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer_mcp.grading.GRADER_SECONDS", 1.0)
    file, mark = tmp_path / "grade.py", tmp_path / "pid"
    file.write_text(
        "import os, subprocess, time\n"
        "def grade(found):\n"
        f"    child = subprocess.Popen(['sleep', '600']); open({str(mark)!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(600)\n"
    )
    grade = await graded(CodeGrader(kind="code", file=file), FOUND, None)
    assert grade.score is None and "did not end" in grade.failed
    for _ in range(100):
        if not Path(f"/proc/{mark.read_text()}").exists():
            return
        if "Z" in Path(f"/proc/{mark.read_text()}/stat").read_text().split()[2]:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("what the grader started still runs")


@pytest.mark.parametrize(
    "text", ["kind = 'fact'", "kind = 'guess'", "kind =", "kind='rubric'\ncriteria=[]"]
)
def test_a_file_that_is_no_grader_is_said(tmp_path: Path, text: str) -> None:
    file = tmp_path / "grader.toml"
    file.write_text(text)
    with pytest.raises(GraderUnusable):
        read_grader(file)


# -- what a client learns of a grader ---------------------------------------------------------

GRADERS = {
    "fact": ("grader.toml", f'kind = "fact"\naccept = ["{SECRET}"]\n', 0.0),
    "rubric": (
        "grader.toml",
        f'kind = "rubric"\n[[criteria]]\nname = "{SECRET}"\nany = ["{SECRET}"]\n',
        0.0,
    ),
    "code": (
        "grade.py",
        f"def grade(found):\n    return {{'score': 0.5, 'notes': '{SECRET}'}}\n",
        0.5,
    ),
    "code that fails": ("grade.py", f"def grade(found):\n    raise ValueError('{SECRET}')\n", None),
    "no grader": ("grader.toml", f'kind = "fact"\naccpet = ["{SECRET}"]\n', None),
    "judge": ("grader.toml", f'kind = "judge"\ninstructions = "It is {SECRET}."\n', None),
}


def investigation(folder: Path, grader: str, text: str) -> Path:
    here = folder / "shelf" / "puzzle"
    here.mkdir(parents=True)
    (here / "investigation.toml").write_text(f'title = "A puzzle"\ngrader = "{grader}"\n')
    (here / "task.md").write_text("Find the word.\n")
    (here / grader).write_text(text)
    return here.parent


@pytest.mark.parametrize("kind", GRADERS)
async def test_nothing_of_a_grader_gets_to_the_client(tmp_path: Path, kind: str) -> None:
    file, text, score = GRADERS[kind]
    shelf = investigation(tmp_path, file, text)
    async with open_lab(tmp_path, investigations=(shelf,)) as lab:
        heard = [(await lab.client.list_prompts()).model_dump_json()]
        heard.append((await lab.client.get_prompt("puzzle")).model_dump_json())
        started = await lab.call("start_sandbox", investigation="puzzle")
        handle = started.meta["seer/sandbox"]["handle"]
        heard.append(started.model_dump_json())
        shown = (await lab.cell(handle, "print(1)")).meta["seer/run"]["cell"]
        submitted = await lab.call(
            "submit_findings",
            sandbox=handle,
            claim="It is a word.",
            answer="plover",
            evidence=shown,
            confidence=0.6,
        )
        assert not submitted.is_error, text_of(submitted)
        heard.append(submitted.model_dump_json())
        told = submitted.meta["seer/findings"]
        assert told["graded"] is (score is not None)
        assert "score" not in told and "0.5" not in text_of(submitted)
        # In the sandbox: environment, files of the working folder, the kernel's history.
        look = (
            "import os, pathlib\nprint(dict(os.environ))\n"
            "for p in pathlib.Path().rglob('*'):\n    print(p, p.read_bytes() if p.is_file() else '')\n"
            "print(In, Out)"
        )
        heard.append((await lab.cell(handle, look)).model_dump_json())
        heard.append(await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True))
        folder = (await lab.notebook_path(handle)).parent
        heard += [path.read_text() for path in folder.rglob("*") if path.is_file()]
    (grade,) = (tmp_path / "state" / "grades").glob("*.json")
    assert grade.stat().st_mode & 0o777 == 0o600
    kept = json.loads(grade.read_text())
    assert (kept["score"], kept["investigation"]) == (score, "puzzle")
    assert (kept["brier"] is None) == (score is None)
    assert (SECRET in grade.read_text()) == (kind not in ("fact", "judge"))
    for text in heard:
        assert SECRET not in text
    state = tmp_path / "state"
    for path in state.rglob("*"):
        if path.is_file() and path != grade:
            assert SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("mode", ["auto", "legacy"])
async def test_a_judge_is_the_clients_model_in_a_conversation_of_its_own(
    tmp_path: Path, mode: str
) -> None:
    asked: list[str] = []

    async def sample(context: Any, params: Any) -> CreateMessageResult:
        asked.append(params.messages[0].content.text)
        reply = f'{{"correct": 9, "notes": "near {SECRET}"}}'
        return CreateMessageResult(
            role="assistant", content=TextContent(type="text", text=reply), model="scripted"
        )

    @asynccontextmanager
    async def judging_lab() -> AsyncIterator[Lab]:
        shelf = investigation(tmp_path, *GRADERS["judge"][:2])
        server = build_server(config_for(tmp_path, investigations=(shelf,)))
        async with Client(server, sampling_callback=sample, mode=mode) as client:
            yield Lab(client, tmp_path)

    async with judging_lab() as lab:
        handle = await lab.start(investigation="puzzle")
        shown = (await lab.cell(handle, "print('the printed evidence')")).meta["seer/run"]["cell"]
        said = await lab.ok(
            "submit_findings", sandbox=handle, claim="A word.", evidence=shown, confidence=1
        )
        assert SECRET not in said
    assert len(asked) == 1
    assert SECRET in asked[0] and "the printed evidence" in asked[0]
    (grade,) = (tmp_path / "state" / "grades").glob("*.json")
    assert json.loads(grade.read_text())["score"] == 0.9


async def test_a_grader_is_found_again_by_the_next_server(tmp_path: Path) -> None:
    shelf = investigation(tmp_path, "grader.toml", 'kind = "fact"\naccept = ["plover"]\n')
    async with open_lab(tmp_path, investigations=(shelf,), on_exit="keep") as lab:
        handle = await lab.start(investigation="puzzle")
        shown = (await lab.cell(handle, "print(1)")).meta["seer/run"]["cell"]
    async with open_lab(tmp_path) as lab:
        await lab.ok(
            "submit_findings",
            sandbox=handle,
            claim="x",
            answer="plover",
            evidence=shown,
            confidence=1,
        )
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "seer_mcp.cli",
            "grades",
            "--json",
            "--state",
            str(tmp_path / "state"),
        ],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ},
    )
    (grade,) = json.loads(done.stdout)
    assert (grade["score"], grade["investigation"], grade["brier"]) == (1.0, "puzzle", 0.0)
