"""Interface files: read without running them, types become schemas, and what cannot be served is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from seer_mcp.environment import read_scope
from seer_mcp.errors import InterfaceRefused, InvestigationRefused
from seer_mcp.interface import parse_interface, read_interface
from seer_mcp.interface.kinds import DTYPES, Array, OneOf
from tool_packs import scoped

HERE = Path(__file__).parent


def parsed(source: str) -> Any:
    return parse_interface(source, Path("interface.py"))


def of_type(annotation: str) -> Any:
    source = f'@expose\ndef f(x: {annotation}) -> None:\n    """Does."""\n'
    return parsed(source).functions["f"].parameters[0].kind


def test_types_and_docstrings_become_schemas() -> None:
    found = read_interface(HERE / "interface.py")
    assert list(found.functions) == [
        *("add", "embed", "cosine", "remember", "echo", "fail", "zeros"),
    ]
    assert found.functions["add"].schema() == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the first"},
            "b": {"type": "integer", "description": "the second", "default": 2},
        },
        "required": ["a"],
        "additionalProperties": False,
    }
    assert found.functions["embed"].schema()["properties"]["kind"] == {
        "enum": ["sum", "mean"],
        "default": "sum",
    }


@pytest.mark.parametrize(
    ("annotation", "good", "bad"),
    [
        ("list[list[int]]", [[1], []], [[1], 2]),
        ("dict[str, float]", {"a": 1.5, "b": 2}, {"a": "1"}),
        ("tuple[int, str]", [1, "a"], [1, "a", 2]),
        ("tuple[float, ...]", [1.0, 2], [1.0, None]),
        ("int | None", None, "x"),
        ("Optional[str]", "x", 1),
        ("Union[bool, list[str]]", ["x"], [1]),
        ("Literal[-1, 'a', True]", -1, 1),
        ('"int | str"', "x", 1.5),
        ("Annotated[int, 'x']", 1, "1"),
    ],
)
def test_a_type_takes_what_it_says(annotation: str, good: Any, bad: Any) -> None:
    if annotation.startswith("Annotated"):
        with pytest.raises(InterfaceRefused, match="cannot cross"):
            of_type(annotation)
        return
    kind = of_type(annotation)
    assert kind.wrong(good, "x", returned=False) == ""
    assert kind.wrong(bad, "x", returned=False).startswith("x")
    assert isinstance(kind.schema(returned=True), dict)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(): ...", "exposes nothing"),
        ("def f(:", "no Python in line 1"),
        ("x = '\0'", "no Python"),
        ("@expose\ndef f() -> int:\n    return 1", "no docstring"),
        ("@expose\ndef f(x) -> int:\n    'd'", "f (line 2): x has no type"),
        ("@expose\ndef f():\n    'd'", "what it returns has no type"),
        ("@expose\ndef f(x: object) -> int:\n    'd'", "object cannot cross"),
        ("@expose\ndef f(x: list) -> int:\n    'd'", "list cannot cross"),
        ("@expose\ndef f(x: Callable[[], int]) -> int:\n    'd'", "cannot cross"),
        ("@expose\ndef f(x: os.PathLike) -> int:\n    'd'", "cannot cross"),
        ("@expose\ndef f(x: dict[int, str]) -> int:\n    'd'", "cannot cross"),
        ("@expose\ndef f(x: 'int |') -> int:\n    'd'", "is no type"),
        ("@expose\ndef f(x: np.ndarray | dict[str, int]) -> int:\n    'd'", "look alike"),
        ("@expose\ndef f(*x: int) -> int:\n    'd'", "name each parameter"),
        ("@expose\ndef f(**x: int) -> int:\n    'd'", "name each parameter"),
        ("@expose\ndef f(x: int, /) -> int:\n    'd'", "name each parameter"),
        ("@expose\ndef f(_x: int) -> int:\n    'd'", "begins with a letter"),
        ("@expose\ndef f(x: int = g()) -> int:\n    'd'", "must be written out"),
        ("@expose\ndef f(x: int = 'a') -> int:\n    'd'", "must be a whole number"),
        ("@expose\nasync def f() -> int:\n    'd'", "an async function cannot"),
        ("@expose\nclass F:\n    'd'", "a class cannot"),
        ("@expose()\ndef f() -> int:\n    'd'", "without parentheses"),
        ("@cache\n@expose\ndef f() -> int:\n    'd'", "uppermost"),
        ("@expose\ndef _f() -> int:\n    'd'", "call it otherwise"),
        ("@expose\ndef größe() -> int:\n    'd'", "call it otherwise"),
        ("@expose\ndef read_result() -> int:\n    'd'", "call it otherwise"),
        ("if x:\n    @expose\n    def f() -> int:\n        'd'", "at the top of the file"),
        ("class A:\n    @expose\n    def f(self) -> int:\n        'd'", "at the top of the file"),
        ("@expose\ndef f() -> int:\n    'd'\n@expose\ndef f() -> int:\n    'd'", "taken"),
        ("".join(f"@expose\ndef f{i}() -> int:\n    'd'\n" for i in range(65)), "64 at most"),
    ],
)
def test_a_file_that_cannot_be_served_is_refused_with_a_sentence(source: str, said: str) -> None:
    with pytest.raises(InterfaceRefused) as caught:
        parsed(source)
    assert said in str(caught.value)


def test_the_interface_of_the_docs_can_be_served(tmp_path: Path) -> None:
    page = (HERE.parent.parent / "docs" / "scoped.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", page, re.S)
    settings, _ = re.findall(r"```toml\n(.*?)```", page, re.S)
    (tmp_path / "target.py").write_text(source)
    (tmp_path / "target.toml").write_text(settings)
    found = read_scope(tmp_path / "target.py")
    assert found.interface is not None and list(found.interface.functions) == ["embed"]
    assert found.sandbox.gpu == "L40S"


def test_reading_runs_nothing(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    file = tmp_path / "interface.py"
    file.write_text(
        f"open({str(trap)!r}, 'w')\nraise SystemExit\n@expose\ndef f() -> None:\n    'd'\n"
    )
    assert list(read_interface(file).functions) == ["f"]
    assert not trap.exists()


def test_a_configuration_beside_the_file_is_its_machine(tmp_path: Path) -> None:
    file = tmp_path / "target.py"
    file.write_text("@expose\ndef f() -> None:\n    'd'\n")
    assert read_scope(file).sandbox.backend == "local"
    settings = tmp_path / "target.toml"
    settings.write_text('interface = "target.py"\n[sandbox]\nbackend = "modal"\ngpu = "L4"\n')
    assert read_scope(file).sandbox.gpu == "L4"
    assert read_scope(settings).interface == read_scope(file).interface
    settings.write_text("[sandbox]\n")
    with pytest.raises(InvestigationRefused, match="names no interface"):
        read_scope(file)
    (tmp_path / "other.py").write_text("@expose\ndef g() -> None:\n    'd'\n")
    settings.write_text('interface = "other.py"\n')
    with pytest.raises(InvestigationRefused, match=r"is other\.py, not target\.py"):
        read_scope(file)


@given(
    arrays(
        st.sampled_from(["float16", "float32", "float64", "int8", "int32", "uint8", "bool"]),
        array_shapes(min_dims=0, max_side=4),
    )
)
def test_arrays_cross_to_the_bit(array: np.ndarray) -> None:
    data = scoped.encoded(array)
    assert Array().wrong(data, "x", returned=True) == ""
    back = scoped.decoded(data, np.ndarray)
    assert back.dtype == array.dtype and back.shape == array.shape
    assert np.array_equal(back, array, equal_nan=array.dtype.kind == "f")


def test_tensors_cross_with_shape_and_dtype() -> None:
    for dtype in ("float16", "bfloat16", "float32", "float64", "int64", "bool"):
        assert dtype in DTYPES
        tensor = (torch.randn(2, 3, generator=torch.Generator().manual_seed(0)) * 9).to(
            getattr(torch, dtype)
        )
        back = scoped.decoded(
            scoped.encoded(tensor.requires_grad_(tensor.is_floating_point())), torch.Tensor
        )
        assert back.dtype == tensor.dtype and torch.equal(back, tensor)
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0])
    data = scoped.encoded(values)
    assert data["data"][:3] == ["NaN", "Infinity", "-Infinity"]
    assert torch.equal(
        torch.nan_to_num(scoped.decoded(data, torch.Tensor)), torch.nan_to_num(values)
    )


def test_arguments_become_what_the_function_declares() -> None:
    one = {"shape": [1], "dtype": "float32", "data": [2.0]}
    assert isinstance(scoped.decoded(one, np.ndarray), np.ndarray)
    assert isinstance(scoped.decoded(one, torch.Tensor | None), torch.Tensor)
    assert isinstance(scoped.decoded([one], list[np.ndarray])[0], np.ndarray)
    assert isinstance(scoped.decoded({"a": one}, dict[str, torch.Tensor])["a"], torch.Tensor)
    assert scoped.decoded([1, 2], tuple[float, ...]) == (1.0, 2.0)
    assert scoped.decoded(one, dict[str, list[int]]) == one  # only where an array is declared


def test_an_error_of_a_union_names_what_is_deeper() -> None:
    kind = of_type("int | list[int]")
    assert isinstance(kind, OneOf)
    assert "x[1]" in kind.wrong([1, "a"], "x", returned=False)
    assert "a whole number, or a list" in kind.wrong("a", "x", returned=False)
