"""Who is signed in at the pages: a cookie stands for a token, which is checked anew each time."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

COOKIE = "seer_watch"
HOURS = 12
VISITORS = 1000


@dataclass(frozen=True)
class Visitor:
    owner: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        return scope in self.scopes


Check = Callable[[str], Awaitable[Visitor | None]]


class Visitors:
    """Sign-ins of this process. Tokens are kept in memory alone, and end when they are revoked."""

    def __init__(self, check: Check) -> None:
        self._check = check
        self._tokens: OrderedDict[str, tuple[str, float]] = OrderedDict()

    async def enter(self, token: str) -> str | None:
        """The value of a new cookie, if the token opens."""
        if await self._check(token.strip()) is None:
            return None
        cookie = secrets.token_urlsafe(32)
        self._tokens[cookie] = (token.strip(), time.monotonic() + HOURS * 3600)
        while len(self._tokens) > VISITORS:
            self._tokens.popitem(last=False)
        return cookie

    async def who(self, cookie: str | None) -> Visitor | None:
        token, ends = self._tokens.get(cookie or "", ("", 0.0))
        if not token or time.monotonic() > ends:
            self.leave(cookie)
            return None
        return await self._check(token)

    def leave(self, cookie: str | None) -> None:
        self._tokens.pop(cookie or "", None)


class OneTime:
    """A token that opens once, for the page that `seer-mcp watch` opens on this machine."""

    def __init__(self) -> None:
        self.token = secrets.token_urlsafe(32)
        self._inside = secrets.token_urlsafe(32)
        self._used = False

    def exchange(self, token: str) -> str | None:
        """What the cookie stands for, for the first who brings the token."""
        if self._used or not secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        self._used = True
        return self._inside

    async def check(self, token: str) -> Visitor | None:
        if not secrets.compare_digest(token.encode("utf-8", "replace"), self._inside.encode()):
            return None
        return Visitor("local", frozenset(["sandboxes:read"]))
