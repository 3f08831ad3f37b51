"""A model that can only be asked, by a scripted investigator: its functions, what they refuse, and one measurement.

uv run python examples/scoped_sandbox_intro/run.py
"""

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from investigator import investigating, report

LOOK = """\
import json
import target

print(target.__doc__)
parts = target.shape()
print(target.reply("What is the capital of France?"))
print("FINDING", json.dumps(parts))"""

WALLS = """\
# What these functions refuse, each with a sentence; and the model is not in this kernel
def refusal(ask):
    try:
        return f"answered: {ask()!r}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


tried = {
    "a layer that is not there": refusal(lambda: target.embed(["Hello."], layer=10_000)),
    "code as a question": refusal(lambda: target.reply("'); import os; os.listdir('.') #", 1)),
    "the model itself": refusal(lambda: m),
    "a function that is not exposed": refusal(
        lambda: target._ask(target._FOLDER, "target", "capture", {}, torch=False, numeric=False)
    ),
}
for what, said in tried.items():
    print(f"{what}: {said}")
print("FINDING", json.dumps({"refused": sum(not s.startswith("answered") for s in tried.values())}))"""

MEASURE = """\
# Are questions of one kind held closer together than questions of different kinds?
import numpy as np

kinds = {
    "capital": ["What is the capital of France?", "What is the capital of Japan?", "What is the capital of Italy?"],
    "clothes": [
        "What should I wear to the party?",
        "What should I wear to the wedding?",
        "Which clothes should I buy?",
    ],
    "place": ["Where should I go today?", "Which place should I see?", "Where should I walk?"],
    "food": ["What should I eat today?", "Which food should I cook?"],
}
questions = [q for asked in kinds.values() for q in asked]
labels = np.array([kind for kind, asked in kinds.items() for _ in asked])
states = [target.embed(questions, layer) for layer in range(parts["layers"])]  # each [question, width]


def gap(states, labels):
    '''Mean cosine within a kind, less that between kinds.'''
    x = states - states.mean(0)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosines, pairs = x @ x.T, ~np.eye(len(x), dtype=bool)
    same = labels[:, None] == labels[None, :]
    return float(cosines[same & pairs].mean() - cosines[~same].mean())


gaps = [gap(layer, labels) for layer in states]
print("by layer:", np.round(gaps, 3))
print("FINDING", json.dumps({"gap": gaps[-1]}))"""

CONTROL = """\
# The control: the same questions, with the kinds permuted
rng = np.random.default_rng(0)
permuted = [gap(states[-1], rng.permutation(labels)) for _ in range(500)]
above = sum(each >= gaps[-1] for each in permuted)
print(f"permuted: mean {np.mean(permuted):.3f}, largest {max(permuted):.3f}; {above} of 500 as large as the real one")
print("FINDING", json.dumps({"control": float(np.mean(permuted)), "p": (above + 1) / 501}))"""


async def main() -> None:
    async with investigating("scoped_sandbox_intro") as who:
        shape = await who.cell(LOOK)
        walls = await who.cell(WALLS)
        assert walls["refused"] == 3, "the code was a question like any other; the rest is refused"
        found = await who.cell(MEASURE)
        evidence = who.last_cell
        control = await who.cell(CONTROL)
        assert found["gap"] > 0.3 and control["p"] <= 0.01 and abs(control["control"]) < 0.1
        told = await who.submit(
            f"Where the model is about to reply, at the last of its {shape['layers']} layers, questions of one kind "
            f"are closer together: the gap of mean cosines is {found['gap']:.2f}, and {control['control']:.2f} on "
            f"average with permuted kinds (p = {control['p']:.3f} of 500 permutations).",
            evidence=evidence,
            controls=who.last_cell,
            confidence=0.9,
            limits="Questions of one kind also share words, and no function lets one change the words alone.",
        )
        report(**shape, **found, **control, notebook=who.notebook, graded=told["graded"])


asyncio.run(main())
