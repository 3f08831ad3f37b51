"""Object ids in the shapes by which the client tells one kind from another."""

from __future__ import annotations

import base64
import json
import secrets
import string
import time

ALPHABET = string.digits + string.ascii_letters


def _random(size: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(size))


def new(prefix: str) -> str:
    return f"{prefix}-{_random(22)}"


def sandbox(version: int) -> str:
    """The client takes an id of 22 letters and digits for version 1, any other for version 2."""
    return f"sb-{_random(22 if version == 1 else 26)}"


def task(version: int) -> str:
    """A task of a version 2 sandbox ends in V."""
    return f"ta-{_random(22)}" if version == 1 else f"ta-{_random(24)}V"


def jwt(seconds: float, **claims: object) -> str:
    """A token that says when it expires. The client reads no more of it, and this server compares it
    as a whole, so it is signed with nothing."""

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()

    header, body = part({"alg": "none"}), part({"exp": time.time() + seconds, **claims})
    return f"{header}.{body}.{secrets.token_urlsafe(8)}"
