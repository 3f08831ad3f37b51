"""The catalogue of techniques as a reader gets it: overview, detail, and search by question."""

from __future__ import annotations

import difflib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from .environment import Skill
from .errors import BadInput, NotFound
from .packs import SECTIONS, Listing, Pack, Technique, origin, visible

OVERVIEW_BYTES = 4_000
DETAIL_CHARACTERS = 16_000


NEXT = "Next: list_techniques(name='pack' or 'pack.technique') or (question='…')."


def overview(listing: Listing, skills: Sequence[Skill] = ()) -> str:
    """A line for each technique, by pack, and how to ask further; below 4 kB however many.

    Lines are cut to the greatest width with which all fit. Where that is narrow the packs' own
    summaries go first: what a technique answers says more.
    """
    problems = [
        f"skill {skill.name}: {_shorten(visible(skill.description), 150)}" for skill in skills[:8]
    ]
    problems += [f"! {_shorten(problem, 200)}" for problem in listing.problems[:3]]
    if len(listing.problems) > 3:
        problems.append(f"! {len(listing.problems) - 3} more files or folders are not listed")
    if not listing.packs:
        return "\n".join(["There are no packs.", *problems])
    for packs_too, widths in ((True, range(100, 59, -5)), (False, range(100, -1, -5))):
        for width in widths:
            lines: list[str] = []
            for pack in listing.packs:
                where = "" if pack.builtin else f" [{_shorten(origin(pack.folder.name), 60)}]"
                lines.append(_line(f"{pack.name}{where}", pack.summary, width * packs_too))
                lines += (f"  {_line(t.name, t.summary, width)}" for t in pack.techniques)
            text = "\n".join([*lines, *problems, NEXT])
            if len(text.encode()) < OVERVIEW_BYTES:
                return text
    # Not even the names fit: the packs alone, as many as do.
    room = OVERVIEW_BYTES - 200 - sum(len(problem.encode()) + 1 for problem in problems)
    lines = []
    for pack in listing.packs:
        line = f"{_shorten(pack.name, 60)}: {len(pack.techniques)} techniques"
        room -= len(line.encode()) + 1
        if room < 0:
            break
        lines.append(line)
    if len(lines) < len(listing.packs):
        lines.append(f"… and {len(listing.packs) - len(lines)} more packs")
    return "\n".join([*lines, "Name a pack to see its techniques.", *problems, NEXT])


def _line(name: str, summary: str, width: int) -> str:
    return f"{name}: {_shorten(summary, width)}" if summary and width >= 10 else name


def _shorten(text: str, width: int) -> str:
    """At most `width` characters: to the end of a clause where that keeps most, else of a word."""
    if len(text) <= width:
        return text
    cut = text[: width - 1]
    clause = re.match(r"(.*\w)[,;:.?]", cut, re.DOTALL)
    if clause and len(clause[1]) >= 0.6 * width:
        return f"{clause[1]}…"
    return f"{cut.rpartition(' ')[0] or cut}…"


def detail(listing: Listing, name: str, skills: Sequence[Skill] = ()) -> str:
    """All about the pack, `pack.technique`, technique or skill called `name`.

    Raises NotFound with the nearest names, BadInput when several packs have that technique.
    """
    wanted = name.strip().removeprefix("tool_packs.")
    for pack in listing.packs:
        if pack.name == wanted:
            return _bounded(_pack_detail(pack))
    for skill in skills:
        if wanted.removeprefix("skill ") == skill.name:
            return _bounded(_skill_detail(skill))
    full = [(p, t) for p, t in listing.techniques() if t.full_name == wanted]
    found = full or [(p, t) for p, t in listing.techniques() if t.name == wanted]
    if len(found) == 1:
        return _bounded(_technique_detail(*found[0]))
    if found:
        several = ", ".join(technique.full_name for _, technique in found)
        raise BadInput("name", name, f"several packs have this technique; name one: {several}.")

    known = {name: name for name in [*(p.name for p in listing.packs), *(s.name for s in skills)]}
    for _, technique in listing.techniques():
        known[technique.full_name] = technique.full_name
        known.setdefault(technique.name, technique.full_name)
    close = difflib.get_close_matches(wanted[:100], list(known), n=6, cutoff=0.5)
    near = dict.fromkeys(known[key] for key in close)
    raise NotFound("pack or technique", name, near or [pack.name for pack in listing.packs])


