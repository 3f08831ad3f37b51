"""Whether what a kernel could read says which model it has."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .names import HiddenNames

# What a probe must have found, where a name is not all that matters.
MUST: dict[str, str] = {
    "network: the hub's name": "blocked",
    "network: the hub": "blocked",
    "network: another machine": "blocked",
    "network: a code host": "blocked",
    "network: ways out": "[]",
    "environment: tokens": "[]",
    "environment: a token of the hub": "none",
    "environment: variables with a path of a model": "[]",
    "process: modules from repositories": "[]",
    "files: links": "[]",
}
NETWORK = "network: "
DIGESTS = "files: digests of the models"
# What is the user's own machine's on the local backend, where code has the user's rights anyway.
OWN_MACHINE = frozenset(
    [
        "files: the usual cache in the home folder",
        "files: the folder for temporary files",
        "files: mounts",
        "process: names of machine and user",
    ]
)
LEAST = 60


@dataclass
class Found:
    """What came of the probes."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """By probe, why; without a name in it."""
    open: list[str] = field(default_factory=list[str])
    """What can be read all the same, and was to be expected so on this machine."""
    seconds: float = 0.0

    @property
    def total(self) -> int:
        return self.passed + len(self.failed) + len(self.open)


def judge(
    observed: Mapping[str, Any] | None,
    said: Mapping[str, str],
    names: HiddenNames,
    copies: Mapping[str, Mapping[str, str]],
    *,
    local: bool,
    netless: bool,
) -> Found:
    """`observed` by tool_packs.blind in the kernel; `said` by this server, by what it is.

    `copies`: by folder in the sandbox, the digests of its files. `netless`: whether the network was shut.
    """
    found = Found()
    texts: dict[str, str] = {k: str(v) for k, v in ((observed or {}).get("found") or {}).items()}
    found.seconds = float((observed or {}).get("seconds") or 0.0)
    if len(texts) + len(said) < LEAST:
        found.failed["the check itself"] = (
            f"only {len(texts)} probes of the kernel were heard, and {LEAST} are taken: what begins the notebook was "
            "changed, or its packs are others"
        )
    for probe, text in {**texts, **said}.items():
        why = wrong(probe, text, names, copies, exact=probe in texts)
        if not why:
            found.passed += 1
        elif local and (probe in OWN_MACHINE or (probe.startswith(NETWORK) and not netless)):
            found.open.append(probe)
        else:
            found.failed[probe] = why
    return found


def wrong(
    probe: str,
    text: str,
    names: HiddenNames,
    copies: Mapping[str, Mapping[str, str]],
    exact: bool,
) -> str:
    """Why a probe is not passed; "" if it is."""
    if names.are_in(text):
        return "a name can be read there"
    if exact and probe in MUST and text != MUST[probe]:
        return f"it must find {MUST[probe]!r}"
    if exact and probe == DIGESTS:
        return other_files(text, copies)
    return ""


def other_files(text: str, copies: Mapping[str, Mapping[str, str]]) -> str:
    try:
        there: Any = json.loads(text)
    except ValueError:
        return "the files of the copies could not be read"
    if not isinstance(there, dict):
        return "the files of the copies could not be read"
    for folder, files in copies.items():
        held: Any = there.get(folder)
        if not isinstance(held, dict):
            return "a copy is not where it was put"
        more = held.keys() - files.keys()
        if more:
            return f"{len(more)} file(s) lie beside those of the copy"
        if held != dict(files):
            return "a file of a copy is not as it was made, or is gone"
    return ""
