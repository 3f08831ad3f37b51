"""Tokens of a team: made, listed, revoked; a running server obeys at once."""

import json
import os
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from seer_mcp.errors import BadInput, NotFound, SeerError
from seer_mcp.files import write_json
from seer_mcp.http.tokens import SCOPES, Token, TokenFile, token_of

from ..faults.ground import Ground, http_server
from ..faults.test_h_http import post
from .test_watch import browser


def test_a_token_is_found_by_its_secret_alone(tmp_path: Path) -> None:
    kept = TokenFile(tmp_path / "tokens.json")
    secret, token = kept.create("anna", ["code:run"], 1)
    other, _ = kept.create("ben", SCOPES, None)
    assert kept.find(secret) == token and token.user == "anna" and token.scopes == ("code:run",)
    assert kept.find(other).user == "ben"
    mixed = secret[:14] + other[14:]
    for wrong in (
        "",
        secret[:-1],
        secret + "x",
        secret.upper(),
        token.sha256,
        token.id,
        mixed,
        "\ud800",
    ):
        assert kept.find(wrong) is None
    text = kept.path.read_text()
    assert secret not in text and secret[14:] not in text
    assert stat.S_IMODE(kept.path.stat().st_mode) == 0o600


def test_a_token_ends_when_it_expires_or_is_revoked(tmp_path: Path) -> None:
    writer, reader = (
        TokenFile(tmp_path / "t" / "tokens.json"),
        TokenFile(tmp_path / "t" / "tokens.json"),
    )
    secret, token = writer.create("anna", SCOPES, 1)
    assert reader.find(secret) is not None
    past = replace(token, expires=time.time() - 1)
    write_json(writer.path, {"tokens": [{**vars(past)}]})
    assert reader.find(secret) is None and reader.tokens()[0].expired(time.time())
    first, _ = writer.create("anna", SCOPES, 1)
    second, kept = writer.create("anna", SCOPES, 1)
    assert [t.id for t in writer.revoke(kept.id)] == [kept.id]
    assert reader.find(second) is None and reader.find(first) is not None
    writer.revoke("anna")
    assert reader.find(first) is None and reader.tokens() == []
    with pytest.raises(NotFound, match="carl"):
        writer.revoke("carl")


def test_what_cannot_be_a_token_is_refused(tmp_path: Path) -> None:
    kept = TokenFile(tmp_path / "tokens.json")
    for user in ("", "a b", "-a", "ä", "a" * 65, "a/b", "oidc:x", "../a"):
        with pytest.raises(BadInput, match="user"):
            kept.create(user, SCOPES, 1)
    with pytest.raises(BadInput, match="root"):
        kept.create("anna", ["root"], 1)
    with pytest.raises(BadInput, match="scope"):
        kept.create("anna", [], 1)
    for days in (0, -1, float("nan"), float("inf"), 1e9):
        with pytest.raises(BadInput, match="days"):
            kept.create("anna", SCOPES, days)
    assert not kept.path.exists()


def test_a_damaged_or_open_file_lets_nobody_in(tmp_path: Path) -> None:
    kept = TokenFile(tmp_path / "tokens.json")
    secret, token = kept.create("anna", SCOPES, 1)
    whole = kept.path.read_text()
    for damaged in (
        "",
        "{",
        "[]",
        "{}",
        '{"tokens": [{}]}',
        whole.replace(token.sha256, "x"),
        whole[:-9],
    ):
        kept.path.write_text(damaged)
        with pytest.raises(SeerError, match="no token file"):
            TokenFile(kept.path).find(secret)
    kept.path.write_text(whole)
    assert TokenFile(kept.path).find(secret) is not None
    kept.path.chmod(0o644)
    with pytest.raises(SeerError, match="chmod 600"):
        TokenFile(kept.path).find(secret)
    with pytest.raises((ValueError, KeyError, TypeError)):
        token_of({**vars(token), "scopes": ["root"]})
    assert isinstance(token_of({**vars(token)}), Token)


@pytest.mark.anyio
async def test_a_damaged_or_open_file_lets_nobody_into_a_server_that_runs(
    place: Ground, caplog: pytest.LogCaptureFixture
) -> None:
    kept = TokenFile(place.folder / "tokens.json")
    secret, _ = kept.create("anna", SCOPES[:3], 1)
    whole = kept.path.read_text()
    async with (
        http_server(place.config(team=True), users=TokenFile(kept.path)) as server,
        browser(server, secret) as http,
    ):
        assert (await post(server, token=secret)).status_code == 200
        kept.path.write_text(whole[:-9])
        assert (await post(server, token=secret)).status_code == 401
        assert "no token file" in caplog.text and "restore it" in caplog.text
        assert (await http.get("/cards")).status_code == 401
        kept.path.write_text(whole)
        assert (await post(server, token=secret)).status_code == 200
        kept.path.chmod(0o644)
        answer = await post(server, token=secret)
        assert answer.status_code == 401 and str(kept.path) not in answer.text
        assert f"chmod 600 {kept.path}" in caplog.text
        assert (await http.post("/enter", data={"token": secret})).status_code == 401


def test_the_command_line_makes_lists_and_revokes(tmp_path: Path) -> None:
    def say(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "seer_mcp.cli", "token", "--state", str(tmp_path), *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "CLAUDE_PROJECT_DIR": str(tmp_path)},
        )

    made = say("create", "anna", "--days", "7")
    assert made.returncode == 0 and made.stderr.startswith("anna's token ")
    secret = made.stdout.strip()
    found = TokenFile(tmp_path / "tokens.json").find(secret)
    assert found is not None and found.scopes == SCOPES[:3]
    assert 6.9 < (found.expires - time.time()) / 86400 < 7.1
    listed = say("list")
    assert found.id in listed.stdout and secret not in listed.stdout + listed.stderr
    assert json.loads(say("list", "--json").stdout)[0]["user"] == "anna"
    assert say("create", "a b").returncode == 2
    assert "scopes are" in say("create", "ben", "--scope", "all").stderr
    assert say("revoke", found.id).returncode == 0
    assert "There are no tokens" in say("list").stdout
    assert say("revoke", found.id).returncode == 2
