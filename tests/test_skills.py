"""Technique docs and the way of working as MCP skills: complete, true to list_techniques, each owner's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest
from mcp.shared.exceptions import MCPError
from mcp.types import PaginatedRequestParams, Request, TextResourceContents
from pydantic import BaseModel

from seer_mcp.skills import SkillParams

from .support import Lab, open_lab

pytestmark = pytest.mark.anyio
LISTED = re.compile(r"^- \[(references/\w+\.md)\]\(\1\)$", re.M)


class Answer(BaseModel, extra="allow"):
    ttlMs: int
    cacheScope: str


class ListSkills(Request[PaginatedRequestParams, Literal["skills/list"]]):
    method: Literal["skills/list"] = "skills/list"
    params: PaginatedRequestParams = PaginatedRequestParams()


class GetSkill(Request[SkillParams, Literal["skills/get"]]):
    method: Literal["skills/get"] = "skills/get"
    params: SkillParams


async def listed(lab: Lab) -> dict[str, dict[str, Any]]:
    found = (await lab.client.session.send_request(ListSkills(), Answer)).model_dump()["skills"]
    return {skill["uri"]: skill for skill in found}


async def got(lab: Lab, uri: str) -> dict[str, Any]:
    asked = GetSkill(params=SkillParams(uri=uri))
    return (await lab.client.session.send_request(asked, Answer)).model_dump()["skill"]


async def text(lab: Lab, uri: str) -> str:
    (content,) = (await lab.client.read_resource(uri)).contents
    assert isinstance(content, TextResourceContents)
    return content.text


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    async with open_lab(tmp_path) as lab:
        yield lab


async def test_the_extension_is_declared(lab: Lab) -> None:
    declared = lab.client.server_capabilities.extensions or {}
    assert "io.modelcontextprotocol/skills" in declared


async def test_every_file_of_every_skill_has_the_size_and_digest_that_are_listed(lab: Lab) -> None:
    skills = await listed(lab)
    assert len(skills) > 20
    for uri, skill in skills.items():
        assert skill == await got(lab, uri)
        assert skill["resources"][0]["uri"] == uri
        for file in skill["resources"]:
            data = (await text(lab, file["uri"])).encode()
            assert len(data) == file["size"]
            assert f"sha256:{hashlib.sha256(data).hexdigest()}" == file["digest"]


async def test_names_and_heads_are_those_of_agent_skills(lab: Lab) -> None:
    for uri, skill in (await listed(lab)).items():
        head, _, _ = (await text(lab, uri)).removeprefix("---\n").partition("\n---\n")
        name, description = head.split("\n")
        given = skill["frontmatter"]
        assert name == f"name: {given['name']}" and given["name"] == uri.split("/")[-2]
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", given["name"]) and len(given["name"]) <= 64
        assert json.loads(description.removeprefix("description: ")) == given["description"]
        assert 0 < len(given["description"]) <= 1024


async def test_the_text_is_that_of_list_techniques(lab: Lab) -> None:
    body = await text(lab, "skill://packs/jacobian-lens/SKILL.md")
    assert (await lab.ok("list_techniques", name="jacobian_lens")).strip() in body
    files = LISTED.findall(body)
    assert len(files) == 2
    for file in files:
        shown = await lab.ok("list_techniques", name=f"jacobian_lens.{Path(file).stem}")
        assert shown.strip() == (await text(lab, f"skill://packs/jacobian-lens/{file}")).strip()


async def test_a_skill_that_is_not_there_is_refused(lab: Lab) -> None:
    with pytest.raises(MCPError, match="no skill") as refused:
        await got(lab, "skill://packs/nothing/SKILL.md")
    assert refused.value.error.code == -32602
    for uri in ("skill://packs/nothing/SKILL.md", "skill://packs/../../etc/passwd"):
        with pytest.raises(MCPError):
            await text(lab, uri)


async def test_a_skill_of_an_investigation_is_there_while_it_runs(tmp_path: Path) -> None:
    folder = tmp_path / "shelf" / "own"
    (folder / "skills" / "counting").mkdir(parents=True)
    (folder / "skills" / "counting" / "SKILL.md").write_text(
        '---\nname: counting\ndescription: How to count: "slowly"\n---\n\nOne, two, three.\n'
    )
    (folder / "investigation.toml").write_text('skills = ["skills/counting"]\n')
    (folder / "task.md").write_text("# Count\n\nCount.\n")
    async with open_lab(tmp_path, investigations=(tmp_path / "shelf",)) as lab:
        uri = "skill://own/counting/SKILL.md"
        assert uri not in await listed(lab)
        sandbox = await lab.start(investigation="own")
        assert uri in await listed(lab)
        assert (await text(lab, uri)).endswith("\n---\n\nOne, two, three.\n")
        await lab.ok("stop_sandbox", sandbox=sandbox)
        assert uri not in await listed(lab)
