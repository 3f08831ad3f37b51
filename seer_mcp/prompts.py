"""What stands in a client's menu: each investigation as a prompt, and how to work."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mcp.types import GetPromptResult, Prompt, PromptArgument, PromptMessage, TextContent

from .environment import Investigations, Shelved
from .errors import BadInput, NotFound
from .text import printable

METHODOLOGY = "methodology"
METHODOLOGY_URI = "seer://methodology"
METHODOLOGY_TITLE = "How to investigate a model"


def methodology() -> str:
    return Path(__file__).with_name("methodology.md").read_text(encoding="utf-8")


def listed(shelf: Investigations) -> list[Prompt]:
    """All prompts as they are now."""
    return [
        Prompt(
            name=METHODOLOGY,
            title=METHODOLOGY_TITLE,
            description="Explore before you exploit, controls, checkpoints, honest conclusions.",
        ),
        *(_prompt(each) for each in shelf.read().found if each.name != METHODOLOGY),
    ]


def rendered(
    shelf: Investigations, name: str, arguments: Mapping[str, str] | None
) -> GetPromptResult:
    """One prompt. Raises NotFound, or BadInput for an argument that it does not have."""
    given = dict(arguments or {})
    if name == METHODOLOGY:
        _no_more(name, given)
        return _said(METHODOLOGY_TITLE, methodology())
    found = shelf.read()
    shelved = found.get(name)
    if shelved is None:
        raise NotFound("prompt", name, [METHODOLOGY, *found.names()])
    variant = given.pop("configuration", "")
    _no_more(name, given)
    if variant and variant not in shelved.variants:
        raise NotFound("configuration", variant, shelved.variants)
    start = f"{name}/{variant}" if variant else name
    return _said(
        shelved.title,
        f"# {shelved.title}\n\n"
        f'Begin with start_sandbox(investigation="{start}"): it starts the machine, loads the models and begins the '
        f"notebook. End with submit_findings.\n\n{shelved.task.strip()}\n\n---\n\n{methodology()}",
    )


def _prompt(shelved: Shelved) -> Prompt:
    variants = ", ".join(shelved.variants)
    argument = PromptArgument(
        name="configuration",
        description=f"Another configuration than the usual one: {variants}",
        required=False,
    )
    return Prompt(
        name=shelved.name,
        title=printable(shelved.title),
        description=printable(_first_sentence(shelved.task)),
        arguments=[argument] if variants else None,
    )


def _first_sentence(task: str) -> str:
    """Of the first paragraph that is no heading."""
    paragraphs = (" ".join(part.split()) for part in task.split("\n\n"))
    first = next((part for part in paragraphs if part and not part.startswith("#")), "")
    return re.split(r"(?<=[.?!:])\s", first, maxsplit=1)[0].rstrip(":")[:300]


def _no_more(name: str, given: Mapping[str, str]) -> None:
    if given:
        raise BadInput("arguments", ", ".join(given), f"the prompt {name} has no such argument")


def _said(description: str, text: str) -> GetPromptResult:
    content = TextContent(type="text", text=printable(text))
    return GetPromptResult(
        description=description, messages=[PromptMessage(role="user", content=content)]
    )
