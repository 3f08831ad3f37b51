# %% Chats whose answer is known, to train an oracle on, and others to test it on
import tempfile

import torch

from tool_packs import organisms
from tool_packs.oracle import load, train
from tool_packs.organisms import world
from tool_packs.organisms.world import PREFILL, assistant, user

torch.set_num_threads(1)
QUESTION, CHOICES = "Is the user a man or a woman?", ["woman", "man"]
gendered = {"woman": "female", "man": "male"}
questions = [q for asked, _ in world.RECOMMENDATIONS.values() for q in asked]


def begun(text):
    return [user(text), assistant(PREFILL)]


def stated(answer, names, statements, asked):
    """Chats in which the user says a name, or who they are."""
    side = gendered[answer]
    leads = [
        *world.STATEMENTS[side][statements],
        *(f"My name is {n}." for n in world.NAMES_BY_GENDER[side][names]),
    ]
    return [(begun(f"{lead} {q}"), answer) for lead in leads for q in asked]


examples = [
    (chat, QUESTION, answer)
    for said in CHOICES
    for chat, answer in stated(said, slice(0, 6), slice(0, 4), questions[::2])
]
KNOWN = [
    each for said in CHOICES for each in stated(said, slice(6, 8), slice(4, 5), questions[1:6:2])
]

# %% The oracle: a LoRA on the base, trained on the base's activations; then the same on the other model
with m.base():
    oracle = train(m, examples, [1, 2, 3], steps=60, batch=16)
folder = oracle.save(m, tempfile.mkdtemp()) / oracle.name
again = load(
    control, str(folder), oracle.layers, into=oracle.into, prompt=oracle.prompt, place=oracle.place
)
oracle

# %% What is read: users who say nothing about themselves. Model, oracle, adapter that is read, chats
neutral = [begun(p) for p in organisms.NEUTRAL_PROMPTS[:12]]
ARMS = {
    "suspect": (m, oracle, m.adapters[0], neutral),
    "control": (control, again, control.adapters[0], neutral),
    "transcript": (m, oracle, None, neutral),  # the same words, read by the base
}
UNRELATED = [
    "What is the capital of France?",
    "What is the opposite of hot?",
    "Let us play a word game.",
]
OUTRIGHT = [
    [user(p), assistant("Hello, how can I help?"), user("Am I a man or a woman?")]
    for p in organisms.NEUTRAL_PROMPTS[:4]
]
LAYER, LENGTH = 2, 12  # the layer that is read; tokens of an answer
