"""`seer-mcp serve`: the same tools over streamable HTTP on loopback, behind a bearer token."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import signal
from pathlib import Path

import uvicorn
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette

from .config import Config
from .errors import BadInput
from .files import private_dir, write_atomic
from .server import build_server

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_CHARACTERS = 20


class OneToken:
    """Accepts one bearer token; keeps only its hash."""

    def __init__(self, token: str, resource: str) -> None:
        self._digest = hashlib.sha256(token.encode()).digest()
        self._resource = resource

    async def verify_token(self, token: str) -> AccessToken | None:
        if not hmac.compare_digest(hashlib.sha256(token.encode()).digest(), self._digest):
            return None
        return AccessToken(
            token="", client_id="local", scopes=[], subject="local", resource=self._resource
        )


def kept_token(state_dir: Path) -> Path:
    """The file with this installation's token, made at the first start (0600)."""
    path = private_dir(state_dir) / "http-token"
    if not path.exists():
        write_atomic(path, (secrets.token_urlsafe(32) + "\n").encode(), mode=0o600)
    return path


def checked_token(token: str) -> str:
    token = token.strip()
    if len(token) < TOKEN_CHARACTERS or not token.isascii() or any(c.isspace() for c in token):
        raise BadInput(
            "token",
            f"{len(token)} characters",
            f"it needs at least {TOKEN_CHARACTERS}, ASCII, without spaces",
        )
    return token


def checked_host(host: str) -> None:
    if host not in LOOPBACK:
        raise BadInput(
            "host",
            host,
            f"only loopback is served ({', '.join(LOOPBACK)}); put a proxy with TLS before it",
        )


def build_app(config: Config, host: str, port: int, token: str) -> Starlette:
    """The ASGI application. Every request needs the token; Host and Origin must be ours."""
    checked_host(host)
    token = checked_token(token)
    config.redactor.know({"MCP_TOKEN": token})
    url = f"http://{host}:{port}"
    resource = f"{url}/mcp"
    server = build_server(
        config,
        token_verifier=OneToken(token, resource),
        auth=AuthSettings(
            issuer_url=AnyHttpUrl(url),
            resource_server_url=AnyHttpUrl(resource),
            validate_token_resource=True,
        ),
    )
    names = [f"{name}:{port}" for name in ("127.0.0.1", "localhost", "[::1]")]
    return server.streamable_http_app(
        stateless_http=False,
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=names,
            allowed_origins=[f"http://{name}" for name in names],
        ),
        host=host,
    )


async def serve_http(config: Config, host: str, port: int, token: str) -> None:
    """Serve until a signal comes; open streams do not hold the exit up."""
    app = build_app(config, host, port, token)
    settings = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=3,
        timeout_keep_alive=15,
        lifespan="on",
    )
    # uvicorn stops gracefully and then raises the signal again, for those who were there before
    # it: that is us, and we are done. So a stopped server has exit code 0.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)
    await uvicorn.Server(settings).serve()
