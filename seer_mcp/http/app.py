"""`seer-mcp serve`: the same tools over streamable HTTP, for one person on loopback or for a team."""

from __future__ import annotations

import secrets
import signal
import time
from pathlib import Path

import uvicorn
from mcp.server.auth.settings import AuthSettings
from mcp.server.transport_security import TransportSecuritySettings
from pydantic import AnyHttpUrl
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ..config import Config
from ..files import private_dir, write_atomic
from ..scoped import ScopedServer, build_scoped_server
from ..server import SeerServer, build_server
from ..watch import Pages, ServerSource, Visitor, Visitors
from .access import Access
from .gate import Buckets, Gate, SameHost
from .metrics import metrics_of
from .serving import Serving
from .slow import Prompt

OPEN_PATHS = ("/healthz", "/readyz")  # they tell nothing, and a balancer calls them by an address
HEAD_BYTES = 32 * 1024
GRACE_SECONDS = 3


def kept_token(state_dir: Path, name: str = "http-token") -> Path:
    """The file with this installation's token, made at the first start (0600)."""
    path = private_dir(state_dir) / name
    if not path.exists():
        write_atomic(path, (secrets.token_urlsafe(32) + "\n").encode(), mode=0o600)
    return path


def build_app(config: Config, serving: Serving) -> Starlette:
    """The ASGI application. Every request needs a token; Host and Origin must be ours."""
    config.redactor.know({"MCP_TOKEN": serving.token.strip()})
    issuer = serving.issuer.url if serving.issuer else serving.url
    access = Access(serving)
    auth = AuthSettings(
        issuer_url=AnyHttpUrl(issuer),
        resource_server_url=AnyHttpUrl(serving.resource),
        validate_token_resource=True,
    )
    if serving.scope is None:
        server = build_server(config, token_verifier=access, auth=auth)
    else:
        server = build_scoped_server(config, serving.scope, token_verifier=access, auth=auth)
    app = server.streamable_http_app(
        stateless_http=False,
        transport_security=TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=serving.names,
            allowed_origins=serving.origins,
        ),
        host=serving.host,
    )
    metadata = f"{serving.url}/.well-known/oauth-protected-resource/mcp"
    gate = Middleware(Gate, "/mcp", Buckets(serving.calls_a_minute), server.scope_needed, metadata)
    app.user_middleware.append(gate)  # the innermost: whoever comes so far has a token
    app.add_middleware(
        SameHost, hosts=serving.names, origins=serving.origins, open_paths=OPEN_PATHS
    )
    app.router.routes += health(server)
    if isinstance(server, SeerServer):
        app.router.routes.append(metrics_of(server, metadata))
        if serving.pages:
            app.router.routes.extend(pages_of(server, access, serving))
    app.state.seer = server
    return app


def health(server: SeerServer | ScopedServer) -> list[Route]:
    async def alive(request: Request) -> Response:
        return PlainTextResponse("ok")

    async def ready(request: Request) -> Response:
        is_ready = server.ready
        return PlainTextResponse("ready" if is_ready else "starting", 200 if is_ready else 503)

    return [Route("/healthz", alive), Route("/readyz", ready)]


def pages_of(server: SeerServer, access: Access, serving: Serving) -> list[BaseRoute]:
    """The watch page. Who signs in there may what the token may."""

    async def check(token: str) -> Visitor | None:
        found = await access.verify_token(token)
        if found is None or (found.expires_at is not None and found.expires_at < time.time()):
            return None
        return Visitor(found.subject or found.client_id, frozenset(found.scopes))

    source = ServerSource(server.register)
    secure = serving.url.startswith("https:")
    often = Buckets(serving.calls_a_minute)  # apart from /mcp: who watches slows no agent down
    return Pages(source, Visitors(check), secure=secure, wait=often.take).routes()


async def serve_http(config: Config, serving: Serving) -> None:
    """Serve until a signal comes; open streams do not hold the exit up."""
    tls = serving.tls
    settings = uvicorn.Config(
        build_app(config, serving),
        host=serving.host,
        port=serving.port,
        http=Prompt,
        ws="none",
        log_level="warning",
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=HEAD_BYTES,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=str(tls[0]) if tls else None,
        ssl_keyfile=str(tls[1]) if tls else None,
        lifespan="on",
    )
    # uvicorn stops gracefully and then raises the signal again, for those who were there before
    # it: that is us, and we are done. So a stopped server has exit code 0.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)
    await uvicorn.Server(settings).serve()
