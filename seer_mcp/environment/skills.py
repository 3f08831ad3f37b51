"""Skills of an investigation: folders with a SKILL.md, which says in its first lines what it is for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..files import NAME

FILE = "SKILL.md"
TEXT_BYTES = 100_000
_HEAD = re.compile(r"---\s*\n(.*?)\n---\s*(?:\n|$)", re.DOTALL)
_LINE = re.compile(r"(name|description):\s*(.+)")


class SkillProblem(Exception):
    """Why a folder is no skill, as the end of a sentence."""


@dataclass(frozen=True)
class Skill:
    name: str
    description: str
    text: str
    """All of SKILL.md behind its head."""
    folder: Path


def read_skill(folder: Path) -> Skill:
    """Read the SKILL.md of a folder. Raises SkillProblem."""
    file = folder / FILE
    if not file.is_file():
        raise SkillProblem(f"there is no {FILE} in it")
    if file.stat().st_size > TEXT_BYTES:
        raise SkillProblem(f"its {FILE} has more than {TEXT_BYTES:,} bytes")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SkillProblem(f"its {FILE} cannot be read as UTF-8 text") from error
    head = _HEAD.match(text)
    given = dict(_LINE.findall(head[1])) if head else {}
    if not given.get("description"):
        raise SkillProblem(
            f"its {FILE} must begin with a head of two lines between '---': name: … and description: …"
        )
    name = given.get("name", folder.name).strip().strip("'\"")
    if not NAME.fullmatch(name):
        raise SkillProblem(f"its name {name!r} is not 1 to 40 of a-z, 0-9, '-' and '_'")
    body = text[head.end() :] if head else text
    return Skill(name, given["description"].strip().strip("'\""), body.strip(), folder)
