"""A team's tokens: a private file with hashes, one line of it per token, changed by `seer-mcp token`."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import BadInput, Conflict, NotFound, SeerError
from ..files import Lock, private_dir, write_json
from ..scoped import CALL

SCOPES = ("sandboxes:read", "sandboxes:write", "code:run", "admin", CALL)
USER = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._@+-]{0,62}[A-Za-z0-9])?")
TOKEN = re.compile(r"seer_([a-z0-9]{8})_[A-Za-z0-9_-]{43}")
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789"
LONGEST_DAYS = 3660
NOBODY = hashlib.sha256(b"").hexdigest()  # what an unknown id is compared with, to take as long


@dataclass(frozen=True)
class Token:
    """What is kept of a token: all but the token itself."""

    id: str
    user: str
    scopes: tuple[str, ...]
    sha256: str
    created: float
    expires: float | None
    """Seconds since the epoch; None: it does not expire."""

    def expired(self, now: float) -> bool:
        return self.expires is not None and now >= self.expires


class TokenFile:
    """The tokens of one server. Read anew when the file changed, so that a revocation holds at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, int, int] | None = None
        self._tokens: dict[str, Token] = {}

    def tokens(self) -> list[Token]:
        """All, the oldest first. Raises SeerError for a file that cannot be understood."""
        self._refresh()
        return sorted(self._tokens.values(), key=lambda token: token.created)

    def find(self, secret: str) -> Token | None:
        """The token, if it is one of these and has not expired."""
        self._refresh()
        named = TOKEN.fullmatch(secret)
        kept = self._tokens.get(named[1]) if named else None
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
        same = hmac.compare_digest(digest, kept.sha256 if kept else NOBODY)
        return kept if same and kept and not kept.expired(time.time()) else None

    def create(self, user: str, scopes: Iterable[str], days: float | None) -> tuple[str, Token]:
        """A new token: the secret, which is kept nowhere, and what is kept."""
        if not USER.fullmatch(user):
            raise BadInput(
                "user",
                user,
                "1 to 64 of letters, digits and . _ @ + -, a letter or digit at each end",
            )
        asked = tuple(dict.fromkeys(scopes))
        if unknown := [scope for scope in asked if scope not in SCOPES]:
            raise BadInput("scope", unknown[0], f"the scopes are {', '.join(SCOPES)}")
        if not asked:
            raise BadInput("scope", "", f"name one or more of {', '.join(SCOPES)}")
        if days is not None and not 0 < days <= LONGEST_DAYS:
            raise BadInput("days", days, f"more than 0, {LONGEST_DAYS} at most")
        id = "".join(secrets.choice(ALPHABET) for _ in range(8))
        secret = f"seer_{id}_{secrets.token_urlsafe(32)}"
        now = time.time()
        expires = None if days is None else now + days * 86400
        digest = hashlib.sha256(secret.encode()).hexdigest()
        token = Token(id, user, asked, digest, now, expires)
        self._change({token.id: token}, ())
        return secret, token

    def revoke(self, which: str) -> list[Token]:
        """Remove the token of that id, or all of a user's. Raises NotFound."""
        gone = [t for t in self.tokens() if which in (t.id, t.user)]
        if not gone:
            known = [t.id for t in self.tokens()]
            raise NotFound("token", which, known, "seer-mcp token list shows them.")
        self._change({}, [t.id for t in gone])
        return gone

    def _change(self, new: dict[str, Token], gone: Iterable[str]) -> None:
        private_dir(self.path.parent)
        lock = Lock(self.path.with_name(self.path.name + ".lock"))
        if not lock.take():
            raise Conflict(f"{self.path} is being changed by another process; try again.")
        try:
            self._refresh()
            left = {id: t for id, t in {**self._tokens, **new}.items() if id not in set(gone)}
            write_json(self.path, {"tokens": [asdict(token) for token in left.values()]}, "tokens")
            self._refresh()
        finally:
            lock.release()

    def _refresh(self) -> None:
        try:
            info = self.path.stat()
        except FileNotFoundError:
            self._stamp, self._tokens = None, {}
            return
        if info.st_mode & 0o077:
            raise SeerError(f"{self.path} can be read by others; say chmod 600 {self.path}.")
        stamp = (info.st_ino, info.st_mtime_ns, info.st_size)
        if stamp == self._stamp:
            return
        try:
            read = [token_of(entry) for entry in json.loads(self.path.read_text())["tokens"]]
        except (ValueError, TypeError, KeyError) as error:
            raise SeerError(
                f"{self.path} is no token file ({type(error).__name__}); restore it from a backup, or remove it and "
                "create the tokens anew with seer-mcp token create."
            ) from error
        self._tokens = {token.id: token for token in read}
        self._stamp = stamp


def token_of(entry: dict[str, Any]) -> Token:
    """One entry of the file. Raises KeyError, TypeError or ValueError."""
    expires = entry["expires"]
    scopes = tuple(str(scope) for scope in entry["scopes"])
    if not set(scopes) <= set(SCOPES) or not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):
        raise ValueError("no scope or no hash")
    return Token(
        str(entry["id"]),
        str(entry["user"]),
        scopes,
        str(entry["sha256"]),
        float(entry["created"]),
        None if expires is None else float(expires),
    )
