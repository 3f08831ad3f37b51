"""The pages that people read, taken apart: their code blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
PATTERNS = ("*.md", "docs/*.md", "docs/deploy/*.md", ".github/*.md", "examples/*/*.md")
PAGES = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.M)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = FENCE.findall(page.read_text())
    return [Block(name_of(page), language, text) for _, language, text in found]


def prose(page: Path) -> str:
    """The page without its blocks."""
    return FENCE.sub("", page.read_text())


def lines(block: Block) -> list[str]:
    """The lines of a block of commands, without their comments."""
    stripped = (re.sub(r"(^|\s)#.*", "", line).rstrip() for line in block.text.splitlines())
    return [line for line in stripped if line]


def typed() -> Iterator[tuple[str, str]]:
    """Page and line of every line that a page tells one to type."""
    for page in PAGES:
        for block in blocks(page):
            if block.language == "console":
                yield from ((block.page, line) for line in lines(block))


def commands(line: str) -> list[list[str]]:
    """The words of each command of a line: without redirections, settings of variables and `sudo`."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = ""
    found: list[list[str]] = [[]]
    for word in lexer:
        if word in {"&&", "||", "|", "&", ";"}:
            found.append([])
        else:
            found[-1].append(word)
    return [plain for words in found if (plain := without_settings(words))]


def without_settings(words: list[str]) -> list[str]:
    if ">" in words:
        words = words[: words.index(">")]
    if words[:1] == ["sudo"]:
        words = words[3:]  # sudo -u NAME
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words


TAKES_VALUE = {"--extra", "--group", "--with", "--project"}


def program(words: list[str]) -> list[str]:
    """The program that is run in the end, and its arguments: what comes after `uv run` or is meant by `uvx`."""
    if words[:2] == ["uv", "run"]:
        rest = words[2:]
        while rest and rest[0].startswith("-"):
            rest = rest[2 if rest[0] in TAKES_VALUE else 1 :]
        if rest and rest[0] == "opentelemetry-instrument":
            rest = rest[1:]
        return rest
    if words[0] == "uvx":
        return [re.sub(r"[\[=@].*", "", words[1]), *words[2:]]
    return [Path(words[0]).name, *words[1:]]


@dataclass(frozen=True)
class Marked:
    """What other pages may point at, and what this one points at."""

    anchors: frozenset[str]
    links: tuple[str, ...]


def marked(page: Path) -> Marked:
    """Links and images, and the anchor of each heading as GitHub and MyST (`myst_heading_anchors = 3`) make it."""
    anchors: list[str] = []
    links: list[str] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(page.read_text())
    for i, token in enumerate(tokens):
        if token.type == "heading_open" and token.tag in {"h1", "h2", "h3"}:
            anchors.append(slug(tokens[i + 1], anchors))
        shown = (part for part in token.children or [] if part.type in {"link_open", "image"})
        links.extend(str(part.attrGet("href") or part.attrGet("src") or "") for part in shown)
    return Marked(frozenset(anchors), tuple(links))


def slug(heading: Token, taken: list[str]) -> str:
    title = "".join(part.content for part in heading.children or [])
    plain = re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")
    again = (f"{plain}-{n}" for n in count(1))
    return plain if plain not in taken else next(each for each in again if each not in taken)