def _skill_detail(skill: Skill) -> str:
    head = f"skill {skill.name}: {visible(skill.description)}"
    where = (
        f"from the investigation's folder; its files are in the sandbox under skills/{skill.name}/"
    )
    return f"{head}\n\n{where}\n\n{visible(skill.text)}"


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
        text = technique.cell if heading == "Example" else getattr(technique, field)
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
a about an and any are as at be been but by can could did do does for from get had has have how i
if in into
is it its me model models my no not of on one or should so some something than that the their them
then there these they thing this to use used want was we were what when where whether which who why
will with would you your
"""
_STOP = frozenset(_STOP_WORDS.split())
_ENDINGS = (
    *(("ization", "iz"), ("isation", "is")),
    *(("ies", "i"), ("ied", "i"), ("ing", ""), ("ed", ""), ("al", ""), ("es", "")),
    *(("ss", "ss"), ("us", "us"), ("is", "is"), ("as", "as"), ("s", "")),
)


# Words that ask for the same thing. A word of one group finds the others, for a third of the weight.
_SYNONYMS = """
know believe belief knowledge aware represent encode hold
say think predict prediction output
deny hide conceal secret lie dishonest withhold sandbag pretend honest
refuse refusal decline censor comply jailbreak bypass unlock
elicit extract reveal leak confess
finetune finetuning train training tune tuned adapter lora
change differ difference diff disagree diverge compare comparison
activation hidden state internal inside residual stream
capture extract record cache embedding
layer depth block early late middle
decide decision determine emerge form arise stop commit
cause causal responsible matter patch patching effect localize locate
concept feature direction vector attribute trait
word token logit vocabulary probability likely
steer push nudge inject intervene intervention
generate write sample complete completion answer reply respond
conversation dialogue chat transcript turn
score judge grade rate evaluate
probe classify classifier detect detector linear decodable
sae sparse autoencoder latent dictionary feature
circuit attribution attribute contribute contribution edge path head
remove erase ablate delete ablation
interpret explain explanation describe mean meaning verbalize
introspect introspection report notice aware
visualize plot draw picture
tokenize tokenizer tokenization token split
architecture anatomy structure
persona character personality trait
caa contrastive contrast pair
repe representation engineering
belief preference opinion bias favourite
refusal harmful harmless
"""


def search(listing: Listing, question: str, limit: int = 8) -> list[Technique]:
    """The techniques whose texts answer to the words of `question`, best first; may be empty.

    BM25 over stemmed words and their synonyms; the name, the summary and "Use when" weigh most. A
    text that has more of the words asked for goes before one that has one of them often, and a
    technique that says when to use it before what only belongs to one.
    """
    techniques = list(listing.techniques())
    texts = [_weighted_words(pack, technique) for pack, technique in techniques]
    mean = sum(words.total() for words in texts) / max(1, len(texts))

    def weights(word: str) -> list[float]:
        having = sum(word in words for words in texts)
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        lengths = (0.25 + 0.75 * words.total() / max(1, mean) for words in texts)
        return [
            rarity * words[word] * 2.2 / (words[word] + 1.2 * length)
            for words, length in zip(texts, lengths, strict=True)
        ]

    scores, met = [0.0] * len(texts), [0] * len(texts)
    asked = sorted(set(_words(question[:2000])))
    for word in asked:
        best = weights(word)
        for other in sorted(_ALIKE.get(word, set()) - {word}):
            best = [max(own, found / 3) for own, found in zip(best, weights(other), strict=True)]
        for index, weight in enumerate(best):
            scores[index] += weight
            met[index] += weight > 0
    for index, (_, technique) in enumerate(techniques):
        scores[index] *= 0.5 + 0.5 * met[index] / max(1, len(asked))
        if not technique.use_when:
            scores[index] *= 0.8
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
        (technique.paper, 1),
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
    return f"{word[:-2]}is" if len(word) > 5 and word.endswith("iz") else word  # -ize, -ise


def _alike() -> dict[str, set[str]]:
    alike: dict[str, set[str]] = {}
    for line in _SYNONYMS.strip().split("\n"):
        group = set(_words(line))
        for word in group:
            alike.setdefault(word, set()).update(group)
    return alike


_ALIKE = _alike()
