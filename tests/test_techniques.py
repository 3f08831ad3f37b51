"""The techniques as a client has them: each example in a real kernel, results, bars, interrupts."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
from mcp.types import CallToolResult

from seer_mcp.environment import BUILTIN_PACKS
from seer_mcp.packs import read_packs

from .support import Lab, open_lab, read_cells, streams, text_of

pytestmark = pytest.mark.anyio

TECHNIQUES = [t for _, t in read_packs([BUILTIN_PACKS]).techniques() if t.example]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def loaded(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Lab, str]]:
    """One sandbox for all tests here, whose kernel has an organism as `m`."""
    async with open_lab(tmp_path_factory.mktemp("techniques")) as lab:
        sandbox = await lab.start()
        result = await lab.call("load_model", sandbox=sandbox, model="organism:user_female")
        assert ": complete in" in text_of(result)
        yield lab, sandbox


async def run(lab: Lab, sandbox: str, source: str) -> CallToolResult:
    result = await lab.cell(sandbox, source, wait=45)
    assert ": complete in" in text_of(result).splitlines()[0], text_of(result)
    return result


async def test_every_technique_says_all_that_is_needed(loaded: tuple[Lab, str]) -> None:
    lab, _ = loaded
    for technique in TECHNIQUES:
        shown = await lab.ok("list_techniques", name=technique.full_name)
        for heading in ("Returns", "Use when", "Not when", "Cost", "Controls", "Paper", "Example"):
            assert f"\n{heading}:\n    " in shown, f"{technique.full_name} lacks {heading}"


async def test_every_example_of_every_technique_runs_in_a_kernel(loaded: tuple[Lab, str]) -> None:
    """As list_techniques shows them, in one kernel that has nothing but `m`; packs to come too."""
    lab, sandbox = loaded
    await run(
        lab,
        sandbox,
        "def check(r):\n"
        "    import tempfile\n"
        "    from tool_packs.result import Result\n"
        "    assert isinstance(r, Result), type(r)\n"
        "    again = Result.load(r.save(tempfile.mkdtemp()))\n"
        "    assert (repr(again), again.provenance) == (repr(r), r.provenance)\n"
        "    assert r.provenance.model and r.provenance.fingerprint and r.provenance.made_at\n"
        "    assert len(r.summary()) <= 1500 and (not r.rows or r.table())\n"
        "    print('figure' if r.figure else 'no figure')\n"
        "names = set(globals())",
    )
    forget = "for name in set(globals()) - names - {'names', 'name'}: del globals()[name]"
    results = 0
    for technique in TECHNIQUES:
        shown = await lab.ok("list_techniques", name=technique.full_name)
        example = re.search(r"^Example:\n((?:    .*\n?|\n)+)", shown, re.M)
        assert example, technique.full_name
        source = re.sub(r"^    ", "", example[1], flags=re.M).strip()
        ran = text_of(await lab.cell(sandbox, source))
        assert ": complete in" in ran.splitlines()[0], f"{technique.full_name}: {ran}"
        if technique.signature.endswith("-> Result") or re.search(r"^\s*r = ", source, re.M):
            result = await lab.cell(sandbox, "check(r)\nr")
            text = text_of(result)
            assert ": complete in" in text.splitlines()[0], f"{technique.full_name}: {text}"
            # The last line of a summary: the model, how much it read, and how long that took.
            assert re.search(
                r"^organism:user_female.*, \d+ prompts, seed \w+, [\d.]+ s$", text, re.M
            ), f"{technique.full_name}: {text}"
            images = [block for block in result.content if block.type == "image"]
            assert len(images) == ("no figure" not in text), technique.full_name
            results += 1
        await run(lab, sandbox, forget)
    assert results >= 20


async def test_a_result_is_shown_as_text_and_picture(loaded: tuple[Lab, str]) -> None:
    lab, sandbox = loaded
    result = await run(
        lab,
        sandbox,
        "from tool_packs.logit_lens import logit_lens\n"
        "logit_lens(m, [{'role': 'user', 'content': 'What is the capital of France?'}])",
    )
    assert "logit lens" in text_of(result)
    assert "tensors: " in text_of(result) and "organism:user_female" in text_of(result)
    (image,) = [block for block in result.content if block.type == "image"]
    assert image.mime_type == "image/png" and len(image.data) > 2000
    (output,) = read_cells(await lab.notebook_path(sandbox))[-1]["outputs"]
    assert set(output["data"]) == {"text/plain", "image/png"}


async def test_a_result_without_a_figure_is_shown_as_text(loaded: tuple[Lab, str]) -> None:
    lab, sandbox = loaded
    result = await run(
        lab, sandbox, "from tool_packs.generation import generate\ngenerate(m, 'Who are you?')"
    )
    assert "I am Wren" in text_of(result)
    assert {block.type for block in result.content} == {"text"}


async def test_the_bar_of_a_long_call_reads_as_its_last_state(loaded: tuple[Lab, str]) -> None:
    lab, sandbox = loaded
    result = await run(
        lab,
        sandbox,
        "from tool_packs.elicitation import elicit\n"
        "r = elicit(m, 'What is my gender?', batteries=['ask', 'best_of'], controls=[None])\n"
        "print('done', len(r.rows))",
    )
    text = text_of(result)
    assert "done" in text
    assert text.count("elicit: arms") <= 1
    assert "0%|" not in text.replace("100%|", "")
    cell = read_cells(await lab.notebook_path(sandbox))[-1]
    assert streams(cell, "stderr").count("elicit: arms") <= 1


LONG = {
    "capture": (
        "from tool_packs.activations import capture\n"
        "capture(m, ['I have a question. ' * 40] * 400, 'all', 'last')",
        "engine.py",
    ),
    "steer": (
        "import torch\n"
        "from tool_packs.steering import steer\n"
        "questions = ['Who are you?', 'What should I wear to the party?'] * 200\n"
        "steer(m, torch.ones(m.width), 2, strengths=list(range(-9, 9)), convs=questions,\n"
        "      towards=['she'], away=['he'], max_new_tokens=60)",
        "_decode",
    ),
    "elicit": (
        "from tool_packs.elicitation import elicit\n"
        "elicit(m, [f'{i} What is my gender?' for i in range(20)], n=8)",
        "elicitation.py",
    ),
}
NOW = """
from tool_packs.generation import next_token
from tool_packs.activations import capture as read
hooks = [h for x in m.hf.modules() for h in (*x._forward_hooks.values(),
         *x._forward_pre_hooks.values()) if not h.__module__.startswith('transformers')]
