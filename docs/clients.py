"""Writes what clients are added by, from the code: uv run python docs/clients.py

The bundle of Claude Desktop (.clients/desktop), the plugin of Claude Code (.clients/claude-code, listed in
.claude-plugin), and the entry of the MCP registry (.clients/registry). A test fails when a file differs from
what this would write; .ci/bundles validates and packs them.
"""

from __future__ import annotations

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from tables import all_tools, first_sentence

from seer_mcp.environment import Investigations

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWNER = "seer-mcp"
REGISTERED = f"io.github.{OWNER}/seer-mcp"
SOURCE = f"https://github.com/{OWNER}/seer-mcp"
AUTHORS = {"name": "The seer-mcp authors"}
SETTINGS = {
    "outputs": (
        "SEER_MCP_OUTPUTS",
        {
            "type": "directory",
            "title": "Notebooks",
            "description": "Where the notebooks of investigations are saved",
            "default": "${HOME}/seer-notebooks",
        },
    ),
    "python": (
        "SEER_MCP_PYTHON",
        {
            "type": "string",
            "title": "Python of local sandboxes",
            "description": "An interpreter with ipykernel and torch; without one only Modal and ssh sandboxes start",
            "default": "",
        },
    ),
    "budget": (
        "SEER_MCP_BUDGET",
        {
            "type": "string",
            "title": "Budget",
            "description": "What all sandboxes at Modal together may cost",
            "default": "$20 a day",
        },
    ),
    "modal_token_id": (
        "MODAL_TOKEN_ID",
        {
            "type": "string",
            "title": "Modal token id",
            "description": "For GPU sandboxes at Modal; leave it empty if `modal token new` was run here",
            "sensitive": True,
            "default": "",
        },
    ),
    "modal_token_secret": (
        "MODAL_TOKEN_SECRET",
        {
            "type": "string",
            "title": "Modal token secret",
            "description": "The other half of it",
            "sensitive": True,
            "default": "",
        },
    ),
}


def manifest() -> dict[str, Any]:
    """The bundle of Claude Desktop: the server alone, whose packages uv installs when it is added."""
    return {
        "manifest_version": "0.4",
        "name": PROJECT["name"],
        "display_name": "seer",
        "version": PROJECT["version"],
        "description": PROJECT["description"],
        "author": AUTHORS,
        "repository": {"type": "git", "url": SOURCE},
        "license": PROJECT["license"],
        "keywords": PROJECT["keywords"],
        "server": {
            "type": "uv",
            "entry_point": "seer_mcp/cli.py",
            "mcp_config": {
                "command": "uv",
                "args": ["run", "--no-dev", "--frozen", "--directory", "${__dirname}", "seer-mcp"],
                "env": {
                    variable: f"${{user_config.{key}}}" for key, (variable, _) in SETTINGS.items()
                },
            },
        },
        "tools": [{"name": tool.name, "description": first_sentence(tool)} for tool in all_tools()],
        "prompts_generated": True,
        "compatibility": {
            "platforms": ["darwin", "linux"],
            "runtimes": {"python": PROJECT["requires-python"]},
        },
        "user_config": {key: setting for key, (_, setting) in SETTINGS.items()},
    }


def registry() -> dict[str, Any]:
    variables = [
        {
            "name": variable,
            "description": setting["description"],
            "isRequired": False,
            "isSecret": setting.get("sensitive", False),
        }
        for variable, setting in SETTINGS.values()
    ]
    return {
        "$schema": "https://static.modelcontextprotocol.io/schemas/2025-12-11/server.schema.json",
        "name": REGISTERED,
        "title": "seer",
        "description": PROJECT["description"],
        "repository": {"url": SOURCE, "source": "github"},
        "version": PROJECT["version"],
        "packages": [
            {
                "registryType": "pypi",
                "identifier": PROJECT["name"],
                "version": PROJECT["version"],
                "runtimeHint": "uvx",
                "transport": {"type": "stdio"},
                "environmentVariables": variables,
            }
        ],
    }


def marketplace() -> dict[str, Any]:
    plugin = {
        "name": "seer",
        "source": "./.clients/claude-code",
        "description": PROJECT["description"],
    }
    return {
        "name": PROJECT["name"],
        "owner": AUTHORS,
        "metadata": {"description": "seer-mcp for Claude Code"},
        "plugins": [plugin],
    }


def plugin() -> dict[str, Any]:
    return {
        "name": "seer",
        "version": PROJECT["version"],
        "description": PROJECT["description"],
        "author": AUTHORS,
        "license": PROJECT["license"],
    }


def servers() -> dict[str, Any]:
    package = f"{PROJECT['name']}[local]=={PROJECT['version']}"
    return {"mcpServers": {"seer": {"command": "uvx", "args": ["--from", package, "seer-mcp"]}}}


def commands() -> dict[str, str]:
    """A command for each shipped investigation, by file name."""
    made: dict[str, str] = {}
    for each in Investigations([]).read().found:
        configurations = f" [{'|'.join(each.variants)}]" if each.variants else ""
        head = [f"description: {json.dumps(each.title)}"]
        if each.variants:
            head.append(f"argument-hint: {json.dumps(configurations.strip())}")
        name = f"{each.name}/ARGUMENT" if each.variants else each.name
        begin = f'Begin with start_sandbox(investigation="{each.name}")'
        if each.variants:
            begin += f' (if the argument "$ARGUMENTS" is not empty: "{name}" with it for ARGUMENT)'
        made[f"{each.name}.md"] = "\n".join(
            [
                "---",
                *head,
                "---",
                "",
                f"{begin}. It starts the machine, loads the models and begins the notebook, and its answer says "
                "what to find out. Read the resource seer://methodology first, work in cells, and end with "
                "submit_findings.",
                "",
                each.task.strip(),
                "",
            ]
        )
    return made


def files() -> dict[Path, str]:
    """All files, with what stands in them."""
    here = ROOT / ".clients"
    documents = {
        here / "desktop" / "manifest.json": manifest(),
        here / "registry" / "server.json": registry(),
        here / "claude-code" / ".claude-plugin" / "plugin.json": plugin(),
        here / "claude-code" / ".mcp.json": servers(),
        ROOT / ".claude-plugin" / "marketplace.json": marketplace(),
    }
    texts = {path: json.dumps(value, indent=2) + "\n" for path, value in documents.items()}
    folder = here / "claude-code" / "commands"
    return texts | {folder / name: text for name, text in commands().items()}


def main() -> None:
    made = files()
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for stale in set((ROOT / ".clients").glob("claude-code/commands/*.md")) - made.keys():
        stale.unlink()


if __name__ == "__main__":
    main()
