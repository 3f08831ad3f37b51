"""The benchmark of the techniques compares ways that give the same numbers, and tells what it measured."""

import pytest
import torch

pytest.importorskip("nnsight")

from benchmarks.subject import Size, make_model, make_tokenizer
from benchmarks.techniques import (
    Row,
    check,
    of_capture,
    of_memory,
    of_patching,
    of_prefix,
    of_steering,
    page,
)
from tool_packs.models import Model

TINY = Size(layers=2, width=32, mlp=48, heads=2, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tiny():
    return Model(make_model(TINY), make_tokenizer(), "random")


def test_every_way_gives_the_same_numbers(tiny):
    rows = [*of_capture(tiny, 1), *of_patching(tiny, 1, ""), *of_prefix(tiny, 1), *of_memory()]
    assert all(row.ours > 0 and row.theirs > 0 for row in rows)
    assert page(tiny, rows, "here").count("\n| ") == len(rows) + 2  # head and rule


def test_one_batch_of_strengths_answers_as_each_alone(tiny):
    assert len(of_steering(tiny, 1)) == 2


def test_a_way_that_gives_other_numbers_is_not_timed(tiny):
    with pytest.raises(RuntimeError, match=r"differs by 0\.5"):
        check("other", [1.0, 2.0], [1.0, 2.5], tiny)


def test_a_goal_is_a_floor_or_a_ceiling():
    assert Row("", 1.0, 20.0, 20).met and not Row("", 1.0, 19.0, 20).met
    assert Row("", 0.3, 1.0, 0.3, least=True).met and not Row("", 0.4, 1.0, 0.3, least=True).met
