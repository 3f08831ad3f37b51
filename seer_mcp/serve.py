"""The commands `seer-mcp serve`, `seer-mcp token` and `seer-mcp watch`."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .config import Config
from .environment import read_scope
from .errors import BadInput
from .flags import above_one, above_zero, port, uids
from .money import parse_allowance
from .sessions import make_folders

TOKENS = "tokens.json"


def add_scope(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--scope",
        metavar="FILE",
        help="offer only the functions that this Python file exposes (docs/scoped.md), or that a configuration names "
        "as its interface",
    )


def add_serve(commands: Any, common: argparse.ArgumentParser) -> None:
    serve = commands.add_parser(
        "serve", parents=[common], help="serve over HTTP: for yourself on loopback, or for a team"
    )
    add_scope(serve)
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=port, default=8757)
    serve.add_argument(
        "--token-file",
        metavar="FILE",
        help="the file that holds the one token (default: one that is made and kept)",
    )
    serve.add_argument(
        "--users",
        nargs="?",
        const="",
        metavar="FILE",
        help="serve a team: let the tokens in that `seer-mcp token create` made (default: in the state folder)",
    )
    serve.add_argument(
        "--oidc-issuer", metavar="URL", help="serve a team: accept access tokens of this issuer"
    )
    serve.add_argument(
        "--oidc-audience",
        metavar="NAME",
        help="the audience that they must be for (default: the address of the endpoint)",
    )
    serve.add_argument(
        "--oidc-owner-claim",
        metavar="CLAIM",
        default="sub",
        help="the claim that tells whose token it is (default: sub)",
    )
    serve.add_argument(
        "--public-url", metavar="URL", default="", help="what clients call this server"
    )
    serve.add_argument("--tls-cert", metavar="FILE", help="certificate chain (PEM)")
    serve.add_argument("--tls-key", metavar="FILE", help="its key (PEM)")
    serve.add_argument(
        "--behind-proxy", action="store_true", help="a proxy in front of this server ends TLS"
    )
    serve.add_argument(
        "--calls-a-minute",
        type=above_one,
        default=600,
        metavar="N",
        help="requests that one owner may make in a minute, and as many of the pages (default: 600)",
    )
    serve.add_argument(
        "--team-backend",
        action="append",
        default=[],
        choices=("local", "modal", "ssh"),
        help="where a team's sandboxes may run (default: modal). local: their kernels run as the server's user and can "
        "read each other's files, unless --owner-uids is given; ssh: with the server's keys",
    )
    serve.add_argument(
        "--owner-uids",
        type=uids,
        default=range(0),
        metavar="FIRST-LAST",
        help="let local sandboxes run, those of each person as a user of their own from this range, in which nobody "
        "else is (as root on Linux)",
    )
    serve.add_argument(
        "--team-secret",
        action="append",
        default=[],
        metavar="NAME",
        help="a secret of the server that everybody's sandboxes may have",
    )
    serve.add_argument(
        "--owner-budget",
        action="append",
        default=[],
        metavar="AMOUNT",
        help="what the sandboxes of each person may cost: '$20 a day'; may be given twice",
    )
    serve.add_argument(
        "--owner-sandboxes",
        type=above_one,
        default=20,
        metavar="N",
        help="how many sandboxes each person may have at once (default: 20)",
    )
    token = commands.add_parser("token", parents=[common], help="the tokens of a team")
    token.add_argument(
        "--users", metavar="FILE", help="the file of tokens (default: in the state folder)"
    )
    does = token.add_subparsers(dest="does", metavar="create|list|revoke", required=True)
    create = does.add_parser("create", help="make a token and print it, once")
    create.add_argument("user")
    create.add_argument(
        "--scope",
        action="append",
        default=[],
        metavar="SCOPE",
        help="what it is for (default: sandboxes:read, sandboxes:write and code:run)",
    )
    create.add_argument(
        "--days", type=above_zero, default=90.0, metavar="N", help="how long it holds (default: 90)"
    )
    listing = does.add_parser("list", help="show the tokens, never their secrets")
    listing.add_argument("--json", action="store_true")
    revoke = does.add_parser(
        "revoke", help="end a token, or all of a user's; a running server obeys"
    )
    revoke.add_argument("which", metavar="ID|USER")


def add_watch(commands: Any, common: argparse.ArgumentParser) -> None:
    watch = commands.add_parser(
        "watch",
        parents=[common],
        help="see in the browser what runs on this machine: each sandbox with its notebook, as it grows",
    )
    watch.add_argument(
        "--port", type=port, metavar="N", help="a port of your choice (default: any that is free)"
    )
    watch.add_argument(
        "--no-browser", action="store_true", help="only print the address, which opens once"
    )


def run_serve(flags: argparse.Namespace, config: Config) -> int:
    from .backends.owners import refuse_unable, shown
    from .http import Serving, TokenFile, kept_token, serve_http
    from .http.oidc import Issuer
    from .http.serving import LOOPBACK

    scope = None if flags.scope is None else read_scope(Path(flags.scope))
    if (flags.tls_cert is None) != (flags.tls_key is None):
        raise BadInput("tls-cert", flags.tls_cert, "--tls-cert and --tls-key belong together")
    tls = (Path(flags.tls_cert), Path(flags.tls_key)) if flags.tls_cert else None
    users = None if flags.users is None else TokenFile(tokens_file(flags.users, config))
    address = (
        flags.public_url.rstrip("/") or f"http{'s' if tls else ''}://{flags.host}:{flags.port}"
    )
    issuer = None
    if flags.oidc_issuer:
        audience = flags.oidc_audience or f"{address}/mcp"
        issuer = Issuer(flags.oidc_issuer, audience, flags.oidc_owner_claim)
    path = None
    if users is None and issuer is None:
        if flags.host not in LOOPBACK:
            Serving(flags.host, flags.port, token="-" * 20)  # refused, before a token is made
        name = "http-token" if scope is None else "scope-token"  # who has one has not the other
        path = Path(flags.token_file) if flags.token_file else kept_token(config.state_dir, name)
    serving = Serving(
        host=flags.host,
        port=flags.port,
        token=path.read_text() if path else "",
        users=users,
        issuer=issuer,
        public_url=flags.public_url,
        tls=tls,
        behind_proxy=flags.behind_proxy,
        calls_a_minute=flags.calls_a_minute,
        scope=scope,
    )
    if flags.owner_uids:
        if not serving.team or scope is not None:
            why = "it separates the people of a team: give --users or --oidc-issuer, and no --scope"
            raise BadInput("owner-uids", shown(flags.owner_uids), why)
        refuse_unable(flags.owner_uids, config.python)
    if serving.team and scope is None:
        backends = tuple(flags.team_backend) or config.team_backends
        config = replace(
            config,
            team=True,
            team_backends=tuple({*backends, "local"}) if flags.owner_uids else backends,
            owner_uids=flags.owner_uids,
            team_secrets=tuple(flags.team_secret),
            owner_allowances=tuple(map(parse_allowance, flags.owner_budget)),
            owner_sandboxes=flags.owner_sandboxes,
        )
    who = f"the bearer token is in {path}" if path else "each person needs a token"
    if users is not None and not users.tokens():
        who = "nobody has a token yet: seer-mcp token create NAME makes one"
    make_folders(config)
    if scope is not None and scope.interface is not None:
        who += f"; it offers {', '.join(scope.interface.functions)} and nothing else"
    print(f"seer-mcp on {serving.resource}; {who}", file=sys.stderr)
    asyncio.run(serve_http(config, serving))
    return 0


def tokens_file(given: str | None, config: Config) -> Path:
    return Path(given).absolute() if given else config.state_dir / TOKENS


def run_token(flags: argparse.Namespace, config: Config) -> int:
    from .http.tokens import SCOPES, Token, TokenFile

    kept = TokenFile(tokens_file(flags.users, config))
    if flags.does == "create":
        scopes: Sequence[str] = flags.scope or SCOPES[:3]
        secret, token = kept.create(flags.user, scopes, flags.days)
        print(
            f"{token.user}'s token {token.id} for {', '.join(token.scopes)}, until {day(token.expires)}. It is shown "
            "this once and kept nowhere:",
            file=sys.stderr,
        )
        print(secret)
        return 0
    if flags.does == "revoke":
        for token in kept.revoke(flags.which):
            print(f"{token.id} of {token.user} is revoked")
        return 0

    def state(token: Token) -> str:
        return "expired" if token.expired(time.time()) else f"until {day(token.expires)}"

    tokens = kept.tokens()
    if flags.json:
        shown = [
            {
                "id": t.id,
                "user": t.user,
                "scopes": t.scopes,
                "created": t.created,
                "expires": t.expires,
            }
            for t in tokens
        ]
        print(json.dumps(shown, indent=1))
        return 0
    for token in tokens:
        print(f"{token.id}  {token.user:20}  {state(token):20}  {', '.join(token.scopes)}")
    if not tokens:
        print("There are no tokens. seer-mcp token create NAME makes one.")
    return 0


def day(moment: float | None) -> str:
    return "it is revoked" if moment is None else f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"
