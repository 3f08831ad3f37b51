"""`seer-mcp packs`: what `new` writes is complete and runs; `check` names each thing that is lacking."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from seer_mcp.cli import main
from seer_mcp.own_packs.check import of_texts


@pytest.fixture
def pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Path:
    """The pack that `packs new` writes."""
    monkeypatch.chdir(tmp_path)
    assert main(["packs", "new", "my_lens"]) == 0
    assert "wrote" in capsys.readouterr().out
    return tmp_path / "packs" / "my_lens.py"


def test_a_new_pack_is_complete_its_example_runs_and_its_tests_pass(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(pack.parents[1] / "state")
    assert main(["packs", "check", str(pack.parent), "--json", "--state", state]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == {"techniques": ["my_lens.my_lens"], "faults": []}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=pack.parent,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("    Use when:\n", "    Used when:\n", 'no "Use when:"'),
        ("    Controls:\n", "    Checks:\n", 'no "Controls:"'),
        ("cosine [prompt, layer] of", "cosine of", "gives no shapes"),
        ("        n/a\n", "        a paper\n", "an arXiv id"),
        ("    Args:\n", "    Takes:\n", 'no "Args:"'),
        ("        r = my_lens(m", "        r = = my_lens(m", "is no Python"),
        ('__all__ = ["my_lens"]', '__all__ = ["my_len"]', "defines nothing"),
        ('__all__ = ["my_lens"]', "__all__ = names()", "is computed"),
        ('"""my_lens: write here', 'unused = """my_lens: write here', "no docstring"),
    ],
)
def test_what_a_pack_lacks_is_said(pack: Path, before: str, after: str, said: str) -> None:
    source = pack.read_text()
    assert before in source
    pack.write_text(source.replace(before, after, 1))
    if "[prompt, layer]" in before:
        text = pack.read_text()
        pack.write_text(text.replace("cosine_random [layer, null]", "cosine_random"))
    _, faults = of_texts(pack.parent)
    assert any(said in str(fault) for fault in faults), faults
    assert main(["packs", "check", str(pack.parent), "--no-run"]) == 1


@pytest.mark.slow
def test_an_example_that_fails_is_said_with_its_error(
    pack: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pack.write_text(pack.read_text().replace("r = my_lens(m, [", "r = my_lens(m.nothing, ["))
    state = str(pack.parents[1] / "state")
    assert main(["packs", "check", str(pack.parent), "--state", state]) == 1
    assert "my_lens.my_lens: its example does not run: AttributeError" in capsys.readouterr().out


def test_nothing_of_a_pack_is_run_to_read_it(pack: Path) -> None:
    mark = pack.parent / "ran"
    pack.write_text(f"{pack.read_text()}\nopen({str(mark)!r}, 'w')\n")
    packs, faults = of_texts(pack.parent)
    assert [p.name for p in packs] == ["my_lens"] and faults == [] and not mark.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["new", "My-lens"], "a module's name"),
        (["new", "class"], "a module's name"),
        (["new", "torch"], "would hide"),
        (["new", "my_lens"], "exists already"),
        (["check", "nowhere"], "no such folder"),
    ],
)
def test_what_makes_no_sense_is_refused(
    pack: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    before = pack.read_text()
    assert main(["packs", *arguments]) == 2
    assert said in capsys.readouterr().err and pack.read_text() == before


def test_a_folder_without_a_pack_is_said(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("x = 1\n")
    _, faults = of_texts(tmp_path)
    assert "no pack" in str(faults[0])
