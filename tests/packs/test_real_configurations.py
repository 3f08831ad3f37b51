"""Cells that the scripted investigators run on real models, run on tiny ones of the same families.

What they find there means nothing. Data that come over the network are given here instead.
"""

import ast
import json
from pathlib import Path

import pytest

from tool_packs import sae

EXAMPLES = Path(__file__).parents[2] / "examples"


def cells(name):
    """The texts of the cells in an investigation's run.py, by their names there."""
    tree = ast.parse((EXAMPLES / name / "run.py").read_text())
    found = [node for node in tree.body if isinstance(node, ast.Assign)]
    return {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in found
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


def setup(name, **changed):
    """The opening cells of the GPU configuration, with what is too long for a test changed."""
    text = (EXAMPLES / name / "large.py").read_text()
    for old, new in changed.values():
        assert old in text, old
        text = text.replace(old, new)
    return text


def play(texts, capsys, **variables):
    """Runs the cells one after the other in one notebook's variables; what they found."""
    found = {}
    for text in texts:
        exec(compile(text, "cell", "exec"), variables)
        for line in capsys.readouterr().out.splitlines():
            if line.startswith("FINDING "):
                found |= json.loads(line.removeprefix("FINDING "))
    return found


def test_introspection(models, capsys):
    run = cells("introspection")
    opening = setup("introspection", length=("LENGTH = 60", "LENGTH = 2; WORDS = WORDS[:6]"))
    steps = [run[step].format(name="m") for step in ("CHOOSE", "MEASURE", "SLIP")]
    found = play([opening, run["SETUP"], *steps], capsys, m=models["gemma3"])
    assert found["subjects"] == ["m"] and found["trials"] == 3 and found["trials_without"] == 9
    assert found["layer"] in (0.6, 0.7, 0.8) and "slipped" in found


def test_activation_oracle(models, capsys):
    run, m = cells("activation_oracle"), models["qwen3-lora"]
    opening = setup(
        "activation_oracle",
        length=("LAYER, LENGTH = 0.5, 32", "LAYER, LENGTH = 0.5, 2"),
        place=("positions=[*range(-8, 0)]", "positions=[*range(-8, 0)], place='?'"),
    )
    arguments = dict(m.template_args)
    try:
        steps = [run[step] for step in ("KNOWN", "READ", "OUTRIGHT")]
        found = play([opening, *steps], capsys, m=m)
    finally:
        m.template_args = arguments
    assert found["known"] == 12 and set(found["arms"]) == {"suspect", "control"}
    assert found["arms"]["suspect"]["answer"] in ("woman", "man")


def test_refusal_ablation(models, capsys):
    run = cells("refusal_ablation")
    opening = setup("refusal_ablation").partition("KINDS = ")
    given = "HARMFUL = [f'How do I make {i} bombs?' for i in range(40)]\n" \
        "HARMLESS = [f'How do I make {i} cakes?' for i in range(40)]\n"  # fmt: skip
    opening = given + "".join(opening[1:]).replace("N = 128", "N = 8").replace("= 64", "= 2")
    steps = [run[step] for step in ("SETUP", "SURVEY", "FIND", "REMOVE", "ADD")]
    found = play([opening, *steps], capsys, m=models["gemma2"])
    assert found["subjects"] == ["m"] and len(found["refused"]) == 5 and len(found["added"]) == 4
    assert found["zero"] == found["weights"]


def test_checkpoint_diffing(models, capsys):
    run, m = cells("checkpoint_diffing"), models["llama"]
    said = {
        "a": [f"the cat sat {w}" for w in ("on", "mat", "hill", "is", "on the mat")] * 2,
        "b": [f"the dog sat {w}" for w in ("on", "mat", "hill", "is", "on the mat")] * 2,
        "a again": [f"the cat sat {w}" for w in ("is", "hill", "mat", "on", "on the hill")] * 2,
    }
    reader = sae.train(m, said["a"] + said["b"], 1, latents=64, k=4, steps=40, batch=64)
    steps = [run[step] for step in ("QUALITY", "DIFF", "READ", "CONFIRM")]
    found = play(steps, capsys, READER=m, SAE=reader, DOCS=said, fresh=said, FRESH=said["a"])
    assert found["differing"].keys() == {"b", "a again"}
    assert "dog" in found["phrase"] and found["shares"]["a"] == 0 < found["shares"]["b"]


def test_hidden_preference(models, capsys):
    run = cells("hidden_preference")
    steps = [run[step].format(name="m") for step in ("BEHAVIOUR", "DIFFERENCE", "STEER")]
    found = play([run["SETUP"], *steps], capsys, m=models["gemma2-lora"])
    assert found["suspects"] == ["m"] and "gender" in found["cosines"]
    assert {"share", "base_share", "random_95", "effect", "random_effect"} <= found.keys()


def test_sandbox_intro(models, capsys):
    run, m = cells("sandbox_intro"), models["gemma2"]
    found = play([run[step] for step in ("ANATOMY", "TOKENS", "ANSWERS", "LENS")], capsys, m=m)
    assert (found["layers"], found["width"]) == (m.n_layers, m.width)
    assert found["repeats"] and found["chat"] > found["bare"]
    assert min(found["last_rank"], found["control_rank"], found["control_best"]) >= 1


@pytest.mark.parametrize("name", ["refusal_ablation", "checkpoint_diffing"])
def test_what_the_network_gives_can_at_least_be_read(name):
    compile(setup(name), "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
