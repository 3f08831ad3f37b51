"""The cells of docs/own-techniques.md run in IPython, and nnsight and the hook agree."""

import re
from pathlib import Path

import pytest

pytest.importorskip("nnsight")
PAGE = Path(__file__).parents[2] / "docs" / "own-techniques.md"


@pytest.mark.parametrize("name", ["llama", "gpt2", "llama-lora"])
def test_the_cells_of_the_page_run_and_agree(folders, name):
    from IPython.core.interactiveshell import InteractiveShell

    from tool_packs.models import load_model

    m = load_model(str(folders[name]))
    shell = InteractiveShell()
    shell.user_ns["m"] = m
    cells = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(cells) == 2
    for cell in cells:
        shell.run_cell(cell, store_history=True).raise_error()
    moved, by_hook = shell.user_ns["moved"], shell.user_ns["by_hook"]
    assert len(moved) == m.n_layers
    assert min(moved) > 1e-3
    assert moved == pytest.approx(by_hook, abs=1e-5)
