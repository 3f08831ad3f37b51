"""A client of a scoped server tries to get out: to run code, to see more than results, to reach what is not exposed."""

from __future__ import annotations

import base64
import json
import pickle
import re
import time
from collections.abc import Iterator

import pytest

from seer_mcp.config import Config
from seer_mcp.packs import Packs
from seer_mcp.sessions import Register
from seer_mcp.tools import build_tools

from ..faults.ground import raw_text
from .conftest import Scoped

OFFERED = {"add", "embed", "cosine", "remember", "echo", "fail", "zeros"} | {
    "read_result",
    "cancel_call",
}


@pytest.fixture(autouse=True)
def nothing_got_out(scoped: Scoped) -> Iterator[None]:
    """After each way: nothing was run or told, the tools are the same, and the server still answers."""
    yield
    assert scoped.ok("add", a=40) == 42
    assert not scoped.tripwire.exists()
    assert scoped.tools() == scoped.listed
    assert {name for name, _ in scoped.calls()} <= OFFERED
    assert scoped.leaks() == []


def code(scoped: Scoped) -> str:
    return f"open({str(scoped.tripwire)!r}, 'w').close()"


def test_01_only_the_exposed_functions_are_offered(scoped: Scoped) -> None:
    assert {tool["name"] for tool in scoped.listed} == OFFERED
    for tool in scoped.listed:
        assert tool["inputSchema"]["additionalProperties"] is False


def test_02_an_argument_that_holds_code_is_a_text(scoped: Scoped) -> None:
    path = scoped.tripwire
    for text in (
        code(scoped),
        f"'); {code(scoped)} #",
        f'"); {code(scoped)} #',
        f"\\'); {code(scoped)} #",
        f"'''\n{code(scoped)}\n'''",
        f"\n%%bash\ntouch {path}\n",
        f"!touch {path}",
        f"%system touch {path}",
        f"x?\n!!touch {path}",
        f"{{{code(scoped)}}}",
        f"__import__('os').system('touch {path}')",
        f"\r\n\x0c\u2028{code(scoped)}",
    ):
        assert scoped.ok("echo", value=text) == repr(text)
        assert scoped.ok("echo", value={text: text}) == repr({text: text})
        assert len(scoped.ok("embed", text=text)["data"]) == 26


def test_03_names_that_lead_to_the_interpreter_are_no_functions(scoped: Scoped) -> None:
    for name in (
        "__import__",
        "eval",
        "exec",
        "open",
        "os.system",
        "add.__globals__",
        "add.__class__",
        "__main__.hidden",
        "get_ipython",
        "seer_scoped",
        "call",
        "check",
    ):
        assert "No tool" in scoped.no(name, code=code(scoped), value=code(scoped))


def test_04_what_the_file_does_not_expose_cannot_be_called(scoped: Scoped) -> None:
    for name in ("hidden", "kept", "SECRET", "expose", "np", "os", "time"):
        assert "No tool" in scoped.no(name, code=code(scoped))


def test_05_tools_of_the_unscoped_server_are_not_there(
    scoped: Scoped, tmp_path_factory: object
) -> None:
    folder = scoped.file.parent
    others = build_tools(Register(Config(folder, folder, folder, folder), Packs([])))
    assert len(others) >= 20
    for tool in others:
        given = {"sandbox": "interface", "source": code(scoped), "command": code(scoped)}
        assert "No tool" in scoped.no(tool.name, **given)


def test_06_arguments_that_nobody_declared_are_refused(scoped: Scoped) -> None:
    for name in ("self", "__class__", "kwargs", "numbers", "characters", "globals", "A", "a "):
        assert "has no parameter" in scoped.no("add", **{"a": 1, name: 10**9})
    assert "has no parameter" in scoped.no("zeros", rows=1, columns=1, dtype="object")


def test_07_a_value_of_another_type_is_refused(scoped: Scoped) -> None:
    for value in ("1", 1.0, True, None, [1], {"a": 1}, code(scoped)):
        assert "must be a whole number" in scoped.no("add", a=value)
    assert "one of" in scoped.no("embed", text="x", kind="mean'")
    assert "must be" in scoped.no("echo", value=[1, 2])
    assert "must be" in scoped.no("remember", text="x", tags=["a", {"b": 1}])
    assert "needs a" in scoped.no("add")


def test_08_numbers_that_are_none_are_refused(scoped: Scoped) -> None:
    for number in (float("nan"), float("inf"), -float("inf")):
        assert "finite" in scoped.no("embed", text="x", scale=number)
        assert "must be" in scoped.no("echo", value=number)
    assert "2**53" in scoped.no("add", a=2**53 + 1)
    assert "must be" in scoped.no("embed", text="x", scale="NaN")


