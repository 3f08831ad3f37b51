"""`seer-mcp install CLIENT`: write the server into a client's settings."""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from ..errors import BadInput
from .documents import fragment, put
from .targets import CLIENTS, Client, Place, Server

DESKTOP_NOTEBOOKS = "seer-notebooks"
TOKEN_ENV = "SEER_MCP_TOKEN"


def add_install(commands: Any) -> None:
    install = commands.add_parser(
        "install",
        help="add this server to a client's settings",
        description="Add this server to a client's settings. What is in them stays, and is kept in a copy beside them.",
    )
    install.add_argument("client", metavar="CLIENT", help=", ".join(CLIENTS))
    install.add_argument(
        "--print", action="store_true", dest="show", help="show what would be written, and where"
    )
    install.add_argument("--name", default="seer", help="what the client calls it (default: seer)")
    install.add_argument(
        "--project",
        action="store_true",
        help="into the settings of this folder, not into the user's",
    )
    install.add_argument(
        "--url", default="", help="of a team's endpoint (https://…/mcp); without it: this machine"
    )
    install.add_argument(
        "--token-env",
        default=TOKEN_ENV,
        metavar="NAME",
        help=f"the variable with the token of that endpoint (default: {TOKEN_ENV})",
    )
    install.add_argument(
        "--outputs",
        metavar="DIR",
        help="where notebooks are saved (default: the client's project; for Claude Desktop "
        f"~/{DESKTOP_NOTEBOOKS})",
    )
    install.add_argument(
        "--replace", action="store_true", help="even if the name is another server's"
    )


def own_command() -> tuple[str, tuple[str, ...]]:
    """How a client starts this installation: by absolute paths, which no PATH of a client's changes."""
    script = Path(sys.prefix) / "bin" / "seer-mcp"
    if "archive-v0" in Path(sys.prefix).parts:  # uvx: this environment may be gone tomorrow
        uvx = shutil.which("uvx")
        if uvx is None:
            raise BadInput(
                "command", "uvx", "it is not in PATH, so no client could start this again"
            )
        extra = "[local]" if importlib.util.find_spec("ipykernel") else ""
        return uvx, (f"seer-mcp{extra}=={__version__}",)
    if script.exists():
        return str(script), ()
    return sys.executable, ("-m", "seer_mcp.cli")


def server_of(flags: argparse.Namespace, client: Client, place: Place) -> Server:
    """What the command line asks for. Raises BadInput."""
    if flags.url:
        parts = urlsplit(flags.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput("url", flags.url, "write the whole of it: https://HOST/mcp")
        if parts.username or parts.password or parts.query:
            raise BadInput("url", parts.hostname, "write no name, password or token into it")
        if flags.outputs:
            raise BadInput("outputs", flags.outputs, "an endpoint keeps its notebooks itself")
        return Server(url=flags.url, token_env=flags.token_env)
    command, args = own_command()
    outputs = flags.outputs
    if not outputs and client.name == "claude-desktop":
        outputs = str(place.home / DESKTOP_NOTEBOOKS)
    if outputs:
        args = (*args, "--outputs", str(Path(outputs).expanduser().absolute()))
    return Server(command, args)


def run_install(flags: argparse.Namespace, environ: Mapping[str, str]) -> int:
    """Do what the command line says; the exit status. Raises BadInput."""
    place = Place(Path.home(), Path.cwd(), environ)
    client = CLIENTS.get(flags.client)
    if client is None:
        raise BadInput("client", flags.client, f"known are {', '.join(CLIENTS)}")
    if not flags.name.replace("-", "").replace("_", "").isalnum():
        raise BadInput("name", flags.name, "use letters, digits, '-' and '_'")
    path = client.path(place, "project" if flags.project else "user")
    entry = client.entry(server_of(flags, client, place))
    if flags.show:
        print(f"# {path}")
        print(fragment(client.key, flags.name, entry, client.toml), end="")
        return 0
    done = put(path, client.key, flags.name, entry, client.toml, flags.replace)
    if not done.changed:
        print(f"{client.title} has it already: {done.path}")
        return 0
    kept = f" (as it was: {done.backup})" if done.backup else ""
    print(f"added to {client.title}: {done.path}{kept}\nNow {client.after}.")
    if flags.url:
        print(f"Its token is read from the variable {flags.token_env} when the client starts.")
    return 0
