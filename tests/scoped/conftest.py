"""A scoped server as a process of its own, spoken to line by line; what no client may see or do is watched."""

from __future__ import annotations

import ast
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..faults.conftest import place
from ..faults.ground import RawServer, ground, raw_text
from ..support import read_cells
from .interface import SECRET

__all__ = ["place"]

HERE = Path(__file__).parent


class Scoped:
    """The server, its interface file, and everything that it ever answered."""

    def __init__(self, server: RawServer, file: Path, tripwire: Path) -> None:
        self.server = server
        self.file = file
        self.tripwire = tripwire
        """A file that every piece of smuggled code would make."""
        self.listed = self.tools()

    def tools(self) -> list[dict[str, Any]]:
        return self.server.answer(self.server.send("tools/list"))["result"]["tools"]

    def ok(self, tool: str, /, **arguments: Any) -> Any:
        result = self.server.call(tool, **arguments)
        assert not result.get("isError"), raw_text(result)
        return result["structuredContent"]["result"]

    def no(self, tool: str, /, **arguments: Any) -> str:
        result = self.server.call(tool, **arguments)
        assert result.get("isError"), f"{tool}({str(arguments)[:200]}) was answered: {result}"
        assert "structuredContent" not in result
        return raw_text(result)

    def refused(self, method: str, **params: Any) -> str:
        """The message of a JSON-RPC error."""
        answer = self.server.answer(self.server.send(method, **params))
        assert "error" in answer, f"{method} was answered: {answer}"
        return answer["error"]["message"]

    def results(self, numbers: list[int]) -> list[dict[str, Any]]:
        """Of several requests that are under way at once, whichever is answered first."""
        end = time.monotonic() + 30
        while time.monotonic() < end:
            told = {m.get("id"): m for m in map(json.loads, self.server.lines) if "result" in m}
            if told.keys() >= set(numbers):
                return [told[number]["result"] for number in numbers]
            time.sleep(0.05)
        raise AssertionError(f"{len(set(numbers) - told.keys())} requests were not answered")

    def notebook(self) -> Path:
        return max(
            (self.file.parent / "outputs").glob("*/*.ipynb"), key=lambda p: p.stat().st_mtime
        )

    def leaks(self) -> list[str]:
        """Lines of the server that hold what no client may learn."""
        secret = (
            SECRET,
            str(self.file.parent.parent),
            str(HERE.parent.parent),
            "Traceback",
            "site-packages",
            "seer_scoped.call",
            "return eval",
            ".ipynb",
            "seer/sandbox",
        )
        lines = (line.decode() for line in self.server.lines)
        return [line[:2000] for line in lines if any(word in line for word in secret)]

    def calls(self) -> list[tuple[str, dict[str, Any]]]:
        """What the kernel was told by way of calls: nothing but names and JSON, as literals."""
        end = time.monotonic() + 10
        while True:  # the file is saved about three times a second
            cells = read_cells(self.notebook())
            begun = next(i for i, c in enumerate(cells) if ".check(" in "".join(c["source"]))
            states = {c["metadata"]["seer"]["state"] for c in cells[1:]}
            if not states & {"queued", "running"} or time.monotonic() > end:
                break
            time.sleep(0.1)
        found: list[tuple[str, dict[str, Any]]] = []
        for cell in cells[begun + 1 :]:
            (statement,) = ast.parse("".join(cell["source"])).body
            assert isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call)
            assert ast.unparse(statement.value.func) == "seer_scoped.call"
            name, given, *limits = map(ast.literal_eval, statement.value.args)
            assert len(limits) == 2 and not statement.value.keywords
            found.append((name, json.loads(given)))
        return found


@pytest.fixture(scope="module")
def scoped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scoped]:
    with (
        ground(tmp_path_factory.mktemp("scoped")) as place,
        tempfile.TemporaryDirectory(prefix="trap-") as trap,
    ):
        file = place.project / "interface.py"
        shutil.copy(HERE / "interface.py", file)
        server = RawServer(place, "--scope", str(file))
        try:
            server.begin()
            yield Scoped(server, file, Path(trap) / "tripwire")
        finally:
            server.close()
