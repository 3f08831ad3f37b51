"""Memory that runs out, in every pass of every technique: one sentence that says what to reduce."""

import contextlib
import gc
import re
import sys
import weakref

import pytest
import torch

from tests.packs.test_bad_input import FOLDER, TECHNIQUES, sentence
from tool_packs.activations import capture
from tool_packs.engine import removing, sparing
from tool_packs.errors import MemoryFull
from tool_packs.models import load_model
from tool_packs.patching import patch
from tool_packs.structure import first_tensor

TOLD = r"no memory on cpu for .*\d+.*: lower (m\.batch_tokens \(now \d+\)|\w+ \(now \d+\))"
# What these do not run is a pass of the model.
NO_PASS = {
    *("anatomy.anatomy", "anatomy.tokenize"),
    *("neuronpedia.feature", "neuronpedia.search", "neuronpedia.activations"),
}
# Their frames stand between a pass and the technique that wanted it.
BETWEEN = {"engine.py", "structure.py"}


# Of each kind of work one: the others are marked slow here and in test_interrupt.py.
ORDINARY = {
    *("activations.capture", "generation.generate", "patching.patch", "diff.activation"),
    *("attribution.attribute", "oracle.train", "sae.train", "tuned_lens.train_tuned_lens"),
}


def by_kind(names):
    return [n if n in ORDINARY else pytest.param(n, marks=pytest.mark.slow) for n in sorted(names)]


def place():
    """Which line of which pack runs the model now; None where the example itself does."""
    frame = sys._getframe(2)
    while frame is not None:
        folder, _, name = frame.f_code.co_filename.rpartition("/")
        if folder == str(FOLDER) and name not in BETWEEN:
            return name, frame.f_lineno
        frame = frame.f_back
    return None


@contextlib.contextmanager
def watched(m, met):
    """Within this met("forward" | "backward") is called in every pass, there and back again."""

    def before(module, args, kwargs):
        met("forward")

    def after(module, args, output):
        if first_tensor(output).requires_grad:
            first_tensor(output).register_hook(lambda _: met("backward"))

    with removing([]) as handles:
        for module in (m.layers[1], m.structure.unembedding):
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        for module in (m.layers[-1], m.structure.unembedding):
            handles.append(module.register_forward_hook(after))
        yield


@pytest.mark.parametrize("name", by_kind(TECHNIQUES))
def test_a_technique_that_finds_no_memory_says_what_to_reduce(folders, name):
    code = compile(TECHNIQUES[name].example, name, "exec")

    def play(met):
        m = load_model(str(folders["llama-lora"]))
        with watched(m, met):
            exec(code, {"m": m, "torch": torch})

    places = set()
    play(lambda way: places.add((way, place())))
    places = {(way, where) for way, where in places if where is not None}
    assert bool(places) == (name not in NO_PASS)
    for wanted in sorted(places):

        def full(way, wanted=wanted):
            if (way, place()) == wanted:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with pytest.raises(MemoryFull) as told:
            play(full)
        assert re.fullmatch(TOLD + "[^\n]*", str(told.value)), wanted


def test_a_processor_without_memory_says_the_same():
    told = sentence(lambda: take_all(torch.device("cpu")))
    assert told == "no memory on cpu for a test: lower n (now 3)"


def take_all(device):
    with sparing(device, "a test", "lower n (now 3)"):
        torch.empty(2**56, device=device)


def test_another_error_in_a_pass_stays_what_it_is():
    with pytest.raises(RuntimeError, match="other words"), sparing(torch.device("cpu"), "", ""):
        raise RuntimeError("other words")


@pytest.mark.parametrize("ask", ["capture", "patch"])
def test_what_a_pass_had_taken_is_free_while_the_error_is_looked_at(llama, ask):
    asks = {
        "capture": lambda: capture(llama, "the cat sat on the mat"),
        "patch": lambda: patch(llama, "the cat is", "the dog is", answers=("he", "she")),
    }
    asks[ask]()  # what is measured once for each model has been
    seen = []

    def keep(module, args, output):
        seen.append(weakref.ref(first_tensor(output)))

    def full(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with removing([]) as handles:
        handles.append(llama.layers[1].mlp.register_forward_hook(keep))
        handles.append(llama.layers[2].register_forward_pre_hook(full, with_kwargs=True))
        with pytest.raises(MemoryFull) as told:
            asks[ask]()
    gc.collect()
    assert seen and told.value.__cause__ is None
    assert all(state() is None for state in seen)
