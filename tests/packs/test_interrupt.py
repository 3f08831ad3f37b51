"""An interrupt in the middle of any technique leaves the model as it was; long ones say how far they are."""

import re

import pytest
import torch

from tests.packs.test_bad_input import TECHNIQUES
from tests.packs.test_out_of_memory import NO_PASS, by_kind, place, watched
from tests.packs.tiny import TEXTS
from tool_packs.activations import capture
from tool_packs.diff import output
from tool_packs.dla import dla
from tool_packs.generation import generate, next_token
from tool_packs.logit_lens import logit_lens
from tool_packs.models import load_model


def state(m):
    """What an interrupted technique might leave behind."""
    hooks = [
        path
        for path, module in m.hf.named_modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    weights = {
        # An oracle that is given up leaves PEFT's wrappers, which do nothing.
        path.replace(".base_layer", ""): (
            w.requires_grad,
            w.grad is None,
            w.detach().sum().item(),
        )
        for path, w in m.hf.named_parameters()
    }
    return hooks, m.active_adapter, m.adapters, weights


@pytest.mark.parametrize("name", by_kind(TECHNIQUES.keys() - NO_PASS))
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(folders, name):
    code = compile(TECHNIQUES[name].example, name, "exec")

    def play(met):
        """The state before and after, and what ended it."""
        m = load_model(str(folders["llama-lora"]))
        before, ended = state(m), None
        try:
            with watched(m, met):
                exec(code, {"m": m, "torch": torch})
        except KeyboardInterrupt as error:
            ended = error
        return before, state(m), ended

    passes = []
    play(lambda way: passes.append(place()))
    last = next(i for i in reversed(range(len(passes))) if passes[i] is not None)
    for stop in sorted({0, last // 2, last}):
        count = iter(range(stop + 1))

        def interrupt(way, count=count):
            if next(count, None) is None:
                raise AssertionError("it went on after the interrupt")
            if count.__length_hint__() == 0:
                raise KeyboardInterrupt

        before, after, ended = play(interrupt)
        assert isinstance(ended, KeyboardInterrupt)
        assert after[0] == before[0], f"hooks after an interrupt in pass {stop} of {last}"
        assert after[1] == before[1], "another adapter is active"
        assert {path: w for path, w in after[3].items() if path in before[3]} == before[3]


LONG_CALLS = {
    "activations": lambda m: capture(m, TEXTS),
    "generate": lambda m: generate(m, TEXTS[:1], max_new_tokens=8, raw=True),
    "next tokens": lambda m: next_token(m, TEXTS),
    "logit attribution": lambda m: dla(m, TEXTS, (7, 9), attend=0),
    "divergence": lambda m: output(m, TEXTS, n_bootstrap=10),
    "unembedding": lambda m: logit_lens(m, TEXTS),
}


@pytest.mark.parametrize("what", LONG_CALLS)
def test_a_call_of_several_passes_shows_how_far_it_is(folders, monkeypatch, capsys, what):
    m = load_model(str(folders["llama-lora"]))
    m.batch_tokens = 4  # one text a pass
    monkeypatch.setattr("tool_packs.diff.LOGITS_AT_ONCE", 1)
    monkeypatch.setattr("tool_packs.logit_lens.CHUNK", 1)
    capsys.readouterr()
    LONG_CALLS[what](m)
    assert what not in capsys.readouterr().err  # it is over before anyone would ask
    monkeypatch.setattr("tool_packs.engine.SOON", 0.0)
    LONG_CALLS[what](m)
    assert re.search(rf"{what}: +0%.* 0/\d+ ", capsys.readouterr().err)