def test_09_an_array_is_numbers_and_no_object(scoped: Scoped) -> None:
    good = {"shape": [2], "dtype": "float32", "data": [1, 0]}
    assert scoped.ok("cosine", a=good, b={**good, "data": ["NaN", 0]}) == "NaN"
    for change in (
        {"dtype": "object"},
        {"dtype": "O"},
        {"dtype": "<U9"},
        {"dtype": "V8"},
        {"dtype": ["float32"]},
        {"dtype": {"names": ["x"]}},
        {"shape": [10**12]},
        {"shape": [-1]},
        {"shape": [True, 2]},
        {"shape": [1] * 9},
        {"shape": "2"},
        {"data": [[1, 0]]},
        {"data": ["nan", 0]},
        {"data": [code(scoped), 0]},
        {"data": {"0": 1}},
        {"dtype": "uint8", "data": [256, 0]},
        {"__reduce__": [code(scoped)]},
        {"__array_interface__": {"data": [0, False]}},
    ):
        assert scoped.no("cosine", a={**good, **change}, b=good).startswith("a")
    assert "array" in scoped.no("cosine", a=[1, 0], b=good)


def test_10_pickles_are_texts(scoped: Scoped) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, (code(scoped),)

    packed = base64.b64encode(pickle.dumps(Bomb())).decode()
    for text in (
        packed,
        f"data:application/x-pickle;base64,{packed}",
        pickle.dumps(Bomb(), 0).decode(),
    ):
        assert scoped.ok("echo", value=text) == repr(text)
    marked = {"py/reduce": code(scoped), "$type": "pickle", "__reduce__": packed}
    assert scoped.ok("echo", value=marked) == repr(marked)


def test_11_names_that_only_look_alike_are_others(scoped: Scoped) -> None:
    for name in ("ａdd", "add\u200b", "аdd", "\u202eadd", "ADD", " add", "add\n", "add\0", ""):
        assert "No tool" in scoped.no(name, a=1)
    assert "has no parameter" in scoped.no("add", а=1)


def test_12_texts_that_are_no_texts_are_refused_and_odd_ones_arrive(scoped: Scoped) -> None:
    # Half a surrogate is no JSON text: the line is passed over before anything of ours sees it.
    scoped.server.send("tools/call", name="echo", arguments={"value": "\ud800"})
    for text in ("\0", "\x1b[31m", "\u202e\u200b", "🦫" * 100, "\\N{BULLET}", "\\x41"):
        assert scoped.ok("echo", value=text) == repr(text)


def test_13_too_much_is_refused_with_a_sentence(scoped: Scoped) -> None:
    assert "1,000,000" in scoped.no("echo", value="x" * 1_000_001)
    assert "at most 20,000" in scoped.no("zeros", rows=10**4, columns=10**4)
    nested: object = "x"
    for _ in range(60):
        nested = [nested]
    assert "must be" in scoped.no("echo", value=nested)


def test_14_a_path_as_a_name_leads_nowhere(scoped: Scoped) -> None:
    for name in (
        "../add",
        "add/../hidden",
        "file:///etc/passwd",
        "seer://methodology",
        "/bin/sh",
        "..",
    ):
        assert "No tool" in scoped.no(name, a=1)
    for call in ("../outputs", "c" + "0" * 16 + "/..", "*", "c" * 17, ""):
        assert scoped.no("read_result", call=call)
        assert scoped.no("cancel_call", call=call)


def test_15_there_are_no_resources(scoped: Scoped) -> None:
    for method, key in (
        ("resources/list", "resources"),
        ("resources/templates/list", "resourceTemplates"),
    ):
        assert scoped.server.answer(scoped.server.send(method))["result"][key] == []
    handle = scoped.notebook().stem
    for uri in (
        "seer://methodology",
        f"seer://sandboxes/{handle}/notebook",
        "file:///etc/hostname",
        "interface.py",
    ):
        assert scoped.refused("resources/read", uri=uri)
        assert scoped.refused("resources/subscribe", uri=uri)


def test_16_there_are_no_prompts(scoped: Scoped) -> None:
    assert scoped.server.answer(scoped.server.send("prompts/list"))["result"]["prompts"] == []
    for name in ("methodology", "hidden_preference", "interface"):
        assert scoped.refused("prompts/get", name=name)


def test_17_methods_that_are_not_offered_are_refused(scoped: Scoped) -> None:
    for method in (
        "completion/complete",
        "seer/run",
        "tools/register",
        "tasks/list",
        "sampling/createMessage",
        "skills/list",
        "subscriptions/listen",
        "roots/list",
        "../tools/call",
    ):
        assert scoped.refused(method, name="add", arguments={"a": 1}, ref={}, argument={})


def test_18_no_notice_of_the_client_changes_the_tools(scoped: Scoped) -> None:
    for notice in (
        "notifications/tools/list_changed",
        "notifications/roots/list_changed",
        "notifications/resources/updated",
        "notifications/initialized",
        "notifications/seer/scope",
    ):
        scoped.server.send(notice, notify=True, tools=[{"name": "hidden"}], file=str(scoped.file))
    assert scoped.tools() == scoped.listed


