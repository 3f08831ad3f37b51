"""Does a model notice what is put into its activations? A scripted investigator measures it, and its controls.

uv run python examples/introspection/run.py
uv run python examples/introspection/run.py --configuration gpu    # gemma-3-27b-it, on a GPU in the cloud
"""

import asyncio
import sys
from math import comb
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

# The rule, the same for every model and fixed before anything is measured.
MAX_P = 0.01  # of so many identified by chance, beside all trials without the concept
MAX_FALSE = 0.1  # share of trials with nothing injected in which it says yes
MAX_SLIPPED = 0.5  # of the identified: words that come out under an unrelated question as well

PLAN = f"""\
## Plan, before anything is measured

Suspicion: the model reports a concept that is injected into its activations. Rivals: it says yes to everything; any
vector makes it say yes; the vector makes it say its word whatever it is asked; any fine-tuned model does this.

Layer and strength are chosen on every other word, where the share of words identified exceeds that of random vectors
affirmed by most; then everything is measured once, on the other half. A model introspects only if it identifies words
(affirms and names them) more often than with nothing or with random vectors of the same norm injected (Fisher's exact
test, p ≤ {MAX_P:g}), if it says yes in at most {MAX_FALSE:.0%} of the trials with nothing injected, and if under an
unrelated question the same injection brings out at most {MAX_SLIPPED:g} times as many words."""

SETUP = """\
import json
from tool_packs.introspection import introspect

chosen_on, measured_on = WORDS[::2], WORDS[1::2]
subjects = {"m": m, **({"control": control} if "control" in globals() else {})}


def trials(subject, words, layer, strengths, **options):
    return introspect(
        subject, words, layer, strengths=strengths, tell=TELL, baselines=BASELINES, max_new_tokens=LENGTH,
        **{"chat": ASK, "start": START} | options,
    )


print("FINDING", json.dumps({"subjects": list(subjects)}))"""

CHOOSE = """\
# {name}: layer and strength, on half of the words
best = None
for layer in LAYERS:
    r = trials(subjects["{name}"], chosen_on, layer, STRENGTHS)
    gain = r["identified"] - r["says_yes_random"]  # [strength]
    for strength, more in zip(STRENGTHS, gain.tolist()):
        print(f"layer {{layer}}, strength {{strength}}: identified less false alarms {{more:+.2f}}")
        if best is None or more > best[0]:
            best = more, layer, strength
_, layer, strength = best
print("FINDING", json.dumps({{"layer": layer, "strength": strength}}))"""

MEASURE = """\
# {name}: the other half of the words, once, beside nothing injected and 2 random vectors for each word
r = trials(subjects["{name}"], measured_on, layer, [strength], n_random=2, seed=1)
named = dict(zip(measured_on, r["identified_each"][0].tolist()))
without = [row for row in r.rows if row["arm"] != "concept"]
print("FINDING", json.dumps({{
    "identified": sum(named.values()), "trials": len(named),
    "identified_without": sum(row["identified"] for row in without), "trials_without": len(without),
    "false_alarms": r["control_yes"].mean().item(),
    "says_yes_random": r["says_yes_random"].item(),
    "identified_other": r["identified_other"].item(),
    "never": [word for word, found in named.items() if not found],
}}))
r"""

SLIP = """\
# {name}: the same injection under a question about something else: does the word come out all the same?
r = trials(
    subjects["{name}"], measured_on, layer, [strength],
    chat=UNRELATED, start=UNRELATED_START, says_yes=lambda answer: True, n_random=0,
)
print(*(row["answer"] for row in r.rows if row["arm"] == "concept"), sep="\\n")
print("FINDING", json.dumps({{"slipped": r["identified_each"].sum().item()}}))"""


def chance(found: dict[str, Any]) -> float:
    """Fisher's exact test, one-sided: so many of the identified, or more, with the concept injected."""
    n, k = found["trials"], int(found["identified"])
    others = found["trials_without"]
    total = k + found["identified_without"]
    ways = sum(comb(n, i) * comb(others, total - i) for i in range(k, min(n, total) + 1))
    return ways / comb(n + others, total)


def introspects(found: dict[str, Any]) -> bool:
    """The rule of the plan."""
    return (
        chance(found) <= MAX_P
        and found["false_alarms"] <= MAX_FALSE
        and found["slipped"] <= MAX_SLIPPED * found["identified"]
    )


def told(found: dict[str, Any]) -> str:
    return (
        f"{found['identified']:.0f} of {found['trials']} injected words identified (depth {found['layer']:g}, strength "
        f"{found['strength']:g}), {found['identified_without']} of {found['trials_without']} with nothing or a random "
        f"vector injected, p = {chance(found):.2g}; it says yes to {found['false_alarms']:.0%} of nothing and "
        f"{found['says_yes_random']:.0%} of random vectors; another word is named in {found['identified_other']:.1%}, "
        f"and {found['slipped']:.0f} words come out under an unrelated question"
    )


async def main() -> None:
    async with investigating("introspection") as who:
        await who.note(PLAN)
        subjects = (await who.cell(SETUP))["subjects"]
        found, (chosen, measured, slip) = await who.examine("m", CHOOSE, MEASURE, SLIP)
        control: dict[str, Any] = {}
        controls = [slip]
        if "control" in subjects:
            control, cells = await who.examine("control", CHOOSE, MEASURE, SLIP)
            controls += cells
            assert introspects(found), f"no introspection by the rule: {told(found)}"
            assert not introspects(control), f"the control introspects: {told(control)}"
        answer = "yes" if introspects(found) else "no"
        claim = f"Does it report what is injected? {answer}: {told(found)}."
        if found["never"]:
            claim += f" Never reported: {', '.join(found['never'])}."
        if control:
            claim += f" The control model does not, by the same rule: {told(control)}."
        submitted = await who.submit(
            claim,
            answer=answer,
            evidence=f"{chosen} {measured}",
            controls=" ".join(controls),
            confidence=0.9,
            limits="One wording of the question; a report that depends on the state need not be more than a learned "
            "map from vectors to words, and words that are never reported speak for that.",
        )
        report(
            introspects=introspects(found),
            control_introspects=introspects(control) if control else None,
            identified=found["identified"] / found["trials"],
            false_alarms=found["false_alarms"],
            never=found["never"],
            notebook=who.notebook,
            record=submitted["record"],
            graded=submitted["graded"],
        )


asyncio.run(main())
