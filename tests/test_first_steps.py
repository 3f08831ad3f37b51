"""The first minute of a client: start, write, run, read, stop."""

import nbformat
import pytest

from .support import Lab, processes_of, read_cells, text_of

pytestmark = pytest.mark.anyio


async def test_a_cell_runs_and_its_result_is_in_the_answer_and_in_the_notebook(lab: Lab) -> None:
    handle = await lab.start(name="first")
    result = await lab.cell(handle, "6 * 7")
    assert text_of(result).splitlines()[1] == "42"
    path = await lab.notebook_path(handle)
    (cell,) = read_cells(path)
    assert cell["outputs"][0]["data"]["text/plain"] == ["42"]
    assert cell["metadata"]["seer"]["state"] == "complete"
    nbformat.validate(nbformat.read(path, as_version=4))


async def test_stop_leaves_the_notebook_and_no_process(lab: Lab) -> None:
    handle = await lab.start()
    await lab.cell(
        handle, "import subprocess; p = subprocess.Popen(['sleep', '300'], start_new_session=True)"
    )
    assert len(processes_of(handle)) >= 3
    path = await lab.notebook_path(handle)
    await lab.ok("stop_sandbox", sandbox=handle)
    assert processes_of(handle) == []
    assert path.exists()
    assert "is gone (stopped by stop_sandbox)" in await lab.no(
        "create_cell", sandbox=handle, source="1"
    )


@pytest.mark.parametrize("module", ["tqdm.auto", "tqdm.notebook"])
async def test_a_progress_bar_reads_as_its_last_state(lab: Lab, module: str) -> None:
    handle = await lab.start()
    bar = f"from {module} import tqdm\nfor i in tqdm(range(56), desc='Loading'):\n    pass\nprint('done')"
    text = text_of(await lab.cell(handle, bar))
    assert "100%" in text and "56/56" in text and "done" in text
    assert "0%|  " not in text
