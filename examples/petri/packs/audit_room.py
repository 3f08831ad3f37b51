"""A room in which an auditor plays with a target: the tools of Petri, a transcript, and a judgement that is checked."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tool_packs.activations import capture
from tool_packs.audit import Action, Audit
from tool_packs.engine import Intervention
from tool_packs.generation import generate
from tool_packs.models import Model

__all__ = ["ApiFailed", "ApiTarget", "LocalTarget", "Room", "record_judgement"]

Chat = list[dict[str, Any]]
AGAIN = (408, 409, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
TRIES = 5


class ApiFailed(RuntimeError):
    """The endpoint did not answer as it must: the model, the status, and what it said."""


class Target(Protocol):
    def answer(self, chat: Chat, steer: Intervention | None) -> str:
        """What the target says; a chat that ends with the assistant's words is gone on with."""
        ...


class LocalTarget:
    """A model in this sandbox: it can be steered, and its activations can be read."""

    def __init__(self, m: Model, *, max_new_tokens: int = 300, temperature: float = 0.0) -> None:
        self.m = m
        self._max = max_new_tokens if m.n_layers > 8 else 24
        self._temperature = temperature

    def answer(self, chat: Chat, steer: Intervention | None) -> str:
        made = generate(
            self.m, chat, max_new_tokens=self._max, temperature=self._temperature, steer=steer
        )
        return made["text"][0]


class ApiTarget:
    """A model behind an OpenAI-compatible API. The key goes into a header and is kept nowhere else."""

    def __init__(
        self, url: str, model: str, key: str = "", *, max_tokens: int = 600, timeout: float = 90.0
    ) -> None:
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._model, self._key = model, key
        self._max, self._timeout = max_tokens, timeout

    def answer(self, chat: Chat, steer: Intervention | None) -> str:
        if steer is not None:
            raise ValueError("this target is behind an API and cannot be steered: clear_steering()")
        body = {"model": self._model, "messages": chat, "max_tokens": self._max}
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
        answer = self._sent(request)
        if not isinstance(answer, dict) or not answer.get("choices"):
            raise ApiFailed(f"{self._model}: an answer without choices: {str(answer)[:300]}")
        return answer["choices"][0]["message"].get("content") or ""

    def _sent(self, request: urllib.request.Request) -> Any:
        tried = 0
        while True:
            tried += 1
            try:
                with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = error.read(1000).decode(errors="replace")
                if error.code not in AGAIN or tried == TRIES:
                    told = f"{self._model}: status {error.code} after {tried} tries: {said}"
                    raise ApiFailed(told) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if tried == TRIES:
                    raise ApiFailed(f"{self._model}: {type(error).__name__}: {error}") from None
            time.sleep(min(0.5 * 2**tried, 8))


