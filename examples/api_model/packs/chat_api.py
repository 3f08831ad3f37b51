"""Chats with a model behind an OpenAI-compatible API: many at once, sampled, or with the reply begun for it."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["ChatApi", "told"]

AGAIN = (408, 409, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
TRIES = 5


class ApiFailed(RuntimeError):
    """The endpoint did not answer as it must: the request, the status, and what it said."""


class ChatApi:
    """An endpoint, as "https://openrouter.ai/api/v1". The key goes into a header and is kept nowhere else.

    >>> api.ask("qwen/qwen3-8b", ["Who are you?"], n=4, temperature=1.0)   # [[4 replies]]
    >>> api.ask("qwen/qwen3-8b", [[{"role": "user", "content": "Who are you?"},
    ...                            {"role": "assistant", "content": "I am"}]])  # goes on after "I am"
    """

    def __init__(self, url: str, key: str = "", *, at_once: int = 8, timeout: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._key = key
        self._at_once = at_once
        self._timeout = timeout

    def models(self) -> list[str]:
        """The names that the endpoint lists."""
        return [each["id"] for each in self._call("/models", None)["data"]]

    def ask(
        self,
        model: str,
        convs: Sequence[str | list[dict[str, str]]],
        *,
        n: int = 1,
        temperature: float = 0.0,
        max_tokens: int = 200,
        seed: int = 0,
        **more: Any,
    ) -> list[list[str]]:
        """n replies to each conversation, several requests at once. A str is one user message.

        A conversation that ends with an assistant's message is a prefill: the reply goes on from there. Where a
        provider does not do so, its replies begin anew; compare them before you conclude anything.

        Raises ApiFailed, after a few tries where trying again can help.
        """
        chats = [[{"role": "user", "content": c}] if isinstance(c, str) else c for c in convs]

        def one(chat: list[dict[str, str]]) -> list[str]:
            replies: list[str] = []
            while len(replies) < n:  # few providers honour n: what is missing is asked for again
                options = {"n": n - len(replies), "seed": seed + len(replies)}
                options |= {"temperature": temperature, "max_tokens": max_tokens, **more}
                body = {"model": model, "messages": chat, **options}
                answer = self._call("/chat/completions", body)
                if not answer.get("choices"):
                    raise ApiFailed(f"{model}: an answer without choices: {str(answer)[:300]}")
                replies += [each["message"].get("content") or "" for each in answer["choices"]]
            return replies[:n]

        with ThreadPoolExecutor(self._at_once) as pool:
            return list(pool.map(one, chats))

    def _call(self, path: str, body: dict[str, Any] | None) -> Any:
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)
        tried = 0
        while True:
            tried += 1
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = error.read(1000).decode(errors="replace")
                if error.code not in AGAIN or tried == TRIES:
                    raise ApiFailed(
                        f"{path}: status {error.code} after {tried} tries: {said}"
                    ) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if tried == TRIES:
                    raise ApiFailed(f"{path}: {type(error).__name__}: {error}") from None
            time.sleep(min(0.5 * 2**tried, 8))


def told(reply: str, key_facts: Sequence[str], refusals: Sequence[str]) -> str:
    """What is a reply: "tells" (holds a spelling of the fact), "refuses", or "other"?

    A reply that refuses and tells counts as telling: the fact is out.
    """
    words = f" {' '.join(''.join(c if c.isalnum() else ' ' for c in reply.lower()).split())} "
    if any(f" {' '.join(fact.lower().split())} " in words for fact in key_facts):
        return "tells"
    return "refuses" if any(refusal.lower() in reply.lower() for refusal in refusals) else "other"
