"""Damage, by a seed: each case can be made again from its name."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

SEED = os.environ.get("SEER_TEST_SEED", "1")
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2**31, 2**53, 10**30, 0.5, 1e300),
    *("", "x", "\0", "\u202e", "é" * 40, "../../etc/passwd", "/", "\ud800", "r0123456789"),
    *([], {}, [[]], [1, "x"], {"x": 1}, {"": []}),
)


def cases(what: str, count: int) -> Iterator[tuple[str, Random]]:
    """The name of each case and its source of chance."""
    for number in range(count):
        name = f"{what}-{SEED}-{number}"
        yield name, Random(name)


def damaged(random: Random, data: bytes) -> bytes:
    """The bytes, damaged once or a few times."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        data = random.choice(WAYS)(random, data)
    return data


def _flip(random: Random, data: bytes) -> bytes:
    if not data:
        return b"\0"
    at = random.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]


def _cut(random: Random, data: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + data[at + random.randrange(60) :]


def _repeat(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    part = data[at : at + random.randrange(1, 300)]
    return data[:at] + part * random.randrange(2, 4) + data[at + len(part) :]


def _insert(random: Random, data: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    pieces = (
        *(
            b"\xff\xfe",
            b"\xed\xa0\x80",
            b"\0" * 50,
            b"\n",
            b"\r\n\r\n",
            b"{",
            b"]" * 3,
            b'"',
            b"\\",
        ),
        *(b"NaN", b"1e999", b"9" * 5000, b"-", b"\xef\xbb\xbf", b"[" * 5000, b'{"a":' * 1500),
        bytes(random.randrange(256) for _ in range(20)),
    )
    return data[:at] + random.choice(pieces) + data[at:]


def _shuffle_lines(random: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    if len(lines) > 1:
        a, b = random.randrange(len(lines)), random.randrange(len(lines))
        lines[a], lines[b] = lines[b], lines[a]
    return b"".join(lines)


def _value(random: Random, data: bytes) -> bytes:
    """One value of the JSON (or of one of its lines) becomes another."""
    lines = data.splitlines(keepends=True)
    at: int | None = None
    text = data
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if not lines:
            return b"null"
        at = random.randrange(len(lines))
        try:
            value = json.loads(lines[at])
        except (ValueError, RecursionError):
            return _flip(random, data)
    value = _other(random, value)
    try:
        made = json.dumps(value, indent=None if at is not None else 1).encode()
    except RecursionError:
        return _flip(random, data)
    if at is None:
        return made
    lines[at] = made + b"\n"
    return b"".join(lines)


def _other(random: Random, value: Any) -> Any:
    """The value with something in it replaced, taken away or doubled."""
    if isinstance(value, dict) and value and random.random() < 0.98:
        (key,) = random.choices(list(value), [nodes(v) for v in value.values()])
        if random.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: _other(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.98:
        (at,) = random.choices(range(len(value)), [nodes(v) for v in value])
        if random.random() < 0.15:
            return [*value[:at], value[at], *value[at:]]
        return [*value[:at], _other(random, value[at]), *value[at + 1 :]]
    if random.random() < 0.1:
        deep: Any = value
        for _ in range(random.choice((20, 150, 250, 950))):
            deep = random.choice(([deep], {"x": deep}))
        return deep
    return random.choice(ODD)


def nodes(value: Any) -> int:
    """How much is in it, so that every part is as likely to be hit."""
    if isinstance(value, dict):
        return 1 + sum(map(nodes, value.values()))
    return 1 + sum(map(nodes, value)) if isinstance(value, list) else 1


WAYS: tuple[Callable[[Random, bytes], bytes], ...] = (
    *(_flip, _cut, _remove, _repeat, _insert, _shuffle_lines),
    *(_value, _value, _value, _value, _value),
)


def put_strange(random: Random, path: Path) -> str:
    """Something that is no regular file, in the place of a file."""
    kind = random.choice(("pipe", "folder", "socket", "loop", "dangling", "nothing", "to zero"))
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            here = os.getcwd()
            os.chdir(path.parent)  # the path may be too long for an address
            try:
                made.bind(path.name)
            finally:
                os.chdir(here)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("is not there")
    elif kind == "to zero":
        path.symlink_to("/dev/zero")
    return kind


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        for inside in path.iterdir():
            remove(inside)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def report(title: str, counts: dict[str, int]) -> None:
    """A line of the table of cases, past pytest's capture."""
    told = ", ".join(f"{count} {what}" for what, count in counts.items())
    sys.__stderr__.write(f"\n{title}: {told}\n")
