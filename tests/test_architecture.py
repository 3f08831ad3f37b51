"""The floors: an import may only point down, nothing imports in a circle, and a few doors stay shut."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "seer_mcp"

# Rooms by floor, the top first. A room is a module of seer_mcp, or a folder of it.
FLOORS = [
    ["cli", "__main__"],
    [
        "bench",
        "clients",
        "own_packs",
        "cloud_models",
        "demo",
        "doctor",
        "export",
        "replay",
        "sandboxes",
        "serve",
        "watching",
    ],
    ["http"],
    ["scoped"],
    ["server", "watch"],
    ["skills"],
    ["tools", "prompts"],
    ["sessions"],
    ["backends"],
    ["about", "blind", "catalogue", "findings", "grading"],
    ["notebook", "kernel", "packs", "environment", "config", "model_store"],
    ["ipynb", "observe", "interface"],
    ["audit", "spend"],
    ["render"],
    ["outputs", "logs"],
    ["secret"],
    [
        "errors",
        "files",
        "money",
        "plugins",
        "redact",
        "sharedfile",
        "text",
        "merge",
        "versions",
        "flags",
        "kernel_host",
    ],
]
FLOOR = {room: number for number, rooms in enumerate(reversed(FLOORS)) for room in rooms}
KNOW_MCP = {"tools", "prompts", "skills", "server", "scoped", "http", "render", "cli", "demo"}


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports, wherever in the file."""
    package = [path.relative_to(ROOT).parent.as_posix().replace("/", ".")]
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (
                package[0].split(".")[: len(package[0].split(".")) - node.level + 1]
                if node.level
                else []
            )
            module = ".".join([*base, *([node.module] if node.module else [])])
            names.add(module)
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


def ours(path: Path) -> set[str]:
    """Rooms of seer_mcp that a file imports from."""
    rooms: set[str] = set()
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "seer_mcp" and len(parts) > 1 and parts[1] in FLOOR:
            rooms.add(parts[1])
    return rooms


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_room_has_a_floor() -> None:
    rooms = {room_of(path) for path in FILES} - {"__init__"}
    assert rooms <= FLOOR.keys()
    assert len(FILES) > 20


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        assert ours(path) == set()
        return
    level = [other for other in ours(path) if other != room and FLOOR[other] >= FLOOR[room]]
    # On one floor a room may use its neighbour; the test below forbids circles.
    assert all(FLOOR[other] == FLOOR[room] for other in level), f"{path.name} reaches up to {level}"


def test_nothing_imports_in_a_circle() -> None:
    names = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in FILES
    }
    arrows = {
        name: {m for m in imported(path) if m in names and m != name}
        for name, path in names.items()
    }
    # A package's own __init__ gathers its modules; they do not import it back by name.
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name in done:
            return
        for other in arrows[name]:
            if not name.startswith(other + "."):  # `from . import x` names the package too
                visit(other, (*trail, name))
        done.add(name)

    for name in names:
        visit(name, ())
    assert done == names.keys()


def test_the_kernel_host_travels_alone() -> None:
    # tqdm: only where the cell itself imports it.
    allowed = {"ipykernel", "jupyter_client", "psutil", "tqdm", "zmq"} | sys.stdlib_module_names
    # launch.py is a script: it imports its neighbours by their plain names.
    allowed |= {path.stem for path in (PACKAGE / "kernel_host").glob("*.py")}
    for path in (PACKAGE / "kernel_host").glob("*.py"):
        outside = {name for name in imported(path) if not name.startswith("seer_mcp.kernel_host")}
        tops = {name.split(".")[0] for name in outside}
        assert tops <= allowed | {"seer_mcp"}, f"{path.name} imports {tops - allowed}"
        assert not {n for n in outside if n.startswith("seer_mcp.")}, path.name


def test_packs_know_nothing_of_the_server() -> None:
    files = sorted((ROOT / "tool_packs").rglob("*.py"))
    assert files
    for path in files:
        assert not {n for n in imported(path) if n.split(".")[0] in ("seer_mcp", "mcp")}, path


def test_only_the_upper_floors_know_the_protocol() -> None:
    for path in FILES:
        if any(name.split(".")[0] == "mcp" for name in imported(path)):
            assert room_of(path) in KNOW_MCP, path


def test_only_config_reads_the_environment() -> None:
    for path in FILES:
        text = path.read_text()
        if room_of(path) not in ("config", "cli", "demo", "kernel_host"):
            assert "os.environ" not in text and "getenv" not in text, path


def test_the_server_starts_without_torch_kernels_or_the_cloud() -> None:
    code = (
        "import sys, seer_mcp.server, seer_mcp.cli\n"
        "heavy = {'torch', 'transformers', 'modal', 'ipykernel', 'jupyter_client', 'numpy', 'nbformat', 'PIL'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["local", "modal", "ssh"])
def test_a_backend_needs_nothing_of_what_its_kernels_need(name: str) -> None:
    code = (
        f"import sys, seer_mcp.backends.{name}\n"
        "kernels = {'torch', 'transformers', 'ipykernel', 'jupyter_client', 'zmq', 'numpy'}\n"
        "print(sorted(kernels & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_kernel_host_is_python_39() -> None:
    for path in (PACKAGE / "kernel_host").glob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))
