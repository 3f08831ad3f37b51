"""The files in docs/deploy say what the server understands."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import modal
import pytest
import yaml

from seer_mcp.cli import parser
from seer_mcp.http import Serving, TokenFile
from seer_mcp.money import parse_allowance

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "docs" / "deploy"


def of_the_unit() -> list[str]:
    found = re.search(r"^ExecStart=(.*)$", (DEPLOY / "seer-mcp.service").read_text(), re.M)
    assert found is not None
    return shlex.split(found[1])[1:]


def of_compose() -> list[str]:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    command = [word.replace("$$", "$") for word in services["seer"]["command"]]
    return [word.replace("${SEER_HOST}", "seer.example.org") for word in command]


def of_modal() -> list[str]:
    made = runpy.run_path(str(DEPLOY / "modal_app.py"))
    assert isinstance(made["app"], modal.App) and isinstance(made["serve"], modal.Function)
    return [*made["FLAGS"], "--public-url", "https://lab--seer-mcp-serve.modal.run"]


@pytest.mark.parametrize("words", [of_the_unit, of_compose, of_modal])
def test_the_server_would_start_with_these_flags(words: Any, tmp_path: Path) -> None:
    flags = parser().parse_args(words())
    assert flags.command == "serve" and flags.users == ""
    served = Serving(  # refuses what would be open or cross the network in clear
        flags.host,
        flags.port,
        users=TokenFile(tmp_path / "tokens.json"),
        public_url=flags.public_url,
        behind_proxy=flags.behind_proxy,
    )
    assert served.port == 8757 and served.names[0] == flags.public_url.split("//")[1]
    assert all(parse_allowance(amount) for amount in flags.owner_budget)
    assert flags.team_backend == []  # a container has no kernels


def test_the_container_and_the_compose_file_agree() -> None:
    container = (DEPLOY / "Containerfile").read_text()
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(compose["volumes"]) == {"data", "caddy"}
    seer = compose["services"]["seer"]
    assert (DEPLOY / seer["build"]["context"]).resolve() == ROOT
    assert (ROOT / seer["build"]["dockerfile"]).is_file()
    assert seer["expose"] == ["8757"] and "EXPOSE 8757" in container
    copied = re.findall(r"^COPY (.*) \S+$", container, re.M)
    assert [name for name in " ".join(copied).split() if not (ROOT / name).exists()] == []
    for name in re.findall(r"SEER_MCP_\w+", container):
        assert name in (ROOT / "seer_mcp" / "config.py").read_text(), name


def test_the_proxies_pass_the_name_and_the_port() -> None:
    nginx, caddy = (DEPLOY / "nginx.conf").read_text(), (DEPLOY / "Caddyfile").read_text()
    assert "127.0.0.1:8757" in nginx and "127.0.0.1:8757" in caddy
    assert "proxy_set_header Host $host;" in nginx and "proxy_buffering off;" in nginx
    assert nginx.count("{") == nginx.count("}") and caddy.count("{") == caddy.count("}")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "seer-mcp.service").read_text()
    here = tmp_path / "seer-mcp.service"  # its program is not installed here
    here.write_text(text.replace("/opt/seer-mcp/.venv/bin/seer-mcp", shutil.which("true") or ""))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(here)], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if "seer-mcp" in line]
    assert ours == [], done.stderr


def test_every_file_of_the_folder_is_on_its_page() -> None:
    page = (DEPLOY / "README.md").read_text()
    files = {path.name for path in DEPLOY.iterdir() if path.is_file()} - {"README.md"}
    linked = set(re.findall(r"\]\(([\w.-]+)\)", page))
    assert files == linked
