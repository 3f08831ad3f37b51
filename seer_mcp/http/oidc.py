"""Access tokens of an OpenID Connect issuer, checked by its published keys (RFC 9068, RFC 8707)."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit

import jwt

from ..errors import BadInput, SeerError

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")
LEEWAY_SECONDS = 30  # by which clocks may differ
KEYS_SECONDS = 600.0  # that keys are kept
PAUSE_SECONDS = 5.0  # between two looks at the issuer: made-up key ids must not make us a hammer
FETCH_SECONDS = 5.0
ANSWER_BYTES = 1_000_000
LOOPBACK = ("127.0.0.1", "localhost", "::1")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Claims:
    """Of a token that was checked."""

    subject: str
    client: str
    scopes: tuple[str, ...]
    expires: int


class Issuer:
    """One issuer, whose tokens are for one audience."""

    def __init__(self, url: str, audience: str, owner_claim: str = "sub") -> None:
        self.url = checked_url("oidc-issuer", url)
        self.audience = audience
        self.owner_claim = owner_claim
        self._keys: dict[str, jwt.PyJWK] = {}
        self._fetched = -KEYS_SECONDS
        self._tried = -PAUSE_SECONDS
        self._fetching = asyncio.Lock()

    async def check(self, token: str) -> Claims | None:
        """What the token says, if it is the issuer's, for us, and valid now."""
        try:
            header = jwt.get_unverified_header(token)
            key = await self._key(header.get("kid"))
            if key is None or header["alg"] not in ALGORITHMS:
                return None
            said: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=ALGORITHMS,
                audience=self.audience,
                issuer=self.url,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.InvalidTokenError, jwt.PyJWKError, ValueError):
            return None
        subject = said.get(self.owner_claim)
        if not isinstance(subject, str) or not subject or len(subject) > 200:
            return None
        client = said.get("client_id") or said.get("azp") or "oidc"
        return Claims(subject, str(client)[:80], scopes_of(said), int(said["exp"]))

    async def _key(self, id: str | None) -> jwt.PyJWK | None:
        # A key that is known waits for no look at the issuer, which a made-up key id may have begun.
        if time.monotonic() - self._fetched <= KEYS_SECONDS and (key := self._named(id)):
            return key
        async with self._fetching:
            now = time.monotonic()
            old = now - self._fetched > KEYS_SECONDS
            if (old or self._named(id) is None) and now - self._tried > PAUSE_SECONDS:
                self._tried = now
                try:
                    self._keys = await asyncio.to_thread(self._fetch)
                    self._fetched = now
                except (SeerError, OSError, ValueError, jwt.PyJWTError) as error:
                    # What is known goes on to hold; what is not known is refused.
                    log.warning("The keys of %s could not be fetched: %s", self.url, error)
        return self._named(id)

    def _named(self, id: str | None) -> jwt.PyJWK | None:
        if id is None and len(self._keys) == 1:
            return next(iter(self._keys.values()))
        return self._keys.get(id) if id is not None else None

    def _fetch(self) -> dict[str, jwt.PyJWK]:
        said = fetch_json(self.url.rstrip("/") + "/.well-known/openid-configuration")
        if said.get("issuer") != self.url:
            raise SeerError(f"it calls itself {said.get('issuer')!r}")
        keys = fetch_json(checked_url("jwks_uri", str(said.get("jwks_uri"))))
        usable: dict[str, jwt.PyJWK] = {}
        for number, entry in enumerate(keys.get("keys", [])):
            if entry.get("use", "sig") == "sig" and entry.get("kty") in ("RSA", "EC", "OKP"):
                usable[str(entry.get("kid", f"unnamed {number}"))] = jwt.PyJWK.from_dict(entry)
        return usable


def scopes_of(said: Mapping[str, Any]) -> tuple[str, ...]:
    given = said.get("scope", said.get("scp", ""))
    return tuple(given.split()) if isinstance(given, str) else tuple(map(str, given))


def checked_url(argument: str, url: str) -> str:
    """An address whose answers can be trusted: https, or this machine."""
    parts = urlsplit(url)
    if parts.scheme == "https" and parts.hostname:
        return url
    if parts.scheme == "http" and parts.hostname in LOOPBACK:
        return url
    raise BadInput(argument, url, "an https:// address (http:// only for loopback)")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **named: Any) -> None:
        return None


def fetch_json(url: str) -> dict[str, Any]:
    opener = urllib.request.build_opener(NoRedirect)
    try:
        with opener.open(url, timeout=FETCH_SECONDS) as answer:
            read = json.loads(answer.read(ANSWER_BYTES))
    except URLError as error:
        raise SeerError(f"{url}: {error.reason}") from error
    if not isinstance(read, dict):
        raise SeerError(f"{url}: no JSON object")
    return read
