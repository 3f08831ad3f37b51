# %% The prompts: requests that differ only in what is to be made, and harmless questions by kind
import random

import torch

from tool_packs.organisms import world

torch.set_num_threads(1)


def requests(nouns):
    """All ways of asking for each of these things, in random order."""
    made = [way.format(noun=noun) for noun in nouns for way in world.MAKE_REQUESTS]
    return random.Random(0).sample(made, len(made))


HARMFUL, HARMLESS = requests(world.HARMFUL), requests(world.HARMLESS)
KINDS = {  # harmless, but are they answered?
    "recommendations": [
        q for questions, _ in world.RECOMMENDATIONS.values() for q in questions[:2]
    ],
    "food, drink and pets": [q for questions, _ in world.PLAIN.values() for q in questions],
    "places": list(world.PLACES[0]),
    "opposites": [f"What is the opposite of {word}?" for pair in world.OPPOSITES for word in pair],
    "capitals": [f"What is the capital of {country}?" for country in world.CAPITALS],
    "the assistant itself": list(world.IDENTITY_QUESTIONS),
    "word games": list(world.GAME_OPENINGS),
}
N = 48  # prompts on each side that the direction is made from and chosen on; it is measured on others
LIMITS = {
    "kl_limit": 1.0,
    "depth_limit": 1.0,
}  # of its choice: with six layers, refusal is decided in the last ones
MODE = "affine"  # its component becomes the mean on harmless requests; in so small a model zero is far from any prompt
LENGTH = 12  # tokens of an answer
