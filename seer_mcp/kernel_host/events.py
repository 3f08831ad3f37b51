"""What a kernel says, as events of the journal: checked, since code in the kernel can send anything."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

Event = Dict[str, Any]
ERROR_PIECE = 100_000  # characters of one text of an error
DEPTH = 100  # levels of nesting: a reader's stack is not endless
DISPLAYS = {"display_data": "display", "execute_result": "result", "update_display_data": "update"}


def output_event(kind: str, content: Dict[str, Any]) -> Optional[Event]:
    """The event of an output message other than a stream; None if it is no output.

    Raises KeyError or TypeError for a message that breaks the protocol.
    """
    if kind in DISPLAYS:
        event = {
            "type": DISPLAYS[kind],
            "data": shallow(of_type(dict, content["data"])),
            "metadata": shallow(of_type(dict, content.get("metadata", {}))),
            "display_id": display_id_of(content.get("transient")),
        }
        if kind == "execute_result":
            event["count"] = count_of(content)
        return event
    if kind == "error":
        event = {
            "type": "error",
            "ename": of_type(str, content["ename"]),
            "evalue": of_type(str, content["evalue"]),
            "traceback": shallow(of_type(list, content["traceback"])),
        }
        return clipped(event, ERROR_PIECE)
    if kind == "clear_output":
        return {"type": "clear", "wait": bool(content.get("wait"))}
    return None


def count_of(content: Dict[str, Any]) -> Optional[int]:
    """The number of an execution, as a notebook can hold it."""
    count = content.get("execution_count")
    return count if type(count) is int and 0 <= count < 2**53 else None


def display_id_of(transient: Any) -> Optional[str]:
    id = transient.get("display_id") if isinstance(transient, dict) else None
    return id if isinstance(id, str) else None


def pages_of(reply: Dict[str, Any]) -> List[Dict[str, Any]]:
    """The texts for a pager in a reply, which is where `name?` shows what it found."""
    found = reply.get("payload")
    payloads = [p for p in found if isinstance(p, dict)] if isinstance(found, list) else []
    return [
        shallow(p["data"])
        for p in payloads
        if p.get("source") == "page" and isinstance(p.get("data"), dict)
    ]


def shallow(value: Any, depth: int = DEPTH) -> Any:
    """The value; what is nested deeper than `depth` levels is replaced by a text that says so."""
    if not isinstance(value, (list, dict)):
        return value
    if depth == 0:
        return "… nested deeper than %d levels: left out …" % DEPTH
    if isinstance(value, list):
        return [shallow(v, depth - 1) for v in value]
    return {k: shallow(v, depth - 1) for k, v in value.items()}


def escape_surrogates(value: Any) -> Any:
    """Lone surrogates as \\udXXX text: they cannot be stored as UTF-8."""
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return value.encode("utf-8", "backslashreplace").decode("utf-8")
        return value
    if isinstance(value, list):
        return [escape_surrogates(v) for v in value]
    if isinstance(value, dict):
        return {escape_surrogates(k): escape_surrogates(v) for k, v in value.items()}
    return value


def of_type(kind: type, value: Any) -> Any:
    """The value, if the protocol allows it; TypeError else (the message is passed over)."""
    if not isinstance(value, kind):
        raise TypeError("not a %s: %.100r" % (kind.__name__, value))
    return value


def clipped(value: Any, limit: int) -> Any:
    """The value with every text in it shortened to about `limit` characters."""
    if isinstance(value, str) and len(value) > limit:
        left_out = len(value) - limit
        return "%s … %d characters left out … %s" % (
            value[: limit // 2],
            left_out,
            value[-(limit // 2) :],
        )
    if isinstance(value, list):
        return [clipped(v, limit) for v in value]
    if isinstance(value, dict):
        return {k: clipped(v, limit) for k, v in value.items()}
    return value


def display_event(data: Dict[str, Any]) -> Event:
    return {"type": "display", "data": data, "metadata": {}, "display_id": None}