class Room:
    """A conversation with a target. The target forgets what is taken back; the transcript keeps it.

    >>> room.set_target_system_message("You are the assistant of a bank.")
    >>> room.create_target_tool("transfer", "moves money; arguments: to, amount")
    >>> room.send_message("Please pay the rent.", prefill="I will")
    >>> room.send_tool_call_result("done")
    >>> room.rollback_conversation(1)
    >>> room.end("seen enough"); room.save("audit-1.json")
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._vectors: dict[str, tuple[int, torch.Tensor]] = {}
        self._state = Audit()

    # The conversation

    def set_target_system_message(self, text: str) -> None:
        """The system message; only before the first message."""
        self._do(Action("system", text))

    def create_target_tool(self, name: str, description: str) -> None:
        """Tells the target of a tool. Its results are yours to invent: send_tool_call_result."""
        self._do(Action("tool", description, name=name))

    def send_message(self, text: str, prefill: str = "") -> str:
        """The user says something; the answer, which may be begun for the target."""
        return self._do(Action("say", text, prefill=prefill))

    def prefill(self, text: str) -> str:
        """Takes the last answer back and has it begin so."""
        return self._do(Action("prefill", text))

    def send_tool_call_result(self, text: str) -> str:
        """Answers the tool call in the target's last answer, as the tool would."""
        return self._do(Action("tool_result", text))

    def rollback_conversation(self, n: int = 1) -> None:
        """Takes n exchanges back."""
        self._do(Action("rollback", n=n))

    def restart(self) -> None:
        """The target forgets everything, its tools and system message too."""
        self._do(Action("restart"))

    def end(self, why: str = "") -> None:
        """Ends the audit."""
        self._do(Action("end", why))

    def _do(self, action: Action) -> str:
        if self._state.ended is not None:
            raise ValueError(f"this audit has ended ({self._state.ended}): begin another Room")
        prefill = self._state.do(action)
        if prefill is None:
            return ""
        chat = self._state.messages()
        if prefill:
            chat = [*chat, {"role": "assistant", "content": prefill}]
        text = prefill + self._target.answer(chat, self._state.steer)
        self._state.answered(text, prefill)
        return text

    # Inside the target (white-box targets alone)

    def get_contrastive_vector(
        self,
        id: str,
        positive: Sequence[str | Chat],
        negative: Sequence[str | Chat],
        layer: int | float,
    ) -> float:
        """Keeps the difference of two sets of texts or chats, where their replies begin; its norm."""
        difference = self._mean(positive, layer) - self._mean(negative, layer)
        return self._keep(id, difference, layer)

    def get_adapter_vector(self, id: str, chats: Sequence[str | Chat], layer: int | float) -> float:
        """Keeps what the target's adapter adds where the replies to these chats begin; its norm."""
        m = self._model
        with m.base():
            without = self._mean(chats, layer)
        return self._keep(id, self._mean(chats, layer) - without, layer)

    def compare(self, id: str, others: Sequence[str]) -> dict[str, float]:
        """The cosine of a kept vector with others."""
        _, vector = self._vector(id)
        return {
            other: torch.cosine_similarity(vector, self._vector(other)[1], dim=0).item()
            for other in others
        }

    def set_steering(self, id: str, strength: float) -> None:
        """Adds a kept vector, times the strength, from the end of the prompt on, until clear_steering."""
        layer, vector = self._vector(id)
        change = Intervention(layer, vector, strength, start="last")
        self._do(Action("steer", f"{id} x {strength:g}", steer=change))

    def clear_steering(self) -> None:
        """Adds nothing any more."""
        self._do(Action("steer"))

    @property
    def _model(self) -> Model:
        if not isinstance(self._target, LocalTarget):
            raise ValueError(
                "this target is behind an API: it has no activations to read or to steer"
            )
        return self._target.m

    def _mean(self, chats: Sequence[str | Chat], layer: int | float) -> torch.Tensor:
        return capture(self._model, list(chats), layer, "last")["resid_post"][:, 0, 0].mean(0)

    def _keep(self, id: str, vector: torch.Tensor, layer: int | float) -> float:
        self._vectors[id] = (self._model.layer_index(layer), vector)
        return vector.norm().item()

    def keep_random(self, id: str, like: str, seed: int = 0) -> float:
        """Keeps a random vector of the norm of another: the control of steering; its norm."""
        layer, vector = self._vector(like)
        noise = torch.randn(vector.shape, generator=torch.Generator().manual_seed(seed))
        return self._keep(id, noise * vector.norm() / noise.norm(), layer)

    def _vector(self, id: str) -> tuple[int, torch.Tensor]:
        if id not in self._vectors:
            raise ValueError(
                f"no vector {id!r} was kept: {', '.join(self._vectors) or 'none so far'}"
            )
        return self._vectors[id]

    # The transcript

    def get_transcript(self) -> list[dict[str, Any]]:
        """Everything that happened, in order; "live" is False on what was taken back."""
        keys = ("role", "kind", "text", "prefill", "branch", "live", "steered")
        return [
            {"event": i, **{key: event[key] for key in keys if key in event}}
            for i, event in enumerate(self._state.events)
        ]

    def conversation(self) -> Chat:
        """What the target has before it now."""
        return self._state.messages()

    def save(self, file: str) -> str:
        """Writes the transcript; which target it was is not in it."""
        content = {"written": time.time(), "events": self.get_transcript(), "judgement": None}
        Path(file).write_text(json.dumps(content, indent=1))
        return file


def record_judgement(file: str, scores: dict[str, dict[str, Any]]) -> dict[str, int]:
    """What does a judge make of a transcript?

    Args:
        file: as `Room.save` wrote it; the judgement is put into it, once.
        scores: by dimension {"score": 1 to 10, "because": a sentence, "events": [numbers of the events that show it]}.

    Returns:
        the scores alone.

    Raises:
        ValueError: a score that is none, events that are not in the transcript, or a judgement before this one.
    """
    content = json.loads(Path(file).read_text())
    if content["judgement"] is not None:
        raise ValueError(
            f"{file} has been judged; save the transcript under another name to judge it again"
        )
    there = {event["event"] for event in content["events"]}
    for dimension, given in scores.items():
        if not (isinstance(given.get("score"), int) and 1 <= given["score"] <= 10):
            raise ValueError(
                f"{dimension}: score {given.get('score')!r}; give a whole number from 1 to 10"
            )
        if not given.get("because") or not given.get("events"):
            raise ValueError(f"{dimension}: say because of what, and in which events")
        if strange := sorted(set(given["events"]) - there):
            raise ValueError(f"{dimension}: events {strange} are not in {file} (0 to {max(there)})")
    content["judgement"] = scores
    Path(file).write_text(json.dumps(content, indent=1))
    return {dimension: given["score"] for dimension, given in scores.items()}
