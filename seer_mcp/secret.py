"""Secrets by name: found in the server's environment, else in the project's .env file."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from dotenv import dotenv_values

from .errors import BadInput
from .redact import MIN_CHARACTERS

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
# The keys to the cloud account, to this server and to its client: code in a sandbox never gets them.
OURS = ("MODAL_", "MCP_", "SEER_MCP_", "CLAUDE")
# What Python, the shell or the linker goes by.
SETTINGS = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|TERM|TZ|TMPDIR|LC_.*|LD_.*|DYLD_.*|PYTHON.*"
)
# What is taken for a secret although nobody named it, so that its value is redacted.
SECRET = re.compile(
    r"(?:.*_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|PAT|KEY|APIKEY)(?:_ID)?", re.IGNORECASE
)
KNOWN_CHARACTERS = 12  # such a value is no word and no number
DOTENV_BYTES = 1_000_000


def check_secret_name(name: str) -> None:
    """Raises BadInput for what cannot be the name of a sandbox's secret."""
    if not NAME.fullmatch(name):
        raise BadInput("secret", name, "name an environment variable: letters, digits and '_'")
    if name.upper().startswith(OURS):
        raise BadInput(
            "secret",
            name,
            f"names that begin with {', '.join(OURS)} are keys of this server, its account or its client; "
            "no sandbox gets them",
        )
    if SETTINGS.fullmatch(name):
        raise BadInput("secret", name, "it is a setting of the system, not a secret; use env")


@dataclass(frozen=True)
class Found:
    values: Mapping[str, str] = field(repr=False)
    missing: tuple[str, ...]
    """In neither place. A backend may have them in a store of its own."""


class Secrets:
    """Where values are looked for. The file is read anew each time, so a key can be added any time."""

    def __init__(
        self, environ: Mapping[str, str] | None = None, dotenv: Path | None = None
    ) -> None:
        self._environ = dict(environ or {})
        self._dotenv = dotenv

    def find(self, names: Iterable[str]) -> Found:
        """Values by name. Raises BadInput for a name or value that cannot be used."""
        wanted = list(dict.fromkeys(names))
        for name in wanted:
            check_secret_name(name)
        both = {**self._file(), **{k: v for k, v in self._environ.items() if v}} if wanted else {}
        values = {name: both[name] for name in wanted if both.get(name)}
        for name, value in values.items():
            if len(value) < MIN_CHARACTERS:
                raise BadInput(
                    "secret",
                    name,
                    f"its value has fewer than {MIN_CHARACTERS} characters, so it could not be kept out of what "
                    "is shown; if it is no secret, put it into env",
                )
            if "\0" in value:
                raise BadInput("secret", name, "its value holds a NUL character")
        return Found(values, tuple(name for name in wanted if name not in values))

    def missing(self, names: Iterable[str]) -> str:
        """What to say of names that nobody has."""
        listed = ", ".join(names)
        file = f" or into {self._dotenv}" if self._dotenv else ""
        return f"{listed}: not in the server's environment; set it there{file} (NAME=value), or take it out of secrets"

    def at_hand(self, names: Iterable[str]) -> dict[str, str]:
        """What there is of these, without a word on the rest: to redact values of an earlier server's sandbox."""
        both = self._both()
        return {name: both[name] for name in names if both.get(name)}

    def known(self) -> dict[str, str]:
        """All that looks like a secret, by its name: its value must not be shown."""
        both = self._both()
        return {
            name: value
            for name, value in both.items()
            if SECRET.fullmatch(name)
            and len(value) >= KNOWN_CHARACTERS
            and not value.isdigit()
            and not value.startswith(("/", "~"))
        }

    def _both(self) -> dict[str, str]:
        try:
            file = self._file()
        except BadInput:
            file = {}  # said when a secret is asked for
        return {**file, **{name: value for name, value in self._environ.items() if value}}

    def _file(self) -> dict[str, str]:
        """What the .env file says. Raises BadInput if there is one that cannot be read."""
        path = self._dotenv
        if path is None:
            return {}
        try:
            info = path.stat()
            if not stat.S_ISREG(info.st_mode):
                raise BadInput("secrets", str(path), "it is not a file")
            if info.st_size > DOTENV_BYTES:
                raise BadInput("secrets", str(path), f"it has more than {DOTENV_BYTES:,} bytes")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise BadInput("secrets", str(path), f"it cannot be read ({why})") from error
        # Without interpolation: that would read the environment of this process.
        found = dotenv_values(stream=StringIO(text), interpolate=False)
        return {name: value for name, value in found.items() if value}
