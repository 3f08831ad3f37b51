"""The technique docs and the way of working as MCP skills: the text of `list_techniques`, as files.

Skills extension of MCP (SEP-2640, `io.modelcontextprotocol/skills`): `skills/list` and `skills/get` answer with the
files of each skill and their digests, `resources/read` with a file. Who does not know the extension loses nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mcp.server.extension import Extension, MethodBinding
from mcp.shared.exceptions import MCPError
from mcp.types import INVALID_PARAMS, PaginatedRequestParams, RequestParams

from . import prompts
from .catalogue import detail
from .environment import Skill
from .packs import Listing
from .sessions import Register
from .text import printable
from .tools.seam import owner

METHODOLOGY_SKILL = "investigate-a-model"
DESCRIPTION_CHARACTERS = 1_000  # Agent Skills allow 1,024
FRESH_MS = 60_000
"""How long a client may keep an entry: packs of investigations come and go."""


@dataclass(frozen=True)
class Served:
    """A skill as files: what stands at each URI, SKILL.md first."""

    uri: str
    name: str
    description: str
    files: dict[str, str]

    def entry(self) -> dict[str, Any]:
        resources = [
            {
                "uri": uri,
                "digest": f"sha256:{hashlib.sha256(text.encode()).hexdigest()}",
                "size": len(text.encode()),
            }
            for uri, text in self.files.items()
        ]
        frontmatter = {"name": self.name, "description": self.description}
        return {"uri": self.uri, "frontmatter": frontmatter, "resources": resources}


def skills(listing: Listing, own: Sequence[Skill]) -> Iterator[Served]:
    """How to investigate, one skill a pack with a file a technique, and those of the investigations that run."""
    yield _served(
        METHODOLOGY_SKILL,
        "How to investigate a language model with seer-mcp: explore before you exploit, controls, checkpoints, "
        "honest conclusions.",
        prompts.methodology(),
    )
    for pack in listing.packs:
        techniques = {
            f"references/{technique.name}.md": detail(listing, technique.full_name)
            for technique in pack.techniques
        }
        body = detail(listing, pack.name)
        if techniques:
            body += "\n\nAll about one:\n" + "\n".join(f"- [{file}]({file})" for file in techniques)
        yield _served(f"packs/{_name(pack.name)}", pack.summary, body, techniques)
    for skill in own:
        yield _served(f"own/{_name(skill.name)}", skill.description, skill.text)


def _served(
    path: str, description: str, body: str, references: dict[str, str] | None = None
) -> Served:
    name = path.rpartition("/")[2]
    told = printable(" ".join(description.split()))[:DESCRIPTION_CHARACTERS] or name
    # A JSON string is a YAML string, whatever stands in it.
    head = f"---\nname: {name}\ndescription: {json.dumps(told, ensure_ascii=False)}\n---\n\n"
    root = f"skill://{path}"
    files = {f"{root}/SKILL.md": f"{head}{printable(body).strip()}\n"}
    for file, text in (references or {}).items():
        files[f"{root}/{file}"] = f"{printable(text).strip()}\n"
    return Served(f"{root}/SKILL.md", name, told, files)


def _name(name: str) -> str:
    """As Agent Skills want it: a-z, 0-9 and single hyphens between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


class SkillParams(RequestParams):
    uri: str


class Skills(Extension):
    """Serves the skills of one register: each owner sees those of their own investigations."""

    identifier = "io.modelcontextprotocol/skills"

    def __init__(self, register: Register) -> None:
        self._register = register

    def methods(self) -> Sequence[MethodBinding]:
        return (
            MethodBinding("skills/list", PaginatedRequestParams, self._list),
            MethodBinding("skills/get", SkillParams, self._get),
        )

    def read(self, uri: str) -> str | None:
        """The file at a URI, or None."""
        return next((s.files[uri] for s in self._all() if uri in s.files), None)

    def _all(self) -> list[Served]:
        found: dict[str, Served] = {}
        for each in skills(*self._register.workspace(owner())):
            found.setdefault(each.uri, each)
        return list(found.values())

    async def _list(self, context: Any, params: PaginatedRequestParams) -> dict[str, Any]:
        if params.cursor:
            raise MCPError(INVALID_PARAMS, f"cursor {params.cursor!r}: all skills are on one page")
        return _fresh(skills=[each.entry() for each in await self._off_the_loop()])

    async def _get(self, context: Any, params: SkillParams) -> dict[str, Any]:
        for each in await self._off_the_loop():
            if each.uri == params.uri:
                return _fresh(skill=each.entry())
        raise MCPError(INVALID_PARAMS, f"no skill {params.uri[:200]!r}: skills/list has them all")

    async def _off_the_loop(self) -> list[Served]:
        return await asyncio.to_thread(self._all)


def _fresh(**result: Any) -> dict[str, Any]:
    return {"resultType": "complete", **result, "ttlMs": FRESH_MS, "cacheScope": "private"}
