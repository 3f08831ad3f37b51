"""Secrets that are planted wherever the server could meet them, and looked for in all that leaves it."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from seer_mcp.config import PASSED
from seer_mcp.redact import forms

from .ground import TOKEN, Ground, ground, http_server, raw_server, raw_text

# The server knows all of these. Of them the sandbox is given two by name: from the environment, and from .env.
ENVIRONMENT = {
    "HF_TOKEN": "hf_CANARYhubtokenWXYZ0123456789",
    "MODAL_TOKEN_ID": "ak-CANARYmodalid0123456789",
    "MODAL_TOKEN_SECRET": "as-CANARYmodalsecret0123456789",
    "MCP_OAUTH_CLIENT_SECRET": "CANARY/oauth+client=secret0123",
    "OPENROUTER_API_KEY": 'sk-or-CANARY"named"\\key/0123456789',
}
FILE = {"ANTHROPIC_API_KEY": "sk-ant-CANARYfromthefile0123456789"}
NAMED = ("OPENROUTER_API_KEY", "ANTHROPIC_API_KEY")
CANARIES = {**ENVIRONMENT, **FILE}

# What the kernel, IPython and the host set for themselves.
OWN = {
    "PWD",
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
    "PYTHONDONTWRITEBYTECODE",
    "SEER_MCP_SANDBOX",
    "SEER_MCP_INSTANCE",
}
IPYKERNEL = {
    "JPY_PARENT_PID",
    "PYDEVD_USE_FRAME_EVAL",
    "CLICOLOR",
    "CLICOLOR_FORCE",
    "FORCE_COLOR",
    "PAGER",
}
KERNEL = {"GIT_PAGER", "MPLBACKEND", "LC_CTYPE", "TERM", "KERNEL_LAUNCH_TIMEOUT"}

OUTPUT_OF_CODE = {"journal.jsonl", "kernel.log"}  # as it was put out, for us alone (0600)

PRINTS = """
import base64, json, os, subprocess, sys, urllib.parse
print(dict(os.environ))
print(json.dumps(dict(os.environ), indent=1))
for name in ("OPENROUTER_API_KEY", "ANTHROPIC_API_KEY"):
    value = os.environ[name]
    print(name, value, repr(value), urllib.parse.quote(value), file=sys.stderr)
    print(base64.b64encode(f"user:{value}".encode()).decode(), base64.b64encode(value.encode()).decode())
    print("begins", value[:9], end="", flush=True)
    print(value[9:], flush=True)
    for letter in value:
        print(letter, end="", flush=True)
    print()
