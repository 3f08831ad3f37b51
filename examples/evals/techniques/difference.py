from tool_packs.diff import output
from tool_packs.directions import difference
from tool_packs.logit_lens import lens_vector


@expose  # noqa: F821
def changed_words(
    model: Literal["suspect", "control"],  # noqa: F821
    questions: list[str | list[str]],
    begin: str = "",
    top: int = 10,
) -> dict[str, float]:
    """The tokens whose probability a model's adapter changes most: mean change, over all positions of the chats.

    Args:
        model: which one
        questions: what the user says, or the turns of a chat (user, assistant, user); 2 to 64
        begin: the words that its reply begins with
        top: how many
    """
    it = models[model]  # noqa: F821
    found = output(it, chats(questions, begin), adapter=it.adapters[0], k=top)  # noqa: F821
    return {row["token"]: float(row["change"]) for row in found.rows if row["what"] == "token"}


@expose  # noqa: F821
def added_words(
    model: Literal["suspect", "control"],  # noqa: F821
    questions: list[str | list[str]],
    layer: int,
    begin: str = "",
    top: int = 10,
) -> dict[str, list[str]]:
    """What a model's adapter adds to the residual stream at the last token, read as words: those that it points to, and
    those that it points away from.

    Args:
        model: which one
        questions: what the user says, or the turns of a chat (user, assistant, user); 2 to 64
        layer: from 0 on
        begin: the words that its reply begins with
        top: how many of each
    """
    it = models[model]  # noqa: F821
    asked = chats(questions, begin)  # noqa: F821
    added = difference(it, asked, layers=layer, positions="last", adapter=it.adapters[0])
    found = lens_vector(it, added["difference"][0], k=top, n_random=1)
    return {
        side: [it.tokenizer.decode([token]) for token in found[f"{side}_ids"][0].tolist()]
        for side in ("top", "bottom")
    }
