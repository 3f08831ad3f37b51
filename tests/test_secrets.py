"""Secrets by name, and that their values are taken out of what leaves."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import pprint
import time
import urllib.parse
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seer_mcp import redact
from seer_mcp.config import from_environment
from seer_mcp.errors import BadInput
from seer_mcp.redact import EventRedactor, Redactor, forms
from seer_mcp.secret import Secrets, check_secret_name

TOKEN = "hf_Zq7-canary/Token+0815=="
ODD = "pa\"ss\\wö rd'<&>%\u20ac"
KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBgkqhkiG9w0B\nAQEFAASCBKcwggSjAgEAAoIB\n-----END KEY-----"


# -- where values are found -------------------------------------------------------------------


def test_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    dotenv = tmp_path / ".env"
    dotenv.write_text(
        "# keys\nHF_TOKEN=from-the-file\nexport OPENAI_API_KEY='quoted value'\n"
        'OTHER_KEY="a\\nb and ${HF_TOKEN}"\nEMPTY=\n'
    )
    secrets = Secrets({"HF_TOKEN": "from-the-environment", "EMPTY": ""}, dotenv)
    found = secrets.find(["HF_TOKEN", "OPENAI_API_KEY", "OTHER_KEY", "EMPTY", "NOWHERE"])
    assert found.values == {
        "HF_TOKEN": "from-the-environment",
        "OPENAI_API_KEY": "quoted value",
        "OTHER_KEY": "a\nb and ${HF_TOKEN}",
    }
    assert found.missing == ("EMPTY", "NOWHERE")
    assert secrets.at_hand(["HF_TOKEN", "NOWHERE"]) == {"HF_TOKEN": "from-the-environment"}
    assert "from-the" not in repr(found)
    said = secrets.missing(found.missing)
    assert (
        said.startswith("EMPTY, NOWHERE: not in the server's environment") and str(dotenv) in said
    )


def test_a_key_can_be_added_while_the_server_runs(tmp_path: Path) -> None:
    secrets = Secrets({}, tmp_path / ".env")
    assert secrets.find(["HF_TOKEN"]).missing == ("HF_TOKEN",)
    (tmp_path / ".env").write_text("HF_TOKEN=added-later\n")
    assert secrets.find(["HF_TOKEN"]).values == {"HF_TOKEN": "added-later"}


def test_reading_the_file_leaves_the_environment_alone(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("SEER_TEST_KEY=never-in-the-environment\n")
    assert Secrets({}, tmp_path / ".env").find(["SEER_TEST_KEY"]).values
    assert "SEER_TEST_KEY" not in os.environ


@pytest.mark.parametrize(
    "name",
    ["MODAL_TOKEN_SECRET", "MODAL_TOKEN_ID", "MCP_TOKEN", "SEER_MCP_STATE", "CLAUDE_CODE_TOKEN"],
)
def test_keys_of_the_server_its_account_and_its_client_cannot_be_named(name: str) -> None:
    for spelled in (name, name.lower()):
        with pytest.raises(BadInput, match="no sandbox gets them"):
            Secrets({spelled: "a-value-that-is-there"}).find([spelled])


@pytest.mark.parametrize(
    "name", ["", "A B", "1A", "A=B", "A\n", "é", "A" * 129, "PATH", "LD_PRELOAD"]
)
def test_names_that_cannot_be_secrets_are_refused(name: str) -> None:
    with pytest.raises(BadInput):
        check_secret_name(name)


@pytest.mark.parametrize("name", ["HF_TOKEN", "ANTHROPIC_API_KEY", "openrouter_key", "_X"])
def test_ordinary_names_can_be(name: str) -> None:
    check_secret_name(name)


def test_a_value_that_could_not_be_kept_out_is_refused() -> None:
    with pytest.raises(BadInput, match="fewer than 8"):
        Secrets({"PIN": "1234567"}).find(["PIN"])
    with pytest.raises(BadInput, match="NUL"):
        Secrets({"KEY": "1234567\0890"}).find(["KEY"])


@pytest.mark.parametrize("what", ["folder", "pipe", "bytes", "large"])
def test_a_file_that_cannot_be_read_is_said(tmp_path: Path, what: str) -> None:
    path = tmp_path / ".env"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"A=\xff\xfe\n" if what == "bytes" else b"A=b\n" * 300_000)
    secrets = Secrets({}, path)
    with pytest.raises(BadInput, match=r"\.env"):
        secrets.find(["HF_TOKEN"])
    assert secrets.known() == secrets.at_hand(["HF_TOKEN"]) == {}


def test_what_looks_like_a_secret_is_redacted_though_nobody_named_it(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / ".env").write_text("WANDB_API_KEY=0123456789abcdef-wandb\n")
    environ = {
        "HF_TOKEN": TOKEN,
        "MODAL_TOKEN_ID": "ak-0123456789",
        "AWS_SECRET_ACCESS_KEY": "aws/0123456789",
        "HF_TOKEN_PATH": "/home/user/token",
        "GITHUB_TOKEN": "short",
        "BUILD_KEY": "202611240000",
        "SSH_KEY": "/home/user/.ssh/id_rsa",
        "PATH": "/usr/bin:/usr/local/bin",
        "KEYBOARD_LAYOUT": "de-latin1-nodeadkeys",
    }
    config = from_environment(environ, project, state=str(tmp_path / "state"))
    assert sorted(config.secrets.known()) == [
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "MODAL_TOKEN_ID",
        "WANDB_API_KEY",
    ]
    assert config.redactor.text(f"a {TOKEN} b") == "a [secret HF_TOKEN] b"
    assert TOKEN not in repr(config) and "ak-0123" not in repr(config)


# -- values in texts --------------------------------------------------------------------------


@pytest.mark.parametrize("value", [TOKEN, ODD, KEY, "plain-and-simple-0815"])
@pytest.mark.parametrize(
    "written",
    [
        str,
        repr,
        ascii,
        json.dumps,
        lambda v: json.dumps({"a": v}, ensure_ascii=False),
        lambda v: pprint.pformat({"HF_TOKEN": v}, width=200),
        lambda v: urllib.parse.quote(v),
        lambda v: urllib.parse.quote(v, safe=""),
        lambda v: urllib.parse.urlencode({"key": v}),
        lambda v: __import__("html").escape(v),
        lambda v: base64.b64encode(v.encode()).decode(),
        lambda v: base64.b64encode(f"user:{v}".encode()).decode(),
        lambda v: base64.b64encode(f"me:{v}:x".encode()).decode(),
        lambda v: base64.urlsafe_b64encode(f"u:{v}".encode()).decode(),
    ],
    ids=lambda f: "",
)
def test_a_value_is_found_in_every_form(value: str, written: Any) -> None:
    redactor = Redactor({"K": value})
    text = f"before {written(value)} after"
    clean = redactor.text(text)
    assert "[secret K]" in clean and clean.startswith("before ") and clean.endswith(" after")
    assert not [form for form in forms(value) if form in clean]
    assert redactor.found(text) == ["K"]
    assert redactor.found(clean) == []


def test_a_line_of_a_value_of_many_lines_counts_by_itself() -> None:
    redactor = Redactor({"PEM": KEY})
    clean = redactor.text("got MIIEvQIBADANBgkqhkiG9w0B only\n-----BEGIN KEY-----\n")
    assert clean == "got [secret PEM] only\n-----BEGIN KEY-----\n"


def test_short_values_and_unknown_ones_change_nothing() -> None:
    assert Redactor({"PIN": "1234567"}).text("1234567") == "1234567"
    assert not Redactor({"PIN": "1234567"})
    value = {"a": [1, None, "text"]}
    assert Redactor().value(value) is value
    assert Redactor({"K": TOKEN}).value(value) is value


def test_texts_are_redacted_however_deep() -> None:
    redactor = Redactor({"K": TOKEN})
    assert redactor.value({TOKEN: [f"x{TOKEN}", ({"b": TOKEN}, 5, True)]}) == {
        "[secret K]": ["x[secret K]", ({"b": "[secret K]"}, 5, True)]
    }


def test_the_longer_of_two_values_wins_and_neighbours_are_both_found() -> None:
    redactor = Redactor({"SHORT": "abcdefgh", "LONG": "abcdefghijkl"})
    assert redactor.text("abcdefghijkl") == "[secret LONG]"
    assert redactor.text("abcdefghij") == "[secret SHORT]ij"
    assert (
        redactor.text("abcdefghabcdefghijklabcdefgh") == "[secret SHORT][secret LONG][secret SHORT]"
    )


def test_a_value_learned_later_is_redacted_from_then_on() -> None:
    redactor = Redactor({"K": TOKEN})
    assert redactor.text("later-learned-value") == "later-learned-value"
    redactor.know({"L": "later-learned-value", "K": TOKEN})
    assert redactor.text(f"later-learned-value {TOKEN}") == "[secret L] [secret K]"


def test_redacting_is_fast() -> None:
    redactor = Redactor({f"K{i}": f"{i:02}-{TOKEN}-{i * 7919:08x}" for i in range(10)})
    text = "the quick brown fox printed 0123456789 and a hf_ prefix\n" * 100_000
    text += f"{TOKEN} 03-{TOKEN}-{3 * 7919:08x}" + "x" * 1_000_000
    began = time.perf_counter()
    assert redactor.text(text).count("[secret K3]") == 1
    assert time.perf_counter() - began < 5.0  # 6.6 MB; some 80 ms on an idle machine


def test_many_values_in_one_text_take_no_quadratic_time() -> None:
    redactor = Redactor({"A": "aaaaaaaab", "B": "zzzzzzzzz", "C": "only-at-the-end"})
    text = "aaaaaaaab zzzzzzzzz " * 50_000 + "only-at-the-end"
    began = time.perf_counter()
    assert redactor.text(text).count("[secret") == 100_001
    assert time.perf_counter() - began < 10.0


# -- events -----------------------------------------------------------------------------------


class Folding:
    """Folds events as a notebook does: streams of one name are joined."""

    def __init__(self, redactor: Redactor) -> None:
        self.events: list[dict[str, Any]] = []
        self.redactor = EventRedactor(redactor, self.events.append)
        self.number = 0

    def stream(self, text: str, name: str = "stdout", run: str = "r1", **more: Any) -> None:
        self.number += 1
        event = {"n": self.number, "type": "stream", "run": run, "name": name, "text": text, **more}
        self.redactor.take(event)

    def event(self, kind: str, run: str = "r1", **more: Any) -> None:
        self.number += 1
        self.redactor.take({"n": self.number, "type": kind, "run": run, **more})

    def text(self, run: str = "r1") -> str:
        return "".join(e["text"] for e in self.events if e["type"] == "stream" and e["run"] == run)


@pytest.fixture
def folding() -> Folding:
    return Folding(Redactor({"K": TOKEN}))


@pytest.mark.anyio
async def test_without_secrets_events_pass_untouched() -> None:
    plain = Folding(Redactor())
    plain.stream("hf_")
    assert plain.events == [
        {"n": 1, "type": "stream", "run": "r1", "name": "stdout", "text": "hf_"}
    ]


@pytest.mark.anyio
async def test_ordinary_output_is_not_held_back(folding: Folding) -> None:
    folding.stream("loading 10%\r")
    folding.stream("a prompt> ")
    folding.stream("done")
    assert folding.text() == "loading 10%\ra prompt> done"


@pytest.mark.anyio
@pytest.mark.parametrize("at", range(1, len(TOKEN)))
async def test_a_value_in_two_pieces_is_found(folding: Folding, at: int) -> None:
    folding.stream(f"token: {TOKEN[:at]}")
    assert folding.text() == "token: "  # only what could be the beginning waits
    folding.stream(f"{TOKEN[at:]}\nnext")
    assert folding.text() == "token: [secret K]\nnext"


@pytest.mark.anyio
@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["aab", "aabaabcc", "aabaabccd", "aab aab", "a", "b", "cc", "d", " ", "\n"]
        ),
        max_size=40,
    )
)
async def test_however_it_is_cut_the_text_is_that_of_the_whole(pieces: list[str]) -> None:
    redactor = Redactor({"A": "aabaabcc", "B": "aabaabccd", "C": "ccd aab "})
    cut = Folding(redactor)
    for piece in pieces:
        cut.stream(piece)
    cut.event("end")
    assert cut.text() == redactor.text("".join(pieces))
    assert cut.events[-1]["type"] == "end"


@pytest.mark.anyio
async def test_what_waits_goes_out_before_what_follows_it(folding: Folding) -> None:
    folding.stream("a hf_")
    folding.stream("oops", name="stderr")
    folding.stream("b hf_")
    folding.event("display", data={"text/plain": TOKEN}, metadata={})
    folding.stream("c hf_Zq7")
    folding.stream("other", run="r2")
    folding.event("end", state="complete", why="")
    assert [(e["run"], e["type"], e.get("text", "")) for e in folding.events] == [
        ("r1", "stream", "a "),
        ("r1", "stream", "hf_"),
        ("r1", "stream", "oops"),
        ("r1", "stream", "b "),
        ("r1", "stream", "hf_"),
        ("r1", "display", ""),
        ("r1", "stream", "c "),
        ("r2", "stream", "other"),
        ("r1", "stream", "hf_Zq7"),
        ("r1", "end", ""),
    ]
    assert folding.events[5]["data"] == {"text/plain": "[secret K]"}


@pytest.mark.anyio
async def test_what_waits_too_long_goes_out_and_the_whole_value_still_does_not(
    folding: Folding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redact, "HOLD_SECONDS", 0.01)
    folding.stream(f"> {TOKEN[:6]}")
    async with asyncio.timeout(5):
        while folding.text() == "> ":
            await asyncio.sleep(0.01)
    assert folding.text() == f"> {TOKEN[:6]}"
    folding.stream(TOKEN[6:] + "!")
    assert folding.text() == f"> {TOKEN[:6]}[secret K]!"
    folding.stream(f"\n> {TOKEN[:6]}", run="r2")
    await asyncio.sleep(0.05)
    folding.stream(" and so on", run="r2")
    folding.event("end", run="r2")
    assert folding.text("r2") == f"\n> {TOKEN[:6]} and so on"


@pytest.mark.anyio
async def test_late_output_waits_for_nothing_and_never_shows_the_whole(folding: Folding) -> None:
    folding.event("end", state="complete", why="")
    folding.stream(f"late {TOKEN[:9]}", late=True)
    assert folding.text() == f"late {TOKEN[:9]}"
    folding.stream(f"{TOKEN[9:]} {TOKEN}\n", late=True)
    assert folding.text() == f"late {TOKEN[:9]}[secret K] [secret K]\n"
    nested = Folding(Redactor({"SHORT": "abcdefgh", "LONG": "abcdefghij"}))
    nested.stream("abcdefgh", late=True)
    nested.stream("ij\n", late=True)
    assert "abcdefgh" not in nested.text()


@pytest.mark.anyio
async def test_a_session_that_lets_go_loses_nothing(folding: Folding) -> None:
    folding.stream("almost hf_Zq7")
    folding.redactor.flush()
    assert folding.text() == "almost hf_Zq7"
    folding.redactor.flush()
    assert folding.text() == "almost hf_Zq7"


@pytest.mark.anyio
async def test_errors_and_updates_are_redacted_and_images_are_not_touched(folding: Folding) -> None:
    folding.event(
        "error", ename="KeyError", evalue=TOKEN, traceback=["a", f"\x1b[31m{TOKEN}\x1b[0m"]
    )
    image = base64.b64encode(TOKEN.encode() * 3).decode()
    folding.event(
        "update",
        data={"image/png": image, "image/svg+xml": f"<t>{TOKEN}</t>"},
        metadata={"a": TOKEN},
    )
    folding.redactor.take({"n": 9, "type": "kernel", "state": "dead", "how": f"said {TOKEN}"})
    error, update, kernel = folding.events
    assert error["evalue"] == "[secret K]" and TOKEN not in str(error)
    assert update["data"] == {"image/png": image, "image/svg+xml": "<t>[secret K]</t>"}
    assert update["metadata"] == {"a": "[secret K]"}
    assert kernel["how"] == "said [secret K]"
