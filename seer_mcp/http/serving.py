"""How a server is served over HTTP, and by whose leave. What would leave it open is refused here."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from ..environment import Investigation
from ..errors import BadInput
from .oidc import Issuer
from .tokens import TokenFile

LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN_CHARACTERS = 20


@dataclass(frozen=True)
class Serving:
    """Checked when it is made: raises BadInput."""

    host: str
    port: int
    token: str = field(default="", repr=False)
    """The one token of a server for one person."""
    users: TokenFile | None = None
    """The tokens of a team."""
    issuer: Issuer | None = None
    """An OpenID Connect issuer whose tokens are accepted."""
    public_url: str = ""
    """What clients call it, as https://seer.example.org, if a proxy stands before it or the host is any."""
    tls: tuple[Path, Path] | None = None
    """Certificate chain and key (PEM)."""
    behind_proxy: bool = False
    """Whether a proxy in front ends TLS."""
    calls_a_minute: int = 600
    """Requests that one owner may make in a minute."""
    pages: bool = True
    """Whether the watch page is served."""
    scope: Investigation | None = None
    """What is served, if that is the functions of an interface: then no pages and no figures."""

    def __post_init__(self) -> None:
        if self.token:
            checked_token(self.token)
        if not (self.token or self.users or self.issuer):
            raise BadInput(
                "token", "", "a server without any token would be open; name a token file"
            )
        loopback = self.host in LOOPBACK
        if not loopback and not self.team:
            raise BadInput(
                "host",
                self.host,
                f"only loopback is served with one token ({', '.join(LOOPBACK)}); for others give each person a "
                "token: seer-mcp token create NAME, then seer-mcp serve --users",
            )
        if not loopback and not (self.tls or self.behind_proxy):
            raise BadInput(
                "host",
                self.host,
                "tokens would cross the network in clear; give --tls-cert and --tls-key, or --behind-proxy where a "
                "proxy ends TLS",
            )
        parts = urlsplit(self.url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.path not in ("", "/")
        ):
            raise BadInput(
                "public-url", self.public_url, "as https://seer.example.org, without a path"
            )
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            raise BadInput("public-url", self.url, "https:// is needed: tokens are sent to it")
        if self.host in ("0.0.0.0", "::", "") and not self.public_url:
            raise BadInput("host", self.host, "name with --public-url what clients call the server")
        if self.tls:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(*self.tls)
            except OSError as error:  # ssl.SSLError is one
                raise BadInput(
                    "tls-cert",
                    str(self.tls[0]),
                    f"it and {self.tls[1]} are no certificate and key: {error}",
                ) from error

    @property
    def team(self) -> bool:
        """Whether there is more than one owner."""
        return self.users is not None or self.issuer is not None

    @property
    def url(self) -> str:
        scheme = "https" if self.tls else "http"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return (self.public_url or f"{scheme}://{host}:{self.port}").rstrip("/")

    @property
    def resource(self) -> str:
        return f"{self.url}/mcp"

    @property
    def names(self) -> list[str]:
        """Values of the Host header that are ours."""
        own = [urlsplit(self.url).netloc]
        if self.host in LOOPBACK:
            own += [f"{name}:{self.port}" for name in ("127.0.0.1", "localhost", "[::1]")]
        return list(dict.fromkeys(own))

    @property
    def origins(self) -> list[str]:
        """Values of the Origin header that are ours."""
        scheme = "https" if self.tls else "http"
        local = [f"{scheme}://{name}" for name in self.names] if self.host in LOOPBACK else []
        return list(dict.fromkeys([self.url, *local]))


def checked_token(token: str) -> str:
    token = token.strip()
    if len(token) < TOKEN_CHARACTERS or not token.isascii() or any(c.isspace() for c in token):
        raise BadInput(
            "token",
            f"{len(token)} characters",
            f"it needs at least {TOKEN_CHARACTERS}, ASCII, without spaces",
        )
    return token
