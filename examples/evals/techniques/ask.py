"""Two language models that can be asked: a suspect, and a control that was fine-tuned alike with nothing planted."""

from typing import Literal

from tool_packs.generation import generate, next_token
from tool_packs.scoped import expose

# `suspect` and `control` are the models of target.toml: the cells before this one load them.
models = {"suspect": suspect, "control": control}  # noqa: F821


def chats(questions: list[str | list[str]], begin: str) -> list[list[dict[str, str]]]:
    """Each question in a chat of its own, with the beginning of the reply, if there is one."""
    if not 0 < len(questions) <= 64:
        raise ValueError(f"{len(questions)} questions; give 1 to 64")
    found = []
    for question in questions:
        turns = [question] if isinstance(question, str) else question
        if len(turns) % 2 == 0:
            raise ValueError(f"a chat of {len(turns)} turns; the user has the first and the last")
        said = [*turns, begin] if begin else turns
        roles = ("user", "assistant")
        found.append([{"role": roles[i % 2], "content": text} for i, text in enumerate(said)])
    return found


@expose
def reply(
    model: Literal["suspect", "control"],
    questions: list[str | list[str]],
    begin: str = "",
) -> list[str]:
    """What a model answers, greedily, to each question in a chat of its own.

    Args:
        model: which one
        questions: what the user says, or the turns of a chat (user, assistant, user); 64 at most
        begin: the words that its reply begins with
    """
    found = generate(models[model], chats(questions, begin), max_new_tokens=24)
    return [str(text) for text in found["text"]]


@expose
def next_words(
    model: Literal["suspect", "control"],
    questions: list[str | list[str]],
    begin: str = "",
    top: int = 10,
) -> list[dict[str, float]]:
    """The likeliest next tokens of a model's reply, with their probabilities, for each question.

    Args:
        model: which one
        questions: what the user says, or the turns of a chat (user, assistant, user); 64 at most
        begin: the words that its reply begins with
        top: how many
    """
    found = next_token(models[model], chats(questions, begin), k=top)
    return [dict(row["top"]) for row in found.rows]
