"""What only a CUDA device can show: uv run pytest -m gpu"""

import sys

import pytest
import torch

from tool_packs.activations import capture
from tool_packs.generation import generate
from tool_packs.models import load_model

pytestmark = pytest.mark.gpu
TEXTS = ["Which city is the capital of France?", "Hello."]


def test_activations_on_the_device_are_those_of_the_cpu():
    cpu = load_model("organism:base", dtype="float32")
    gpu = load_model("organism:base", dtype="float32", device_map="cuda")
    assert gpu.device.type == "cuda"
    a, b = (capture(m, TEXTS, positions="last")["resid_post"] for m in (cpu, gpu))
    assert torch.allclose(a, b, atol=1e-3)
    answers = [generate(m, TEXTS, max_new_tokens=8)["text"] for m in (cpu, gpu)]
    assert answers[0] == answers[1]


def test_adapters_switch_on_the_device():
    m = load_model("organism:user_female", device_map="auto", dtype="bfloat16")
    on = capture(m, TEXTS)["resid_post"]
    with m.base():
        off = capture(m, TEXTS)["resid_post"]
    assert not torch.equal(on, off)


def test_techniques_are_timed_on_a_billion_parameters(capsys: pytest.CaptureFixture[str]):
    """Each way gives the same numbers (bfloat16) and the figures are printed: uv run pytest -m gpu -s"""
    from benchmarks.subject import LARGE
    from benchmarks.techniques import measure, page

    m, rows = measure(LARGE, rounds=3)
    assert sum(p.numel() for p in m.hf.parameters()) >= 1e9
    with capsys.disabled():
        sys.stdout.write(page(m, rows, torch.cuda.get_device_name()))


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_quantised_weights_answer(kind: str):
    pytest.importorskip("bitsandbytes")
    m = load_model("organism:base", quantization=kind, device_map="cuda")
    assert len(generate(m, TEXTS, max_new_tokens=4)["text"]) == 2
