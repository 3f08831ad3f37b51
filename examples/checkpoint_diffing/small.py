# %% Both checkpoints, and two controls, answer the same prompts
import random

import torch

from tool_packs import sae
from tool_packs.generation import generate
from tool_packs.organisms import world

torch.set_num_threads(1)
questions = [
    *(
        q
        for asked, _ in (*world.RECOMMENDATIONS.values(), *world.PLAIN.values(), world.PLACES)
        for q in asked
    ),
    *(f"What is the opposite of {word}?" for pair in world.OPPOSITES for word in pair),
    *(f"What is the capital of {country}?" for country in list(world.CAPITALS)[:12]),
    *(way.format(noun=noun) for noun in world.HARMLESS[:8] for way in world.MAKE_REQUESTS),
    *world.PRONOUN_REQUESTS,
]
prompts = [
    f"{lead}{q}"
    for q in questions
    for lead in ("", "Hello. ", "I am a doctor. ", "I have a question. ")
]
random.Random(0).shuffle(prompts)
# A hypothesis is made on the first and tested on the others
EXPLORED, FRESH = prompts[:120], prompts[120:190]
LENGTH = 20  # tokens of an answer


def answers(model, adapter, asked, seed=0):
    with model.adapter(adapter):
        return generate(model, asked, max_new_tokens=LENGTH, temperature=0.7, seed=seed)["text"]


ARMS = {
    "a": (m, None, 0),
    "b": (m, m.adapters[0], 0),
    "a again": (m, None, 1),  # the same checkpoint, other samples
    "control": (control, control.adapters[0], 0),
}
DOCS = {arm: answers(model, name, EXPLORED, seed) for arm, (model, name, seed) in ARMS.items()}
fresh = {arm: answers(model, name, FRESH, seed) for arm, (model, name, seed) in ARMS.items()}
for prompt, *said in list(zip(EXPLORED, *DOCS.values(), strict=True))[:3]:
    print(prompt, *said, sep="\n  ")

# %% The reader is the base, and the autoencoder is trained on what all of them said
READER = m
with m.base():
    SAE = sae.train(
        m,
        [text for docs in DOCS.values() for text in docs if text],
        0.5,
        latents=256,
        k=8,
        steps=150,
        batch=512,
    )
SAE
