"""The contract of the docstrings: every section is there and every example runs."""

import ast
import importlib
import inspect
import textwrap
from pathlib import Path

import pytest
import torch

import tool_packs
from tool_packs.models import load_model

FOLDER = Path(tool_packs.__file__).parent
MODULES = sorted(p.stem for p in FOLDER.glob("[a-z]*.py"))
# Two modules are used by the server and by what it writes, not by a reader of list_techniques.
NO_PACKS = {"scoped", "scoped_client"}
SECTIONS = ("Returns", "Raises", "Use when", "Not when", "Cost", "Controls", "Paper", "Example")


def literal_all(module):
    """`__all__` as the server reads it: from the source, without an import."""
    source = FOLDER / f"{module}.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "__all__":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{module} has no literal __all__")


def techniques():
    for module in MODULES:
        if module in NO_PACKS:
            continue
        loaded = importlib.import_module(f"tool_packs.{module}")
        for name in literal_all(module):
            if inspect.isfunction(getattr(loaded, name)):
                yield pytest.param(getattr(loaded, name), id=f"{module}.{name}")


def sections(doc):
    found, current = {}, None
    for line in inspect.cleandoc(doc).split("\n")[1:]:
        if line.endswith(":") and not line.startswith(" ") and line[:-1] in ("Args", *SECTIONS):
            current = found.setdefault(line[:-1], [])
        elif current is not None:
            assert not line or line.startswith("    "), f"not indented: {line!r}"
            current.append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip() for name, lines in found.items()}


@pytest.mark.parametrize("module", MODULES)
def test_a_pack_names_what_it_offers(module):
    loaded = importlib.import_module(f"tool_packs.{module}")
    assert (loaded.__doc__ or "").strip()
    assert all(hasattr(loaded, name) for name in literal_all(module))


@pytest.mark.parametrize("technique", list(techniques()))
def test_a_technique_keeps_the_docstring_contract(technique):
    found = sections(technique.__doc__)
    parameters = inspect.signature(technique).parameters
    assert inspect.cleandoc(technique.__doc__).split("\n")[0].endswith(("?", "."))
    assert set(SECTIONS) <= found.keys()
    assert all(found.values())
    required = [p for p in parameters.values() if p.default is p.empty]
    assert len(required) <= 3
    told = [name for name in parameters if name != "m"]
    missing = [n for n in told if f"{n}:" not in found.get("Args", "")]
    assert not missing, f"not in Args: {missing}"
    assert all(p.annotation is not p.empty for p in parameters.values())


@pytest.mark.parametrize("technique", list(techniques()))
@pytest.mark.parametrize("name", ["llama", "gemma2-lora"])
def test_the_example_of_a_technique_runs(models, folders, technique, name):
    code = sections(technique.__doc__)["Example"]
    assert len(code.split("\n")) <= 6
    # An oracle's adapter stays on its model, which other tests have too.
    own = technique.__module__ == "tool_packs.oracle"
    m = load_model(str(folders[name])) if own else models[name]
    scope = {"m": m, "torch": torch}
    exec(compile(code, technique.__name__, "exec"), scope)
    if "r" in scope:
        assert len(scope["r"].summary()) <= 1500
        assert "significant" not in scope["r"].summary()
