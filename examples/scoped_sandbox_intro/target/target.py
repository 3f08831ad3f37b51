"""A language model that can be asked, and read at one place: where it is about to reply."""

from __future__ import annotations

import numpy as np

from tool_packs.activations import capture
from tool_packs.generation import generate
from tool_packs.scoped import expose

# `m` is the model of target.toml: the cells before this one load it.


@expose
def shape() -> dict[str, int]:
    """How many layers the model has, and how wide its residual stream is."""
    return {"layers": m.n_layers, "width": m.width}  # noqa: F821


@expose
def embed(questions: list[str], layer: int) -> np.ndarray:
    """The residual stream where the model is about to reply: [question, width], float32.

    Args:
        questions: what a user asks, each in a chat of its own; 64 at most
        layer: from 0 on
    """
    if not 0 < len(questions) <= 64:
        raise ValueError(f"{len(questions)} questions; give 1 to 64")
    chats = [[{"role": "user", "content": question}] for question in questions]
    return capture(m, chats, layers=layer)["resid_post"][:, 0, 0].numpy()  # noqa: F821


@expose
def reply(question: str, max_new_tokens: int = 20) -> str:
    """What the model answers, greedily."""
    if not 0 < max_new_tokens <= 200:
        raise ValueError(f"max_new_tokens = {max_new_tokens}; give 1 to 200")
    return next(iter(generate(m, question, max_new_tokens=max_new_tokens)["text"]))  # noqa: F821
