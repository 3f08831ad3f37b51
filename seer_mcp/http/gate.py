"""What a request must pass before it is understood: Host and Origin, scope, and how often."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

OWNERS_KEPT = 10_000
BODY_BYTES = 4 * 1024 * 1024
SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    # Not no-referrer: with that a browser says "Origin: null" when it sends a form, and would be refused.
    (b"referrer-policy", b"same-origin"),
    (b"x-frame-options", b"DENY"),
    (b"cache-control", b"no-store"),
)


class SameHost:
    """Refuses a Host or Origin that is not ours, on every route but those that tell nothing."""

    def __init__(
        self, app: ASGIApp, hosts: Iterable[str], origins: Iterable[str], open_paths: Iterable[str]
    ) -> None:
        self._app = app
        self._hosts, self._origins = frozenset(hosts), frozenset(origins)
        self._open = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        if scope["path"] not in self._open:
            if len(headers.getlist("host")) != 1 or headers["host"] not in self._hosts:
                await PlainTextResponse("Invalid Host header", 421)(scope, receive, send)
                return
            if origin is not None and origin not in self._origins:
                await PlainTextResponse("Invalid Origin header", 403)(scope, receive, send)
                return

        async def safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                names = {name.lower() for name, _ in given}
                given += [pair for pair in SAFE_HEADERS if pair[0] not in names]
                message = {**message, "headers": given}
            await send(message)

        await self._app(scope, receive, safely)


class Buckets:
    """So many requests a minute for each owner; a burst of that size is allowed."""

    def __init__(self, a_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._size = float(a_minute)
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # owner -> what is left, and when

    def take(self, owner: str) -> float:
        """0 if one more may be made now, else the seconds to wait."""
        now = self._clock()
        left, when = self._left.pop(owner, (self._size, now))
        left = min(self._size, left + (now - when) * self._size / 60)
        allowed = left >= 1
        self._left[owner] = (left - 1 if allowed else left, now)  # the last used stands last
        while len(self._left) > OWNERS_KEPT:
            del self._left[next(iter(self._left))]
        return 0.0 if allowed else (1 - left) * 60 / self._size


class Gate:
    """Stands behind the check of the token: how often, and whether the token's scopes suffice."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        buckets: Buckets,
        needed: Callable[[str, str], str | None],
        metadata_url: str,
    ) -> None:
        self._app = app
        self._path = path
        self._buckets = buckets
        self._needed = needed
        self._metadata_url = metadata_url

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        user = scope.get("user")
        if scope["type"] != "http" or not isinstance(user, AuthenticatedUser):
            await self._app(scope, receive, send)
            return
        owner = user.access_token.subject or ""
        if wait := self._buckets.take(owner):
            seconds = math.ceil(wait)
            body = {"error": f"too many requests; come again in {seconds} s"}
            answer = JSONResponse(body, 429, {"Retry-After": str(seconds)})
            await answer(scope, receive, send)
            return
        if scope["method"] != "POST" or scope["path"].rstrip("/") != self._path:
            await self._app(scope, receive, send)
            return
        body, more, gone = await read_body(receive)
        if gone is not None:
            return  # the client went away: nobody waits for an answer
        lacking = sorted(self._lacking(body, user.scopes)) if not more else []
        if lacking:
            await self._insufficient(lacking)(scope, receive, send)
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": more}]

        async def replay() -> Message:
            return first.pop(0) if first else await receive()

        await self._app(scope, replay, send)

    def _lacking(self, body: bytes, scopes: Iterable[str]) -> set[str]:
        """Scopes that the messages of a body need and the token has not."""
        try:
            read = json.loads(body)
        except (ValueError, RecursionError):
            return set()  # the server says what is wrong with it
        needed: set[str] = set()
        for message in read if isinstance(read, list) else [read]:
            if isinstance(message, dict) and isinstance(message.get("method"), str):
                params: Any = message.get("params")
                name = params.get("name") if isinstance(params, dict) else None
                scope = self._needed(message["method"], name if isinstance(name, str) else "")
                needed |= {scope} if scope else set()
        return needed - set(scopes)

    def _insufficient(self, lacking: list[str]) -> JSONResponse:
        named = " ".join(lacking)
        says = f"this token lacks the scope {named}"
        challenge = (
            f'Bearer error="insufficient_scope", error_description="{says}", scope="{named}", '
            f'resource_metadata="{self._metadata_url}"'
        )
        body = {"error": "insufficient_scope", "error_description": says}
        return JSONResponse(body, 403, {"WWW-Authenticate": challenge})


async def read_body(receive: Receive) -> tuple[bytes, bool, Message | None]:
    """The body up to what the server takes; whether more of it follows; what ended it otherwise."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return bytes(body), True, message
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body), False, None
        if len(body) > BODY_BYTES:
            return bytes(body), True, None  # too large: the server says so, unread
