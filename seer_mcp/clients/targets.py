"""Each client: the file with its servers, the key they stand under, and how one of them is written."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import BadInput

Scope = Literal["user", "project"]
Entry = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """What a client's files lie relative to."""

    home: Path
    project: Path
    environ: Mapping[str, str]
    platform: str = sys.platform

    def settings(self) -> Path:
        """Where programs with a window keep their settings."""
        if self.platform == "darwin":
            return self.home / "Library" / "Application Support"
        return Path(self.environ.get("XDG_CONFIG_HOME") or self.home / ".config")


@dataclass(frozen=True)
class Server:
    """What is added: a command of this machine, or an endpoint whose token is in a variable."""

    command: str = ""
    args: tuple[str, ...] = ()
    url: str = ""
    token_env: str = ""


@dataclass(frozen=True)
class Client:
    name: str
    title: str
    key: str
    """The key that the servers stand under, in the file."""
    after: str
    """What its user does next."""

    @property
    def toml(self) -> bool:
        return self.name == "codex"

    def path(self, place: Place, scope: Scope) -> Path:
        """Raises BadInput where the client has no such file."""
        home, project = place.home, place.project
        settings = place.settings()
        claude = place.environ.get("CLAUDE_CONFIG_DIR")
        codex = place.environ.get("CODEX_HOME")
        paths: dict[tuple[str, Scope], Path] = {
            ("claude-code", "user"): (Path(claude) if claude else home) / ".claude.json",
            ("claude-code", "project"): project / ".mcp.json",
            ("claude-desktop", "user"): settings / "Claude" / "claude_desktop_config.json",
            ("cursor", "user"): home / ".cursor" / "mcp.json",
            ("cursor", "project"): project / ".cursor" / "mcp.json",
            ("vscode", "user"): settings / "Code" / "User" / "mcp.json",
            ("vscode", "project"): project / ".vscode" / "mcp.json",
            ("codex", "user"): (Path(codex) if codex else home / ".codex") / "config.toml",
            ("codex", "project"): project / ".codex" / "config.toml",
        }
        found = paths.get((self.name, scope))
        if found is None:
            raise BadInput("scope", scope, f"{self.title} has settings of the user only")
        return found

    def entry(self, server: Server) -> Entry:
        """How this client writes a server. Raises BadInput where it cannot have one of that kind."""
        if not server.url:
            made: Entry = {"command": server.command, "args": list(server.args)}
            return {"type": "stdio", **made} if self.name in ("claude-code", "vscode") else made
        if self.name == "claude-desktop":
            raise BadInput(
                "url",
                server.url,
                "Claude Desktop takes no endpoint from its file: add it under Settings, Connectors",
            )
        if self.toml:
            return {"url": server.url, "bearer_token_env_var": server.token_env}
        variable = {
            "claude-code": f"${{{server.token_env}}}",
            "cursor": f"${{env:{server.token_env}}}",
            "vscode": f"${{env:{server.token_env}}}",
        }[self.name]
        headers = {"Authorization": f"Bearer {variable}"}
        remote: Entry = {"url": server.url, "headers": headers}
        return remote if self.name == "cursor" else {"type": "http", **remote}


CLIENTS = {
    client.name: client
    for client in (
        Client("claude-code", "Claude Code", "mcpServers", "start it, and ask for /mcp"),
        Client("claude-desktop", "Claude Desktop", "mcpServers", "quit it and start it again"),
        Client("cursor", "Cursor", "mcpServers", "switch it on under Settings, MCP"),
        Client("vscode", "VS Code", "servers", "start it with the command MCP: List Servers"),
        Client("codex", "Codex", "mcp_servers", "start it, and ask for /mcp"),
    )
}
