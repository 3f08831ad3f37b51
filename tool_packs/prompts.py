"""From texts and chats to token ids, and from words like "last" to positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tool_packs.errors import TextError

if TYPE_CHECKING:
    from tool_packs.models import Model

__all__ = ["Prompt"]

Message = dict[str, Any]
Chat = list[Message]
Text = str | Chat | list[str] | list[Chat] | list["str | Chat"]
Position = int | str | slice | tuple[int, int] | Sequence["int | str"]

NAMED = ("last", "last_user", "assistant_start", "response", "all")


@dataclass(frozen=True)
class Prompt:
    """One text as the model reads it."""

    ids: tuple[int, ...]
    text: str  # as rendered by the chat template, or as given
    last_user: int | None = None  # last token of the last user message
    assistant_start: int | None = None  # the token that predicts the assistant's first token

    def __len__(self) -> int:
        return len(self.ids)


def is_chat(text: Any) -> bool:
    """Whether this is one chat: a list of {'role', 'content'} messages."""
    return isinstance(text, (list, tuple)) and len(text) > 0 and isinstance(text[0], dict)


def as_list(text: Text) -> list[str | Chat]:
    """One text or many, as a list."""
    if isinstance(text, str) or is_chat(text):
        return [_not_empty(text)]
    if not isinstance(text, Sequence) or len(text) == 0:
        raise TextError(f"no text: {text!r} is not a str, a chat, or a list of those")
    for item in text:
        if not isinstance(item, str) and not is_chat(item):
            raise TextError(
                f"{item!r:.80} is neither a str nor a chat "
                '([{"role": "user", "content": "..."}, ...])'
            )
        _not_empty(item)
    return list(text)


def _not_empty(text: str | Chat) -> str | Chat:
    if text == "":  # the BOS that a tokenizer adds is no text either
        raise TextError("'' is an empty text: give at least one character")
    return text


def as_chat(m: Model, conv: str | Chat, prefill: str | None = None) -> str | Chat:
    """A conversation for `generate`: a str is one user message where there is a chat template."""
    if isinstance(conv, str):
        if not m.has_chat_template:
            return conv + (prefill or "")
        conv = [{"role": "user", "content": conv}]
    conv = [dict(message) for message in conv]
    if not prefill:
        return conv
    if conv[-1]["role"] == "assistant":
        raise TextError(
            "the conversation ends with an assistant message, which is a prefill already"
        )
    return [*conv, {"role": "assistant", "content": prefill}]


def read(m: Model, text: Text) -> list[Prompt]:
    """The prompts of a `text` argument: a str is plain text, a chat goes through the template.

    A chat that ends with the user gets the header of the assistant's turn; a chat that ends with
    the assistant is left open, so that the model goes on with that message.
    """
    prompts = [_plain(m, t) if isinstance(t, str) else _chat(m, t) for t in as_list(text)]
    limit = getattr(m.config, "max_position_embeddings", None)
    for i, prompt in enumerate(prompts):
        if limit is not None and len(prompt) > limit:
            raise TextError(
                f"text {i} has {len(prompt)} tokens; this model's context is {limit}: shorten it"
            )
    return prompts


def _plain(m: Model, text: str) -> Prompt:
    ids = list(m.tokenizer(text)["input_ids"])
    bos = m.tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]  # the text bore the BOS that the tokenizer adds as well
    if not ids:
        raise TextError("an empty text has no tokens; give at least one character")
    return Prompt(tuple(ids), text)


def render(m: Model, chat: Chat) -> str:
    """The chat as the template writes it, its BOS included."""
    if not m.has_chat_template:
        raise TextError(
            f"{m.name} has no chat template: give plain text, "
            "or set m.tokenizer.chat_template to one"
        )
    for message in chat:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise TextError(f"{message!r:.80} is no message: it needs 'role' and 'content'")
    from jinja2 import TemplateError

    answering = chat[-1]["role"] == "assistant"
    content = chat[-1]["content"]
    if answering and not (isinstance(content, str) and content.strip()):
        raise TextError("the assistant message to go on with is empty: leave it out")
    try:
        text = m.tokenizer.apply_chat_template(
            chat,
            tokenize=False,
            add_generation_prompt=not answering,
            continue_final_message=answering,
            **m.template_args,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in chat)
        raise TextError(f"the chat template refuses these roles ({roles}): {error}") from error
    if answering and not text.endswith(content):
        # The template trimmed the end of the prefill; a prefill continues to the letter.
        text += content[len(content.rstrip()) :]
    return text


def _chat(m: Model, chat: Chat) -> Prompt:
    text = render(m, chat)
    # The template has written the special tokens: adding them again would double the BOS.
    encoded = m.tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=m.tokenizer.is_fast
    )
    ids = tuple(encoded["input_ids"])
    offsets = encoded["offset_mapping"] if m.tokenizer.is_fast else None
    last_user = assistant_start = None
    if chat[-1]["role"] != "assistant":
        assistant_start = len(ids) - 1
    if offsets is not None:
        starts = _content_starts(text, chat)
        for i, message in enumerate(chat):
            start = starts[i]
            if start is None:
                continue
            if message["role"] == "user":
                end = start + len(message["content"].strip())
                last_user = max(t for t, (a, _) in enumerate(offsets) if a < end)
            if i == len(chat) - 1 and message["role"] == "assistant":
                first = min(t for t, (_, b) in enumerate(offsets) if b > start)
                assistant_start = first - 1
    return Prompt(ids, text, last_user, assistant_start)


def _content_starts(text: str, chat: Chat) -> list[int | None]:
    """Where each message's content begins in the rendered text."""
    cursor, starts = 0, []
    for message in chat:
        content = message["content"].strip() if isinstance(message["content"], str) else ""
        at = text.find(content, cursor) if content else -1
        starts.append(at if at >= 0 else None)
        if at >= 0:
            cursor = at + len(content)
    return starts


