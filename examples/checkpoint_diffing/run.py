"""In what do two checkpoints differ? A scripted investigator ranks features, reads answers, and tests what it read.

uv run python examples/checkpoint_diffing/run.py
uv run python examples/checkpoint_diffing/run.py --configuration gpu    # two models of an API, read by Llama 3.1 8B
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

# The rule, fixed before anything is measured.
MAX_P = 0.01  # of the first feature, over all features
MIN_SHIFT = 0.3  # of the share of fresh answers with the phrase, from a to b
MAX_CONTROL = 0.05  # the same shift of a control

PLAN = f"""\
## Plan, before anything is measured

No hypothesis. Features of the autoencoder are ranked by the difference of the shares of answers that have them; labels
are permuted, and the largest difference of any feature is compared (p ≤ {MAX_P:g}). The same is done with the controls.

From the answers of b in which the first feature fires a phrase is read: words in a row that they have and the answers
of a have not. It is a finding only if on fresh prompts its share is {MIN_SHIFT} or more larger in b than in a, and at
most {MAX_CONTROL} larger in each control."""

QUALITY = """\
# Does the autoencoder explain what the reader computes on these answers?
import json
from tool_packs import sae

with READER.base():
    q = sae.features(READER, SAE, [text for text in DOCS["a"] if text][:60], n=8, examples=2)
print("FINDING", json.dumps({
    "fvu": q["fvu"].item(), "l0": q["l0"].item(), "recovered": q["recovered"].tolist(),
    "answers": {arm: len(docs) for arm, docs in DOCS.items()},
}))
q"""

DIFF = """\
# a against b, and against each control
others = [arm for arm in DOCS if arm != "a"]
with READER.base():
    texts = {arm: [text for text in docs if text] for arm, docs in DOCS.items()}
    diffs = {arm: sae.diff(READER, SAE, texts["a"], b=texts[arm], n_permutations=400) for arm in others}
first = next(row for row in diffs["b"].rows if row["difference"] > 0)
print("FINDING", json.dumps({
    "differing": {arm: r["n_differing"].item() for arm, r in diffs.items()},
    "largest": {arm: r["difference"].abs().max().item() for arm, r in diffs.items()},
    "feature": first["feature"], "p": first["p_family"],
    "frequency": [first["frequency_a"], first["frequency_b"]],
}))
diffs["b"]"""

READ = """\
# The answers of b in which the first features fire, and what they have that the answers of a have not
top = [row["feature"] for row in diffs["b"].rows if row["difference"] > 0][:3]
said = [text for text in DOCS["b"] if text]
with READER.base():
    r = sae.features(READER, SAE, said, which=top, examples=4, loss=False)
for row in r.rows:
    print("feature", row["feature"], *row["examples"], sep="\\n  ")
fires = set(r["prompt"][r["feature"] == top[0]].tolist())


def pieces(text):
    '''All runs of 2 to 4 words.'''
    words = text.split()
    return {" ".join(words[i : i + n]) for n in (2, 3, 4) for i in range(len(words) - n + 1)}


mine = [pieces(said[i]) for i in sorted(fires)]
theirs = [pieces(text) for text in DOCS["a"]]


def excess(piece):
    return sum(piece in p for p in mine) / len(mine) - sum(piece in p for p in theirs) / len(theirs)


by_excess = {piece: excess(piece) for piece in sorted(set().union(*mine))}
most = max(by_excess.values())
phrase = max((piece for piece in by_excess if by_excess[piece] >= 0.8 * most), key=len)  # the longest of the best
print("FINDING", json.dumps({"phrase": phrase, "excess": excess(phrase)}))"""

CONFIRM = """\
# On fresh prompts: the share of answers with the phrase
shares = {arm: sum(phrase in text for text in docs) / len(docs) for arm, docs in fresh.items()}
print("FINDING", json.dumps({"shares": shares, "fresh": len(FRESH)}))"""


async def main() -> None:
    async with investigating("checkpoint_diffing") as who:
        await who.note(PLAN)
        found = {}
        cells = []
        for step in (QUALITY, DIFF, READ, CONFIRM):
            found |= await who.cell(step)
            cells.append(who.last_cell)
        shares, differing = found["shares"], found["differing"]
        shift = {arm: share - shares["a"] for arm, share in shares.items() if arm != "a"}
        controls = [arm for arm in shift if arm != "b"]
        confirmed = (
            found["p"] <= MAX_P
            and shift["b"] >= MIN_SHIFT
            and all(shift[arm] <= MAX_CONTROL for arm in controls)
        )
        if "control" in controls:  # the small models: what is there is found, and nothing else
            assert confirmed, f"nothing was confirmed: {found}"
            assert all(differing[arm] <= 0.05 * differing["b"] for arm in controls), (
                f"controls differ: {found}"
            )
        counted = ", ".join(f"{arm} {share:.2f}" for arm, share in shares.items())
        claim = (
            f"{differing['b']} features differ between a and b (p ≤ 0.05 over all features; "
            + ", ".join(f"{arm}: {differing[arm]}" for arm in controls)
            + f"). Feature {found['feature']} is in {found['frequency'][0]:.2f} of a's answers and "
            f"{found['frequency'][1]:.2f} of b's (p = {found['p']:.3g}). Its answers say {found['phrase']!r}; on "
            f"{found['fresh']} fresh prompts the shares are {counted}: {'confirmed' if confirmed else 'not confirmed'}."
        )
        submitted = await who.submit(
            claim,
            answer=found["phrase"] if confirmed else "nothing confirmed",
            evidence=" ".join(cells),
            controls=f"{cells[1]} {cells[3]}",  # the controls stand in the same cells
            confidence=0.9 if confirmed else 0.3,
            limits="Only differences that show in runs of words are tested; differences of tone would need a judge. "
            "The prompts are of a few kinds; what b does elsewhere was not looked at.",
        )
        report(
            confirmed=confirmed,
            differing=differing,
            phrase=found["phrase"],
            shares=shares,
            fvu=found["fvu"],
            notebook=who.notebook,
            record=submitted["record"],
            graded=submitted["graded"],
        )


asyncio.run(main())
