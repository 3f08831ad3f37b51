"""The command line refuses what it cannot use in one sentence, before anything is served."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def refused(folder: Path, *arguments: str) -> str:
    """The last line of stderr of a server that does not begin."""
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_RUNTIME_DIR": str(folder)},
        cwd=folder,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--idle-minutes", "nan"], "'nan' is not a number above 0"),
        (["--max-wait", "-1"], "'-1' is not a number above 0"),
        (["--output-cap", "-5"], "'-5' is not a whole number"),
        (["serve", "--port", "99999"], "'99999' is not a port"),
        (["serve", "--host", "0.0.0.0"], "only loopback is served"),
    ],
)
def test_a_number_or_address_that_makes_no_sense_is_refused(
    tmp_path: Path, arguments: list[str], said: str
) -> None:
    assert said in refused(tmp_path, *arguments)


def test_an_empty_setting_of_a_client_does_not_hide_the_token_of_the_user(tmp_path: Path) -> None:
    (tmp_path / ".modal.toml").write_text("[default]\ntoken_id = 'a'\ntoken_secret = 'b'\n")
    empty = {"MODAL_TOKEN_ID": "", "MODAL_TOKEN_SECRET": "", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "doctor", "--only", "modal"],
        capture_output=True,
        text=True,
        env={**os.environ, **empty},
        cwd=tmp_path,
        timeout=60,
    )
    assert done.returncode == 0 and f"a token is in {tmp_path / '.modal.toml'}" in done.stdout


def test_a_state_folder_that_cannot_be_used_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for command in ([], ["serve"]):
        assert "File exists" in refused(tmp_path, *command, "--state", str(tmp_path / "file"))
        assert "it is a link" in refused(tmp_path, *command, "--state", str(tmp_path / "link"))