subprocess.run("env")
"""
SHOWS = """
from IPython.display import HTML, JSON, Markdown, display
value = os.environ["ANTHROPIC_API_KEY"]
display(HTML(f"<b>{value}</b>"), JSON({"key": value, value: [value]}), Markdown(value))
shown = display("before", display_id=True)
shown.update({"text/plain": value}, raw=True)
{"result": value}
"""
FAILS = 'raise KeyError(os.environ["ANTHROPIC_API_KEY"])'
LONG = 'for i in range(3000): print(i, "x" * 20, os.environ["ANTHROPIC_API_KEY"])'
DIES = 'print(os.environ["ANTHROPIC_API_KEY"][:20], end="", flush=True); os._exit(7)'


@dataclass
class Leak:
    """What a server that was given the canaries left behind, and what it answered."""

    place: Ground
    answers: list[str]
    kernel_environment: dict[str, str]
    notebook: Path
    while_it_ran: dict[Path, bytes]
    """Files of the state folder, while the sandbox lived."""


def spelled(names: tuple[str, ...] = tuple(CANARIES)) -> dict[str, bytes]:
    """Every form of every canary."""
    return {form: form.encode() for name in names for form in forms(CANARIES[name])}


def hits(data: bytes) -> list[str]:
    return [form for form, spelling in spelled().items() if spelling in data]


def files_under(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def leak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Leak]:
    folder = tmp_path_factory.mktemp("canaries")
    with ground(folder) as place:
        (place.project / ".env").write_text("".join(f"{k}='{v}'\n" for k, v in FILE.items()))
        (place.project / "study").mkdir()
        (place.project / "study" / "investigation.toml").write_text(
            f"[sandbox]\nsecrets = {json.dumps(list(NAMED))}\n"
        )
        with raw_server(place, "--log-level", "debug", env=ENVIRONMENT) as server:
            answers: list[str] = []

            def call(tool: str, /, **arguments: Any) -> dict[str, Any]:
                result = server.call(tool, **arguments)
                answers.append(raw_text(result))
                return result

            started = call("start_sandbox", investigation=str(place.project / "study"))
            assert not started.get("isError"), answers
            sandbox = started["_meta"]["seer/sandbox"]["handle"]
            notebook = Path(started["_meta"]["seer/sandbox"]["notebook"])
            for source in (PRINTS, SHOWS, FAILS, LONG):
                call("create_cell", sandbox=sandbox, source=source)
            call("run_command", sandbox=sandbox, command="env; env | base64 -w0; env >&2")
            call("run_command", sandbox=sandbox, command="env > kept.txt")
            call("read_file", sandbox=sandbox, path="kept.txt")
            names = 'open("names.json", "w").write(json.dumps(sorted(os.environ)))'
            call("create_cell", sandbox=sandbox, source=names)
            told = call("read_file", sandbox=sandbox, path="names.json")
            kernel = dict.fromkeys(json.loads(raw_text(told)[raw_text(told).index('["') :]), "")
            for name, value in CANARIES.items():
                call("create_cell", sandbox=sandbox, source=f"key = {value!r}  # {name}")
                call("write_file", sandbox=sandbox, path="x.txt", content=f"{name}={value}")
            for tool in ("read_notebook", "list_files"):
                call(tool, sandbox=sandbox)
            cells = json.loads(notebook.read_text())["cells"]
            for cell in cells:
                call("read_outputs", sandbox=sandbox, cell=cell["id"])
            call("list_sandboxes")
            call("create_cell", sandbox=sandbox, source=DIES)
            for uri in ("notebook", f"cells/{cells[0]['id']}"):
                read = server.answer(
                    server.send("resources/read", uri=f"seer://sandboxes/{sandbox}/{uri}")
                )
                answers.append(json.dumps(read["result"]))
            running = files_under(place.folder / "state")
            modes = {p: stat.S_IMODE(p.stat().st_mode) for p in running}
            assert {modes[p] for p, data in running.items() if hits(data)} <= {0o600}
            call("stop_sandbox", sandbox=sandbox)
            lines = b"".join(server.lines).decode()
            server.process.stdin.close()  # type: ignore[union-attr]
            server.ended_in(20)
        yield Leak(place, [*answers, lines], kernel, notebook, running)


def test_s01_no_answer_holds_a_secret(leak: Leak) -> None:
    assert [found for answer in leak.answers if (found := hits(answer.encode()))] == []
    # It is the redactor that kept them out: the code did print them.
    told = "\n".join(leak.answers)
    for name in NAMED:
        assert told.count(f"[secret {name}]") > 10


def test_s01_a_value_in_a_calls_arguments_is_refused(leak: Leak) -> None:
    refused = [a for a in leak.answers if "must not get into a notebook or file" in a]
    assert len(refused) == 2 * len(CANARIES) + 1  # and once in all lines together
    assert "key = " not in leak.notebook.read_text()


def test_s02_notebook_and_files_of_the_project_hold_none(leak: Leak) -> None:
    own = {leak.place.project / ".env", leak.notebook.parent / "kept.txt"}  # the user's, the code's
    kept = files_under(leak.place.project)
    assert leak.notebook in kept and own <= kept.keys()
    assert [p.name for p, data in kept.items() if p not in own and hits(data)] == []
    text = leak.notebook.read_text()
    assert text.count("[secret ") > 20
    spilled = [p for p in kept if p.parent.name.endswith(".outputs")]
    assert spilled and all(b"[secret ANTHROPIC_API_KEY]" in kept[p] for p in spilled)


def test_s02_logs_audit_and_stderr_hold_none(leak: Leak) -> None:
    state = leak.place.folder / "state"
    logs = {**files_under(state / "logs"), **{p: p.read_bytes() for p in state.glob("*.jsonl")}}
    logs[leak.place.folder / "server.log"] = (leak.place.folder / "server.log").read_bytes()
    assert len(logs) >= 3 and all(logs.values())
    assert [p.name for p, data in logs.items() if hits(data)] == []


def test_s02_state_holds_them_only_as_output_of_code_and_only_while_the_sandbox_lives(
    leak: Leak,
) -> None:
    assert {p.name for p, data in leak.while_it_ran.items() if hits(data)} <= OUTPUT_OF_CODE
    after = files_under(leak.place.folder / "state")
    assert [p.name for p, data in after.items() if hits(data)] == []
    assert [p for p in leak.place.sockets.rglob("*") if p.is_file() and hits(p.read_bytes())] == []


def test_s04_the_kernel_has_only_listed_names_and_the_named_secrets(leak: Leak) -> None:
    names = set(leak.kernel_environment)
    assert set(NAMED) <= names
    assert names - PASSED - set(NAMED) <= OWN | IPYKERNEL | KERNEL
    assert not {n for n in names if n.startswith(("MODAL_", "MCP_", "HF_TOKEN"))}


@pytest.mark.anyio
async def test_s01_the_servers_own_token_is_shown_to_nobody(place: Ground) -> None:
    async with http_server(place.config()) as server, server.lab() as lab:
        sandbox = await lab.start(name="token")
        encoded = base64.b64encode(TOKEN.encode()).decode()
        code = f"t = {TOKEN[::-1]!r}[::-1]; import base64; print(t, base64.b64encode(t.encode()).decode())"
        told = await lab.cell(sandbox, code)
        text = json.dumps(told.model_dump(mode="json"))
        assert "[secret MCP_TOKEN]" in text and TOKEN not in text and encoded not in text
        notebook = (await lab.notebook_path(sandbox)).read_text()
        assert "[secret MCP_TOKEN]" in notebook and TOKEN not in notebook
        assert "arguments hold the value of MCP_TOKEN" in await lab.no(
            "create_cell", sandbox=sandbox, source=f"print({TOKEN!r})"
        )


def test_the_canaries_are_not_in_our_own_environment() -> None:
    """Else a test above could pass because this process hands them on."""
    assert not set(CANARIES) & set(os.environ)
