from tool_packs.logit_lens import logit_lens


@expose  # noqa: F821
def lens(
    model: Literal["suspect", "control"],  # noqa: F821
    questions: list[str | list[str]],
    layer: int,
    begin: str = "",
    top: int = 10,
) -> list[dict[str, float]]:
    """What a model would say next if it stopped at a layer (logit lens): tokens with probabilities, for each question.

    Args:
        model: which one
        questions: what the user says, or the turns of a chat (user, assistant, user); 64 at most
        layer: from 0 on, or from the end (-1)
        begin: the words that its reply begins with
        top: how many
    """
    asked = chats(questions, begin)  # noqa: F821
    found = logit_lens(models[model], asked, layers=layer, positions="last", k=top)  # noqa: F821
    return [dict(row["top"]) for row in found.rows]