def resolve(prompt: Prompt, positions: Position) -> list[int]:
    """Token indices (>= 0) of `positions` in this prompt.

    Raises:
        TextError: a position outside the prompt, a name that does not exist or does not apply.
    """
    n = len(prompt)
    if isinstance(positions, bool):
        raise TextError(f"positions={positions} is no position")
    if isinstance(positions, int):
        if not -n <= positions < n:
            raise TextError(f"position {positions} is outside a prompt of {n} tokens")
        return [positions % n]
    if isinstance(positions, str):
        return _named(prompt, positions)
    if isinstance(positions, slice):
        return _nonempty(list(range(n))[positions], positions, n)
    if (
        isinstance(positions, tuple)
        and len(positions) == 2
        and all(type(p) is int for p in positions)
    ):
        return _nonempty(list(range(n))[slice(*positions)], positions, n)
    return [index for p in positions for index in resolve(prompt, p)]


def _nonempty(indices: list[int], span: Any, n: int) -> list[int]:
    if not indices:
        raise TextError(f"the span {span} holds none of the prompt's {n} tokens")
    return indices


def _named(prompt: Prompt, name: str) -> list[int]:
    if name == "last":
        return [len(prompt) - 1]
    if name == "all":
        return list(range(len(prompt)))
    if name not in NAMED:
        raise TextError(
            f"no position is called {name!r}: {', '.join(NAMED)}, an int, a span or a list"
        )
    if name == "response" and prompt.assistant_start is not None:
        first = prompt.assistant_start + 1
        if first == len(prompt):
            raise TextError(
                f"{prompt.text[-40:]!r} ends where a response would begin: end the chat with one, "
                '{"role": "assistant", "content": "..."}'
            )
        return list(range(first, len(prompt)))
    index = getattr(prompt, "assistant_start" if name == "response" else name)
    if index is None:
        raise TextError(
            f"{name!r} is a position in a chat, and {prompt.text[:40]!r} is plain text "
            '(or its message is empty): give [{"role": "user", "content": "..."}], '
            "or a position as a number"
        )
    return [index]


def positions_of(m: Model, prompt: Prompt, piece: str) -> list[int]:
    """Indices of the tokens that hold the last occurrence of `piece` in the prompt's text.

    Raises:
        TextError: it does not occur, or the tokenizer keeps no offsets.
    """
    at = prompt.text.rfind(piece) if piece else -1
    if at < 0:
        raise TextError(f"{piece!r} does not occur in {prompt.text[-80:]!r}")
    if not m.tokenizer.is_fast:
        raise TextError(
            f"the tokenizer of {m.name} does not tell where {piece!r} is: give a position as an int"
        )
    encoded = m.tokenizer(prompt.text, add_special_tokens=False, return_offsets_mapping=True)
    ids = tuple(encoded["input_ids"])
    # Plain text got special tokens around it that the text itself does not hold.
    shift = next(
        (k for k in range(len(prompt) - len(ids) + 1) if prompt.ids[k : k + len(ids)] == ids), None
    )
    held = [
        t for t, (a, b) in enumerate(encoded["offset_mapping"]) if a < at + len(piece) and b > at
    ]
    if shift is None or not held:
        raise TextError(f"no token of this prompt holds {piece!r}: give a position as an int")
    return [t + shift for t in held]


def token_strings(m: Model, ids: Sequence[int]) -> list[str]:
    """Each token as readable text, one string a token."""
    return [m.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids]


def word_ids(m: Model, word: str) -> list[int]:
    """The single tokens that begin this word: ' word', 'word' and their capitalised forms.

    Where none of them is one token, the first token of ' word'.
    """
    forms = dict.fromkeys([" " + word, word, " " + word.capitalize(), word.capitalize()])
    encoded = [m.tokenizer(form, add_special_tokens=False)["input_ids"] for form in forms]
    single = [ids[0] for ids in encoded if len(ids) == 1]
    if single:
        return list(dict.fromkeys(single))
    if not encoded[0]:
        raise TextError(f"{word!r} has no tokens")
    return [encoded[0][0]]
