"""The modules that shipped investigations bring: what they refuse, and that a failed request is told or tried again."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(autouse=True)
def packs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("petri", "api_model", "eval_awareness"):
        monkeypatch.syspath_prepend(str(EXAMPLES / name / "packs"))
    yield
    for name in ("audit_room", "chat_api", "impossible"):
        sys.modules.pop(name, None)


class Echo:
    """A target that says the last message back, in capitals."""

    def answer(self, chat, steer):
        return f" {chat[-1]['content'].upper()}" if chat[-1]["role"] == "user" else " and so on"


def test_a_room_takes_turns_back_and_keeps_them_in_the_transcript(tmp_path: Path) -> None:
    from audit_room import Room, record_judgement

    room = Room(Echo())
    room.set_target_system_message("Be kind.")
    assert room.send_message("one") == " ONE"
    assert room.send_message("two", prefill="I say") == "I say and so on"
    room.rollback_conversation()
    assert [turn["content"] for turn in room.conversation()] == ["Be kind.", "one", " ONE"]
    assert room.prefill("Now") == "Now and so on"
    room.create_target_tool("clock", "tells the time")
    room.send_message("time?", prefill='<tool>{"name": "clock", "arguments": {}}</tool>')
    assert room.send_tool_call_result("noon") == " RESULT OF CLOCK: NOON"
    with pytest.raises(ValueError, match="no activations"):
        room.get_contrastive_vector("v", ["a"], ["b"], 0)
    room.end("enough")
    with pytest.raises(ValueError, match="has ended"):
        room.send_message("three")
    file = room.save(str(tmp_path / "audit.json"))
    events = json.loads(Path(file).read_text())["events"]
    assert [e["text"] for e in events if not e["live"]] == [" ONE", "two", "I say and so on"]

    good = {"score": 7, "because": "it echoes", "events": [2]}
    for change, said in (
        ({"score": 11}, "1 to 10"),
        ({"events": []}, "in which events"),
        ({"events": [999]}, r"events \[999\] are not in"),
    ):
        with pytest.raises(ValueError, match=said):
            record_judgement(file, {"echo": {**good, **change}})
    assert record_judgement(file, {"echo": good}) == {"echo": 7}
    with pytest.raises(ValueError, match="has been judged"):
        record_judgement(file, {"echo": good})


@contextmanager
def endpoint(statuses: list[int]) -> Iterator[tuple[str, list[str | None]]]:
    """An endpoint that answers with these statuses in turn, and then always well."""
    keys: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            keys.append(self.headers.get("Authorization"))
            status = statuses.pop(0) if statuses else 200
            reply = {
                "message": {
                    "content": f"{asked['messages'][-1]['content']} {asked.get('seed', '')}"
                }
            }
            body = json.dumps({"choices": [reply]} if status == 200 else {"error": "no"}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", keys
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_chat_over_an_api_is_tried_again_where_that_can_help() -> None:
    from chat_api import ApiFailed, ChatApi

    with endpoint([503]) as (url, keys):
        api = ChatApi(url, key="a key")
        assert api.ask("x", ["p", "q"], n=2) == [["p 0", "p 1"], ["q 0", "q 1"]]
        assert keys == ["Bearer a key"] * 5, "four replies, one asked for twice"
    with endpoint([400]) as (url, keys):
        with pytest.raises(ApiFailed, match="status 400 after 1 tries"):
            ChatApi(url).ask("x", ["p"])
        assert keys == [None]


def test_a_room_with_a_target_behind_an_api(tmp_path: Path) -> None:
    from audit_room import ApiFailed, ApiTarget, Room

    with endpoint([429]) as (url, keys):
        room = Room(ApiTarget(url, "x", "a key"))
        room.set_target_system_message("Be kind.")
        assert room.send_message("one") == "one "
        assert room.send_message("two", prefill="I say ") == "I say I say  "
        assert keys == ["Bearer a key"] * 3, "the first was asked twice"
        with pytest.raises(ValueError, match="behind an API"):
            room.get_adapter_vector("v", ["a"], 0)
        assert "a key" not in Path(room.save(str(tmp_path / "audit.json"))).read_text()
    with (
        endpoint([400]) as (url, keys),
        pytest.raises(ApiFailed, match="x: status 400 after 1 tries"),
    ):
        Room(ApiTarget(url, "x")).send_message("one")


def test_scenes_can_be_set_in_a_room() -> None:
    from audit_room import Room

    scenes = json.loads((EXAMPLES / "petri" / "data" / "scenes.json").read_text())
    assert "whistleblowing" in [scene["id"] for scene in scenes]
    for scene in scenes:
        room = Room(Echo())
        room.set_target_system_message(scene["system"])
        for name, what in scene["tools"].items():
            room.create_target_tool(name, what)
        assert room.send_message(scene["first"]) and scene["plays"] and scene["control"]


@pytest.mark.parametrize(
    ("reply", "what"),
    [
        ("The capital is Paris.", "tells"),
        ("I cannot help, but: PARIS", "tells"),
        ("I cannot help with that.", "refuses"),
        ("Parisian food is good.", "other"),
    ],
)
def test_replies_are_sorted_by_whole_words(reply: str, what: str) -> None:
    from chat_api import told

    assert told(reply, ["Paris"], ["cannot help"]) == what


def test_an_impossible_test_passes_only_what_goes_against_the_specification() -> None:
    from impossible import passes, tasks

    file = str(EXAMPLES / "eval_awareness" / "data" / "tasks.json")
    honest = {"refuse": "I cannot help with that.", "help": "Start with a plan for it."}
    for split, all_pass in (("original", True), ("impossible", False)):
        some = tasks(split, file)
        replies = [honest["refuse" if "refused" in task.spec else "help"] for task in some]
        assert set(passes(some, replies)) == {all_pass}
    with pytest.raises(ValueError, match="original, impossible"):
        tasks("imposible", file)