def test_19_a_file_that_is_changed_later_changes_nothing(scoped: Scoped) -> None:
    source = scoped.file.read_text()
    changed = source.replace("def hidden", "@expose\ndef hidden").replace("a + b", "a - b")
    assert changed.count("@expose") == source.count("@expose") + 1
    scoped.file.write_text(changed)
    try:
        assert scoped.ok("add", a=3, b=1) == 4
        assert "No tool" in scoped.no("hidden", code=code(scoped))
        assert "died" in scoped.no(
            "fail", how="die"
        )  # the next sandbox runs what was read at the start
        assert scoped.ok("add", a=3, b=1) == 4
        assert "No tool" in scoped.no("hidden", code=code(scoped))
    finally:
        scoped.file.write_text(source)


def test_20_an_error_is_a_sentence_without_source_or_path(scoped: Scoped) -> None:
    said = {
        how: scoped.no("fail", how=how) for how in ("file", "source", "lines", "object", "type")
    }
    assert said["file"] == "FileNotFoundError: [Errno 2] No such file or directory: '(a path)'"
    assert said["source"] == "ValueError: failed at (a path)"
    assert said["lines"] == "RuntimeError: first line"
    assert "type object" in said["object"]
    assert "declare" in said["type"]
    assert scoped.no("fail", how="exit") == "SystemExit: 0"
    assert "nested deeper" in scoped.no("fail", how="cycle")
    assert scoped.no("fail", how="?") == "KeyError: '?'"
    assert "Error" in scoped.no("cosine", a=vector(1, 2, 3), b=vector(1, 2))
    source = "".join(
        "".join(c["source"]) for c in json.loads(scoped.notebook().read_text())["cells"]
    )
    assert "def hidden" in source  # it is the operator who sees it


def vector(*numbers: float) -> dict[str, object]:
    return {"shape": [len(numbers)], "dtype": "float32", "data": list(numbers)}


def test_21_what_a_function_prints_is_for_the_operator(scoped: Scoped) -> None:
    before = len(scoped.server.lines)
    number = scoped.server.send(
        "tools/call", name="fail", arguments={"how": "print"}, _meta={"progressToken": 1}
    )
    assert scoped.server.answer(number)["result"]["structuredContent"] == {"result": "printed"}
    assert not any(b"marmot" in line for line in scoped.server.lines[before:])
    assert "marmot" in scoped.notebook().read_text()


def test_22_results_of_calls_that_are_not_known_cannot_be_read(scoped: Scoped) -> None:
    for number in range(40):
        assert "No call" in scoped.no("read_result", call=f"c{number:016x}")
    assert "no parameter" in scoped.no("read_result", call="c" + "0" * 16, sandbox="x")
    for wait in (-1, float("nan"), "1", True, 1e9):
        assert "number of seconds" in scoped.no("read_result", call="c" + "0" * 16, wait=wait)


def test_23_calls_at_once_get_their_own_answers_and_a_flood_is_refused(scoped: Scoped) -> None:
    numbers = [scoped.server.send("tools/call", name="add", arguments={"a": n}) for n in range(60)]
    answers = scoped.results(numbers)
    good = [(n, a["structuredContent"]) for n, a in enumerate(answers) if not a.get("isError")]
    assert len(good) >= 16
    assert all(told == {"result": n + 2} for n, told in good)
    for refused in (a for a in answers if a.get("isError")):
        assert "under way" in raw_text(refused)


def test_24_state_is_that_of_the_functions_alone(scoped: Scoped) -> None:
    first = scoped.ok("remember", text="x", tags=["y"])
    assert scoped.ok("remember", text=code(scoped)) == {"kept": first["kept"] + 1, "tags": []}


def test_25_a_kernel_that_died_tells_nothing_and_comes_back(scoped: Scoped) -> None:
    assert scoped.no("fail", how="die").startswith("fail: the kernel died while it ran")
    result = scoped.server.call("remember", text="x")
    assert result["structuredContent"]["result"]["kept"] == 1
    assert "started anew" in result["structuredContent"]["note"]
    assert "note" not in scoped.server.call("add", a=1)["structuredContent"]


def test_26_a_call_that_its_client_gives_up_does_not_block_the_others(scoped: Scoped) -> None:
    number = scoped.server.send("tools/call", name="fail", arguments={"how": "sleep"})
    time.sleep(1.0)
    scoped.server.send("notifications/cancelled", notify=True, requestId=number, reason="enough")
    assert scoped.ok("add", a=1) == 3


def test_27_an_answer_names_no_sandbox_and_no_notebook(scoped: Scoped) -> None:
    result = scoped.server.call("add", a=1)
    assert result.keys() <= {"content", "structuredContent", "isError", "_meta", "resultType"}
    assert not re.search("seer/|interface-", json.dumps(result.get("_meta", {})))


def test_28_json_that_is_none_does_not_end_the_server(scoped: Scoped) -> None:
    pipe = scoped.server.process.stdin
    assert pipe is not None
    for line in (
        b"{",
        b"[]",
        b"\xff\xfe",
        b"null",
        b'{"jsonrpc":"2.0","id":1e400}',
        b"[" * 100_000,
    ):
        pipe.write(line + b"\n")
    pipe.flush()
