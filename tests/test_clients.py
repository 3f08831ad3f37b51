"""`seer-mcp install`: into the settings of each client, which are kept and never spoiled."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from seer_mcp.cli import main
from seer_mcp.clients.targets import CLIENTS, Place, Server

FILES = {
    "claude-code": ".claude.json",
    "claude-desktop": ".config/Claude/claude_desktop_config.json",
    "cursor": ".cursor/mcp.json",
    "vscode": ".config/Code/User/mcp.json",
    "codex": ".codex/config.toml",
}
COMMAND = str(Path(sys.prefix) / "bin" / "seer-mcp")


Install = Callable[..., "Done"]


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Install:
    """The command line, for somebody whose home and project `tmp_path` is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("CLAUDE_CONFIG_DIR", "CODEX_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Done:
        status = main(["install", *arguments])
        said = capsys.readouterr()
        return Done(status, said.out, said.err)

    return run


def servers_of(home: Path, client: str) -> dict[str, dict]:
    text = (home / FILES[client]).read_text()
    return (tomllib.loads(text) if client == "codex" else json.loads(text))[CLIENTS[client].key]


@pytest.mark.parametrize("client", CLIENTS)
def test_each_client_gets_a_command_that_serves(
    tmp_path: Path, install: Install, client: str
) -> None:
    shown = install(client, "--print")
    assert shown.returncode == 0 and not (tmp_path / FILES[client]).exists()
    done = install(client)
    assert done.returncode == 0, done.stderr
    path = tmp_path / FILES[client]
    assert shown.stdout == f"# {path}\n{path.read_text()}"  # what is shown is what is written
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    entry = servers_of(tmp_path, client)["seer"]
    assert entry["command"] == COMMAND
    assert (client == "claude-desktop") == ("--outputs" in entry["args"])
    hello = json.dumps(
        {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "initialize",
            "params": {
                "protocolVersion": "2025-11-25",
                "capabilities": {},
                "clientInfo": {"name": client, "version": "1"},
            },
        }
    )
    served = subprocess.run(
        [entry["command"], *entry["args"], "--state", str(tmp_path / "state")],
        input=hello + "\n",
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        timeout=60,
    )
    assert json.loads(served.stdout.splitlines()[0])["result"]["serverInfo"]["name"] == "seer-mcp"


@pytest.mark.parametrize("client", CLIENTS)
def test_what_was_there_stays_and_is_kept_in_a_copy(
    tmp_path: Path, install: Install, client: str
) -> None:
    path = tmp_path / FILES[client]
    path.parent.mkdir(parents=True, exist_ok=True)
    key = CLIENTS[client].key
    other = {"command": "other", "env": {"KEY": "canary-5c1"}}
    before = (
        f'# mine, ä\nmodel = "m"\n\n[{key}.other]\ncommand = "other"\nenv = {{ KEY = "canary-5c1" }}\n'
        if client == "codex"
        else json.dumps({"theme": "ä", key: {"other": other}})
    )
    path.write_text(before)
    path.chmod(0o640)
    done = install(client)
    assert done.returncode == 0, done.stderr
    assert "canary" not in done.stdout + done.stderr
    assert servers_of(tmp_path, client)["other"] == other
    assert "ä" in path.read_text() and ("# mine" in path.read_text()) == (client == "codex")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    (kept,) = path.parent.glob(f"{path.name}.before-seer-mcp-*")
    assert kept.read_text() == before and stat.S_IMODE(kept.stat().st_mode) == 0o640
    again = install(client)
    assert again.returncode == 0 and "has it already" in again.stdout
    assert len(list(path.parent.glob(f"{path.name}.before-*"))) == 1


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("broken", ["{ broken", "[1]", '{"%s": 3}', "\udcff"])
def test_a_file_that_cannot_be_read_whole_is_left(
    tmp_path: Path, install: Install, client: str, broken: str
) -> None:
    path = tmp_path / FILES[client]
    path.parent.mkdir(parents=True, exist_ok=True)
    key = CLIENTS[client].key
    text = broken.replace("%s", key)
    if client == "codex":
        text = f"{key} = 3\n" if "%s" in broken else "= broken" if broken != "\udcff" else broken
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = path.read_bytes()
    done = install(client)
    assert done.returncode == 2 and "--print" in done.stderr
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1
    assert install(client, "--print").returncode == 0


def test_another_server_of_that_name_is_not_replaced_unasked(
    tmp_path: Path, install: Install
) -> None:
    path = tmp_path / FILES["cursor"]
    path.parent.mkdir()
    path.write_text('{"mcpServers": {"seer": {"command": "weather"}}}')
    done = install("cursor")
    assert done.returncode == 2 and "--replace" in done.stderr
    assert install("cursor", "--name", "seer-2").returncode == 0
    assert install("cursor", "--replace").returncode == 0
    servers = servers_of(tmp_path, "cursor")
    assert servers["seer"] == servers["seer-2"]
    # an earlier one of ours is simply renewed
    assert install("cursor", "--outputs", "here").returncode == 0
    assert servers_of(tmp_path, "cursor")["seer"]["args"] == ["--outputs", str(tmp_path / "here")]


def test_a_link_into_somebodys_dotfiles_stays_a_link(tmp_path: Path, install: Install) -> None:
    (tmp_path / "dotfiles").mkdir()
    real = tmp_path / "dotfiles" / "claude.json"
    real.write_text("{}")
    (tmp_path / ".claude.json").symlink_to(real)
    assert install("claude-code").returncode == 0
    assert (tmp_path / ".claude.json").is_symlink() and "seer" in real.read_text()


@pytest.mark.parametrize("client", sorted(set(CLIENTS) - {"claude-desktop"}))
def test_the_settings_of_a_project(tmp_path: Path, install: Install, client: str) -> None:
    done = install(client, "--project")
    assert done.returncode == 0, done.stderr
    path = CLIENTS[client].path(Place(tmp_path / "h", tmp_path, {}), "project")
    assert "seer" in path.read_text() and not (tmp_path / ".claude.json").exists()


def test_an_endpoint_is_written_without_its_token(tmp_path: Path, install: Install) -> None:
    url = "https://lab.example/mcp"
    server = Server(url=url, token_env="LAB_TOKEN")
    made = {name: CLIENTS[name].entry(server) for name in CLIENTS if name != "claude-desktop"}
    assert made["claude-code"]["headers"] == {"Authorization": "Bearer ${LAB_TOKEN}"}
    assert made["cursor"]["headers"] == {"Authorization": "Bearer ${env:LAB_TOKEN}"}
    assert made["codex"] == {"url": url, "bearer_token_env_var": "LAB_TOKEN"}
    assert all(entry["url"] == url for entry in made.values())
    done = install("codex", "--url", url, "--token-env", "LAB_TOKEN")
    assert done.returncode == 0 and "LAB_TOKEN" in done.stdout
    assert servers_of(tmp_path, "codex")["seer"] == made["codex"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["emacs"], "known are claude-code"),
        (["claude-desktop", "--url", "https://lab.example/mcp"], "Connectors"),
        (["claude-desktop", "--project"], "of the user only"),
        (["cursor", "--url", "lab"], "https://HOST/mcp"),
        (["cursor", "--url", "https://me:pw@lab.example/mcp"], "no name, password or token"),
        (["cursor", "--name", "a.b"], "letters, digits"),
    ],
)
def test_what_makes_no_sense_is_refused(
    tmp_path: Path, install: Install, arguments: list[str], said: str
) -> None:
    done = install(*arguments)
    assert done.returncode == 2 and said in done.stderr and "pw" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_on_a_mac_the_settings_of_windows_lie_elsewhere() -> None:
    place = Place(Path("/h"), Path("/p"), {}, "darwin")
    at = CLIENTS["claude-desktop"].path(place, "user")
    assert at == Path("/h/Library/Application Support/Claude/claude_desktop_config.json")
