"""What a kernel says, as events of the journal: checked, since code in the kernel can send anything."""

from __future__ import annotations

from typing import Any, Dict, Optional

Event = Dict[str, Any]
ERROR_PIECE = 100_000  # characters of one text of an error
DISPLAYS = {"display_data": "display", "execute_result": "result", "update_display_data": "update"}


def output_event(kind: str, content: Dict[str, Any]) -> Optional[Event]:
    """The event of an output message other than a stream; None if it is no output.

    Raises KeyError or TypeError for a message that breaks the protocol.
    """
    if kind in DISPLAYS:
        event = {
            "type": DISPLAYS[kind],
            "data": of_type(dict, content["data"]),
            "metadata": of_type(dict, content.get("metadata", {})),
            "display_id": content.get("transient", {}).get("display_id"),
        }
        if kind == "execute_result":
            event["count"] = of_type(int, content["execution_count"])
        return event
    if kind == "error":
        event = {
            "type": "error",
            "ename": of_type(str, content["ename"]),
            "evalue": of_type(str, content["evalue"]),
            "traceback": of_type(list, content["traceback"]),
        }
        return clipped(event, ERROR_PIECE)
    if kind == "clear_output":
        return {"type": "clear", "wait": bool(content.get("wait"))}
    return None


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