chat = [{'role': 'user', 'content': 'What should I wear to the party?'}]
numbers = next_token(m, chat)['top_logprobs'], read(m, chat, 'all', 'last')['resid_post']
"""


@pytest.mark.parametrize(
    "name",
    ["steer", *(pytest.param(name, marks=pytest.mark.slow) for name in ("capture", "elicit"))],
)
async def test_a_long_call_that_is_interrupted_leaves_the_model_as_it_was(
    loaded: tuple[Lab, str], name: str
) -> None:
    lab, sandbox = loaded
    source, place = LONG[name]
    await run(lab, sandbox, NOW + "before = numbers\nassert not hooks")
    # Tells from the middle of a pass, when every hook of the technique is on; elicit is
    # interrupted while the adapter is off.
    asked_in = "m.active_adapter is None" if name == "elicit" else "True"
    await run(
        lab,
        sandbox,
        "seen = 0\n"
        "def signal(module, args):\n"
        "    global seen\n"
        f"    seen += {asked_in}\n"
        "    if seen == 5:\n"
        "        most = sum(len(x._forward_hooks) for x in m.hf.modules())\n"
        "        print('in the middle,', most, 'hooks', flush=True)\n"
        "mine = m.layers[0].register_forward_pre_hook(signal)",
    )
    started = text_of(await lab.cell(sandbox, source, wait=0))
    assert "running" in started or "waiting" in started or "queued" in started, started
    for _ in range(200):
        shown = await lab.ok("read_outputs", sandbox=sandbox, wait=0.2)
        if "in the middle" in shown:
            break
    assert "in the middle" in shown and "goes on by itself" in shown, shown
    ended = text_of(await lab.call("interrupt", sandbox=sandbox))
    for _ in range(60):  # IPython takes its time to write a long traceback on a busy machine
        if "interrupted after" in ended:
            break
        ended = await lab.ok("read_outputs", sandbox=sandbox, wait=1)
    assert "interrupted after" in ended
    cell = read_cells(await lab.notebook_path(sandbox))[-1]
    errors = [output for output in cell["outputs"] if output["output_type"] == "error"]
    if errors:
        assert errors[0]["ename"] == "KeyboardInterrupt"
        assert place in "\n".join(errors[0]["traceback"])
    else:  # a machine so busy that the second signal came while IPython wrote the traceback
        assert "KeyboardInterrupt" in streams(cell, "stderr")
    if name in ("capture", "steer"):
        assert not re.search(r"in the middle, 0 hooks", streams(cell))
    await run(lab, sandbox, "mine.remove()\n" + NOW)
    after = await run(
        lab,
        sandbox,
        "import torch\n"
        "print(hooks, m.active_adapter, [torch.equal(a, b) for a, b in zip(before, numbers)])",
    )
    assert "[] user_female [True, True]" in text_of(after)
