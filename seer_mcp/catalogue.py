"""The catalogue of techniques as a reader gets it: overview, detail, and search by question."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter

from .errors import BadInput, NotFound
from .packs import SECTIONS, Listing, Pack, Technique, origin

OVERVIEW_BYTES = 4_000
DETAIL_CHARACTERS = 16_000


def overview(listing: Listing) -> str:
    """A line for each pack and each technique, in less than 4 kB however many there are."""
    problems = [f"! {_shorten(problem, 200)}" for problem in listing.problems[:3]]
    if len(listing.problems) > 3:
        problems.append(f"! {len(listing.problems) - 3} more files or folders are not listed")
    for width in (100, 80, 60, 50, 40, 30, 20, 12, 0):
        lines: list[str] = []
        for pack in listing.packs:
            where = "" if pack.builtin else f" [{_shorten(origin(pack.folder.name), 60)}]"
            lines.append(_line(f"{pack.name}{where}", pack.summary, width))
            lines += (f"  {_line(t.name, t.summary, width)}" for t in pack.techniques)
        text = "\n".join([*lines, *problems])
        if len(text.encode()) < OVERVIEW_BYTES:
            return text or "There are no packs."
    # Not even the names fit: the packs alone, as many as do.
    room = OVERVIEW_BYTES - 100 - sum(len(problem.encode()) + 1 for problem in problems)
    lines = []
    for pack in listing.packs:
        line = f"{_shorten(pack.name, 60)}: {len(pack.techniques)} techniques"
        room -= len(line.encode()) + 1
        if room < 0:
            break
        lines.append(line)
    if len(lines) < len(listing.packs):
        lines.append(f"… and {len(listing.packs) - len(lines)} more packs")
    return "\n".join([*lines, "Name a pack to see its techniques.", *problems])


def _line(name: str, summary: str, width: int) -> str:
    return f"{name}: {_shorten(summary, width)}" if summary and width else name


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    cut = text[: width - 1]
    return f"{cut.rpartition(' ')[0] or cut}…"


def detail(listing: Listing, name: str) -> str:
    """All about the pack, `pack.technique` or technique called `name`.

    Raises NotFound with the nearest names, BadInput when several packs have that technique.
    """
    wanted = name.strip().removeprefix("tool_packs.")
    for pack in listing.packs:
        if pack.name == wanted:
            return _bounded(_pack_detail(pack))
    full = [(p, t) for p, t in listing.techniques() if t.full_name == wanted]
    found = full or [(p, t) for p, t in listing.techniques() if t.name == wanted]
    if len(found) == 1:
        return _bounded(_technique_detail(*found[0]))
    if found:
        several = ", ".join(technique.full_name for _, technique in found)
        raise BadInput("name", name, f"several packs have this technique; name one: {several}.")

    known = {pack.name: pack.name for pack in listing.packs}
    for _, technique in listing.techniques():
        known[technique.full_name] = technique.full_name
        known.setdefault(technique.name, technique.full_name)
    close = difflib.get_close_matches(wanted[:100], list(known), n=6, cutoff=0.5)
    near = dict.fromkeys(known[key] for key in close)
    raise NotFound("pack or technique", name, near or [pack.name for pack in listing.packs])


def _pack_detail(pack: Pack) -> str:
    parts = [f"{pack.name}: {pack.summary}", pack.provenance, pack.description]
    for technique in pack.techniques:
        lines = [technique.signature, f"    {technique.summary}"]
        if technique.use_when:
            lines.append(_indent(f"Use when: {technique.use_when}"))
        parts.append("\n".join(lines))
    if pack.techniques:
        example = next((t for t in pack.techniques if t.use_when), pack.techniques[0])
        parts.append(f"{example.import_line}\nAll about one: {example.full_name}")
    return "\n\n".join(part for part in parts if part)


def _technique_detail(pack: Pack, technique: Technique) -> str:
    parts = [
        f"{technique.full_name}: {technique.summary}",
        pack.provenance,
        f"{technique.import_line}\n{technique.signature}",
        technique.description,
    ]
    for heading, field in SECTIONS.items():
        text = getattr(technique, field)
        if text:
            parts.append(f"{heading}:\n{_indent(text)}")
    return "\n\n".join(part for part in parts if part)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def _bounded(text: str) -> str:
    if len(text) <= DETAIL_CHARACTERS:
        return text
    left_out = len(text) - DETAIL_CHARACTERS
    return f"{text[:DETAIL_CHARACTERS]}\n… {left_out:,} characters omitted; the file has them …"


# Search

_STOP_WORDS = """
a an and any are as at be been but by can could did do does for from had has have how i if in into
is it its me model models my no not of on one or should so some something than that the their them
then there these they thing this to use used want was we were what when where whether which who why
will with would you your
"""
_STOP = frozenset(_STOP_WORDS.split())
_ENDINGS = (
    *(("ies", "i"), ("ied", "i"), ("ing", ""), ("ed", ""), ("al", ""), ("es", "")),
    *(("ss", "ss"), ("us", "us"), ("is", "is"), ("as", "as"), ("s", "")),
)


def search(listing: Listing, question: str, limit: int = 8) -> list[Technique]:
    """The techniques whose texts answer to the words of `question`, best first; may be empty.

    BM25 over stemmed words; the name, the summary and "Use when" weigh most.
    """
    techniques = list(listing.techniques())
    texts = [_weighted_words(pack, technique) for pack, technique in techniques]
    mean = sum(words.total() for words in texts) / max(1, len(texts))
    asked = set(_words(question[:2000]))
    scores = [0.0] * len(texts)
    for word in asked:
        having = sum(word in words for words in texts)
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for index, words in enumerate(texts):
            often = words[word]
            if often:
                length = 0.25 + 0.75 * words.total() / mean
                scores[index] += rarity * often * 2.2 / (often + 1.2 * length)
    ranked = sorted((i for i, score in enumerate(scores) if score), key=lambda i: -scores[i])
    return [techniques[i][1] for i in ranked[:limit]]


def answer(listing: Listing, question: str) -> str:
    """What search found, as text; when it found nothing, what to do next."""
    found = search(listing, question)
    if not found:
        names = ", ".join(pack.name for pack in listing.packs) or "none"
        return (
            "No technique speaks of this. Ask again in other words (what you want to know, or what "
            f"you suspect), look at a pack ({_shorten(names, 600)}), or write it in plain PyTorch."
        )
    packs = {pack.name: pack for pack in listing.packs}
    lines: list[str] = []
    for technique in found:
        origin = packs[technique.pack].provenance
        lines.append(f"{technique.full_name}: {_shorten(technique.summary, 200)}")
        lines += (
            f"    {_shorten(' '.join(text.split()), 300)}"
            for text in (origin, technique.signature, technique.use_when)
            if text
        )
    return "\n".join(lines)


def _weighted_words(pack: Pack, technique: Technique) -> Counter[str]:
    words: Counter[str] = Counter()
    for text, weight in (
        (technique.name, 3),
        (technique.summary, 3),
        (technique.use_when, 3),
        (f"{pack.name} {pack.summary}", 1),
        (technique.description, 1),
        (technique.args, 1),
        (technique.returns, 1),
        (technique.controls, 1),
        (technique.example, 1),
    ):
        for word in _words(text):
            words[word] += weight
    return words


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return [_stem(word) for word in words if word not in _STOP]


def _stem(word: str) -> str:
    """Light: deny, denies, denied and denial meet; know and knew do not."""
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 - len(instead):
            word = word.removesuffix(ending) + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdgmnprt":  # stopped, stop
        word = word[:-1]
    if len(word) > 3 and word[-1] in "ey":
        word = word[:-1] + ("i" if word[-1] == "y" else "")
    return word
