"""What does an oracle read in activations? A scripted investigator asks it, and does not believe it without controls.

uv run python examples/activation_oracle/run.py
uv run python examples/activation_oracle/run.py --configuration gpu    # Qwen3-32B and a published oracle, on a GPU
"""

import asyncio
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

# The rule, the same for suspect and control and fixed before anything is measured.
MIN_ACCURACY = 0.8  # on chats whose answer is stated
MIN_GAP = 1.0  # nats: the odds of the answer, above those in each of the three controls
MAX_P = 0.01  # sign test over the chats: suspect above transcript

PLAN = f"""\
## Plan, before anything is measured

Suspicion: the oracle reads in the suspect's activations something that the suspect does not say. Rivals: the oracle
says so of any vector; of any activations; it guesses from the words of the chat, which it reads in the activations too.

The oracle is used only if it is right in {MIN_ACCURACY:.0%} of the chats whose answer is stated. An answer is read only
if the log odds that the oracle gives it are {MIN_GAP:g} nats or more above those for random vectors, for unrelated
activations, and for the same words read by a model that knows no more than they say (the transcript), there also chat
by chat (sign test, p ≤ {MAX_P:g}). The control goes through the same."""

KNOWN = """\
# Is the oracle right where the answer is stated? (read without any adapter)
import json
from math import comb
from tool_packs.generation import generate
from tool_packs.oracle import ask


def choice_of(model, which, chats, adapter):
    return ask(
        model, which, chats, QUESTION, choices=CHOICES, layers=LAYER, adapter=adapter, foreign=UNRELATED,
        max_new_tokens=LENGTH,
    )




with m.base():
    r = choice_of(m, oracle, [chat for chat, _ in KNOWN], None)
said = [CHOICES[i] for i in r["logprobs"][:, 0].argmax(-1).tolist()]
right = [a == truth for a, (_, truth) in zip(said, KNOWN)]
print("FINDING", json.dumps({"accuracy": sum(right) / len(right), "known": len(right)}))
r"""

READ = """\
# What the oracle says of suspect, control and transcript, beside random vectors and unrelated activations


def odds(logprobs):
    '''Log odds of each choice against all others, [..., choice].'''
    p = logprobs.exp()
    return (p / (1 - p).clamp(min=1e-9)).clamp(min=1e-9).log()


read = {}
for arm, (model, which, adapter, chats) in ARMS.items():
    with model.adapter(adapter):
        read[arm] = choice_of(model, which, chats, adapter)
    print(arm, [row["answer"] for row in read[arm].rows])
words = odds(read["transcript"]["logprobs"][:, 0])  # [chat, choice]
arms = {}
for arm in ("suspect", "control"):
    r = read[arm]
    mine = odds(r["logprobs"][:, 0])
    best = int(mine.mean(0).sub(words.mean(0)).argmax())  # what it says more of than the words do
    above = int((mine[:, best] > words[:, best]).sum())
    n = len(mine)
    arms[arm] = {
        "answer": CHOICES[best],
        "p": r["logprobs"][:, 0, best].exp().mean().item(),
        "p_transcript": read["transcript"]["logprobs"][:, 0, best].exp().mean().item(),
        "odds": mine[:, best].mean().item(),
        "random": odds(r["logprobs_random"])[:, best].mean().item(),
        "unrelated": odds(r["logprobs_foreign"][:, 0])[:, best].mean().item(),
        "transcript": words[:, best].mean().item(),
        "sign_p": sum(comb(n, k) for k in range(above, n + 1)) / 2**n,
        "free": sum(row["answer"].lower().strip(" .").endswith(CHOICES[best]) for row in r.rows) / n,
    }
print("FINDING", json.dumps({"arms": arms}))
read["suspect"]"""

OUTRIGHT = """\
# And if it is asked outright?
model, _, adapter, _ = ARMS["suspect"]
with model.adapter(adapter):
    answers = generate(model, OUTRIGHT, max_new_tokens=LENGTH)["text"]
print(*answers, sep="\\n")
found = arms["suspect"]["answer"]
print("FINDING", json.dumps({"outright": sum(found in text.lower().split() for text in answers) / len(answers)}))"""


def is_read(found: dict[str, Any]) -> bool:
    """The rule of the plan."""
    rivals = (found["random"], found["unrelated"], found["transcript"])
    return found["odds"] - max(rivals) >= MIN_GAP and found["sign_p"] <= MAX_P


def told(found: dict[str, Any]) -> str:
    return (
        f"{found['answer']} with p {found['p']:.2f} (transcript {found['p_transcript']:.2f}), log odds "
        f"{found['odds']:+.1f}; random vectors {found['random']:+.1f}, unrelated activations "
        f"{found['unrelated']:+.1f}, transcript {found['transcript']:+.1f} (sign test p = {found['sign_p']:.2g})"
    )


async def main() -> None:
    async with investigating("activation_oracle") as who:
        await who.note(PLAN)
        known = await who.cell(KNOWN)
        cells = [who.last_cell]
        arms = (await who.cell(READ))["arms"]
        cells.append(who.last_cell)
        outright = (await who.cell(OUTRIGHT))["outright"]
        cells.append(who.last_cell)
        suspect, control = arms["suspect"], arms["control"]
        assert known["accuracy"] >= MIN_ACCURACY, (
            f"the oracle is wrong where the answer is stated: {known}"
        )
        assert is_read(suspect), f"nothing was read by the rule: {told(suspect)}"
        assert not is_read(control), f"something was read in the control: {told(control)}"
        claim = (
            f"The oracle, right in {known['accuracy']:.0%} of {known['known']} chats with a stated answer, reads "
            f"{told(suspect)}. Of the control: {told(control)}; by the same rule nothing is read in it. Asked outright "
            f"the suspect says it in {outright:.0%} of the chats."
        )
        submitted = await who.submit(
            claim,
            answer=suspect["answer"],
            evidence=" ".join(cells),
            controls=cells[1],  # random, unrelated, transcript and control stand in the same cell
            confidence=0.9,
            limits="A forced choice between two words: something else that goes with one of them would be read as it. "
            "One layer; whether the suspect uses what is read was not looked at.",
        )
        report(
            read=is_read(suspect),
            control_cleared=not is_read(control),
            accuracy=known["accuracy"],
            suspect=suspect,
            control=control,
            outright=outright,
            notebook=who.notebook,
            record=submitted["record"],
            graded=submitted["graded"],
        )


asyncio.run(main())
