"""Every command and code block of the pages: run as it stands, or read by what would run it and the reason told.

uv run pytest -m slow -n 0 tests/test_doc_commands.py     (what is typed: four minutes; a step of .ci/run)
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from modal.cli.entry_point import entrypoint_cli

from seer_mcp.cli import parser
from seer_mcp.environment import read_investigation, read_scope
from seer_mcp.grading import graded, read_grader

from .faults.conftest import place
from .faults.ground import Ground
from .load.serving import free_port
from .models.hub import open_hub
from .pages import INLINE, PAGES, ROOT, Block, blocks, commands, name_of, program, prose, typed
from .support import open_lab
from .typing_in import type_in

sys.path.insert(0, str(ROOT / "docs"))
import tables

__all__ = ["place"]
pytestmark = pytest.mark.anyio

ALL = [block for page in PAGES for block in blocks(page)]
LINES = list(dict.fromkeys(typed()))


# -- what is run, and where ---------------------------------------------------------------------

HERE = {
    "alone": [  # a home that has nothing in it yet
        "uv run seer-mcp install claude-code",
        "uv run seer-mcp schema > investigation.schema.json",
        "uv run seer-mcp grades",
        "uv run seer-mcp grades --json",
        "uv run seer-mcp sandboxes list",
        "uv run seer-mcp sandboxes stop --all",
        "uv run seer-mcp token create anna > anna.token",
        "uv run seer-mcp token create anna --scope scoped:call",
    ],
    "servers": [  # over stdio: each ends with its input
        "uv run seer-mcp --python /path/to/env/bin/python",
        "uv run seer-mcp --investigations ~/investigations",
        "SEER_MCP_FAULT=after:run.saved:1 uv run seer-mcp",
        "uv run seer-mcp --scope interface.py",
    ],
    "serving": [  # over HTTP: each answers, and ends when it is told to
        "uv run seer-mcp serve --port 8757",
        "uv run seer-mcp serve --budget '$20 a day' --budget '600 GPU-minutes a month'",
        "uv run seer-mcp serve --scope interface.py",
        "uv run seer-mcp serve --scope interface.py --port 8760",
        "uv run seer-mcp serve --scope interface.py --users",
    ],
    "packs": [
        "uv run seer-mcp packs new my_lens --in packs",
        "uv run seer-mcp packs check packs",
        "uv run seer-mcp --packs packs",
    ],
    "doctor": [
        "uv run seer-mcp doctor",
        "uv run seer-mcp doctor --fix",
        "uv run seer-mcp doctor --json --only records --only sockets",
    ],
    "notebooks": [
        "uv run seer-mcp replay outputs/NAME/NAME.ipynb --model organism:control",
        "uv run seer-mcp report outputs/*/*.ipynb",
        "uv run seer-mcp export outputs/NAME/NAME.ipynb --to html",
        "uv run seer-mcp export first.ipynb",
        "uv run seer-mcp export first.ipynb --to script --out first.py",
        "uv run seer-mcp export first.ipynb --to markdown",
        "uv run seer-mcp report runs/*/*.ipynb --out report.html",
    ],
    "replays": [
        "uv run seer-mcp replay outputs/hidden-preference/hidden-preference.ipynb",
        "uv run seer-mcp replay first.ipynb --model organism:control",
        "uv run seer-mcp replay first.ipynb --tolerance 0.01 --similarity 0.8 --json said.json",
    ],
    "models": [  # from a hub on loopback
        "uv run seer-mcp models fetch Qwen/Qwen3-0.6B",
        "uv run seer-mcp models fetch lab/lora@v2",
        "uv run seer-mcp models list",
        "uv run seer-mcp models check Qwen/Qwen3-0.6B",
        "uv run seer-mcp models remove lab/lora@v2",
    ],
}
TEAM = "tests/team/test_team_doc.py"
ELSEWHERE = {
    "pip install uv": ".ci/run",
    "uv sync": ".ci/run",
    "uv run pytest": ".ci/run",
    "uv run seer-mcp demo": "tests/test_demo.py",
    "uv run python examples/first_investigation.py": "tests/test_demo.py",
    "claude mcp add seer -- uv run --project /absolute/path/to/seer-mcp seer-mcp": ".ci/clients",
    "uv run seer-mcp watch --no-browser": "tests/team/test_watch.py",
    "uv run pytest -m slow -n 0 tests/faults/test_p_points.py": "tests/faults/test_p_points.py",
    "uv run pytest -m slow -n 0 tests/load/test_load.py -s": "tests/load/test_load.py",
    "uv run --extra evals python examples/evals/table.py logs": "tests/evals/test_evals.py",
}
MODAL = "Modal's own cloud wants an account, and is billed; the same flags are tried against the cloud of tests/"
KEY = "wants a provider's key; tests/evals/ runs the same evaluation with a scripted model"
LONG = "minutes to hours"
MACHINE = "would change the machine it is typed on; tests/team/test_deploy.py reads the files that it names"
READ = {
    "git clone https://github.com/seer-mcp/seer-mcp && cd seer-mcp": "a network",
    "uvx pre-commit install": "would change the checkout's hooks",
    "uvx pre-commit run --all-files": "its hooks are the first steps of .ci/run",
    "claude mcp add --transport http seer http://127.0.0.1:8757/mcp --header "
    '"Authorization: Bearer $(cat TOKEN_FILE)"': (
        "the server names the file; .ci/clients and tests/team/test_team_doc.py run it with theirs"
    ),
    "uv run seer-mcp watch": "opens a browser; docs/team.md has it without, and that is run",
    "uv run seer-mcp demo --backend modal": MODAL,
    "uv run seer-mcp sandboxes sweep": MODAL,
    "uv run seer-mcp models fetch Qwen/Qwen3-0.6B --backend modal": MODAL,
    "uv run seer-mcp models list --backend modal": MODAL,
    "uv run seer-mcp replay first.ipynb --model m=org/name --backend modal --gpu A100-80GB": MODAL,
    "uv run pytest -m live -n 0 tests/backends/test_modal_live.py": MODAL,
    "modal secret create seer-mcp SEER_URL=https://WORKSPACE--seer-mcp-serve.modal.run MODAL_TOKEN_ID=... "
    "MODAL_TOKEN_SECRET=...": MODAL,
    "modal deploy docs/deploy/modal_app.py": MODAL,
    "modal volume get seer-mcp state/audit.jsonl": MODAL,
    "uv sync --extra evals": "would change the environment under the tests",
    "uv run --extra evals inspect eval examples/evals/planted.py --model anthropic/claude-sonnet-4-5": KEY,
    "uv run --extra evals inspect eval examples/evals/planted.py --model openai/gpt-5 "
    "-T organisms=user_female,control -T techniques=black_box,lenses --epochs 5": KEY,
    "OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf uv run "
    "--with opentelemetry-distro --with opentelemetry-exporter-otlp-proto-http opentelemetry-instrument seer-mcp": (
        "fetches packages, and wants a collector"
    ),
    "uv run python -m tests.load.soak --minutes 30 --runs 5000 --seed 1 --page docs/reliability.md": LONG,
    "uv run python -m tool_packs.organisms.make --out DIR --seed 1": LONG,
    "uv run python -m tool_packs.organisms.check DIR": LONG,
    'uvx "seer-mcp[local]" bench-techniques': LONG,
    'uv run seer-mcp bench-techniques --organisms brand backdoor --methods "logit lens" "direction" --seeds 0,2': LONG,
    "uv run seer-mcp bench-techniques --json figures.json --page docs/techniques.md": LONG,
    "SEER_HOST=seer.example.org docker compose --file docs/deploy/compose.yaml up --detach": MACHINE,
    "docker compose --file docs/deploy/compose.yaml exec seer seer-mcp token create anna": MACHINE,
    "python3 -m venv /opt/seer-mcp/.venv && /opt/seer-mcp/.venv/bin/pip install "
    "/path/to/seer_mcp-VERSION-py3-none-any.whl": MACHINE,
    "useradd --system --home-dir /var/lib/seer-mcp seer": MACHINE,
    "cp docs/deploy/seer-mcp.service /etc/systemd/system/ && systemctl enable --now seer-mcp": MACHINE,
    "sudo -u seer SEER_MCP_STATE=/var/lib/seer-mcp/state /opt/seer-mcp/.venv/bin/seer-mcp token create anna": MACHINE,
}


def run_by(page: str, line: str) -> list[str]:
    """Every place that runs or reads a line."""
    found = ["here" for group in HERE.values() if line in group]
    if line in ELSEWHERE:
        found.append(ELSEWHERE[line])
    if page == "docs/team.md":  # its test runs all of it
        found = [TEAM]
    elif line in team_lines() and not found:
        found.append(TEAM)
    if re.fullmatch(r"uv run python examples/\w+/run\.py", line):
        found.append("tests/test_examples.py")
    if line in READ:
        found.append(READ[line])
    return found


def team_lines() -> set[str]:
    return {line for page, line in LINES if page == "docs/team.md"}


def test_every_line_is_run_somewhere_or_has_the_reason_why_not() -> None:
    assert len(LINES) > 100
    found = {(page, line): run_by(page, line) for page, line in LINES}
    assert {line: places for line, places in found.items() if len(places) != 1} == {}


def test_no_line_is_listed_that_no_page_has() -> None:
    there = {line for _, line in LINES}
    listed = {line for group in HERE.values() for line in group} | ELSEWHERE.keys() | READ.keys()
    assert listed - there == set()
    assert [where for where in ELSEWHERE.values() if not (ROOT / where).is_file()] == []


# -- run as it stands ---------------------------------------------------------------------------


def TYPED(test: Any) -> Any:  # `.ci/run` has a step for these
    return pytest.mark.slow(pytest.mark.timeout(180)(test))


def python_blocks(page: str) -> list[str]:
    return [block.text for block in ALL if (block.page, block.language) == (page, "python")]


@TYPED
def test_what_needs_nothing(place: Ground) -> None:
    said = type_in(place, "\n".join(HERE["alone"]))
    assert json.loads((place.folder / "investigation.schema.json").read_text())["properties"]
    assert len((place.folder / "anna.token").read_text().strip()) > 30
    assert "no findings" in said.lower() or "no grades" in said.lower(), said


@TYPED
def test_servers_over_stdio_start_and_end(place: Ground) -> None:
    (place.folder / "investigations").mkdir()
    (place.folder / "interface.py").write_text(python_blocks("docs/scoped.md")[0])
    script = "\n".join(HERE["servers"])
    assert "Traceback" not in type_in(place, script.replace("/path/to/env", sys.prefix))


@TYPED
@pytest.mark.parametrize("line", HERE["serving"])
def test_servers_over_http_answer(place: Ground, line: str) -> None:
    (place.folder / "interface.py").write_text(python_blocks("docs/scoped.md")[0])
    port = free_port()
    line = re.sub(r" --port \d+", "", line).replace(" serve", f" serve --port {port}")
    ready = f"http://127.0.0.1:{port}/healthz"
    asked = f"curl --silent --retry 60 --retry-delay 1 --retry-connrefused {ready}"
    before = "uv run seer-mcp token create anna" if "--users" in line else "true"
    said = type_in(place, f"{before}\n{line} &\n{asked}\nkill %1\nwait %1")
    assert re.search(r"^ok", said, re.M), said


@TYPED
def test_a_pack_of_ones_own(place: Ground) -> None:
    said = type_in(place, "\n".join(HERE["packs"]))
    assert "my_lens" in said and (place.folder / "packs" / "my_lens.py").is_file()


@TYPED
def test_the_doctor(place: Ground) -> None:
    said = type_in(place, "\n".join(HERE["doctor"]), SEER_MCP_STATE=str(place.folder / "state"))
    assert "records" in said and "sockets" in said


@pytest.fixture
async def notebook(place: Ground) -> Path:
    """first.ipynb, with a model, also in the folders that the pages name."""
    async with open_lab(place.folder, runtime_dir=place.sockets) as lab:
        handle = await lab.start(name="first")
        await lab.ok("load_model", sandbox=handle, model="organism:user_female")
        await lab.ok("create_cell", sandbox=handle, source="print(m.n_layers * 7)")
        made = await lab.notebook_path(handle)
        await lab.ok("stop_sandbox", sandbox=handle)
    for copy in (
        "first",
        "outputs/NAME/NAME",
        "outputs/hidden-preference/hidden-preference",
        "runs/a/a",
    ):
        path = place.folder / f"{copy}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(made.read_bytes())
    return made


@TYPED
async def test_a_finished_notebook_is_replayed_exported_and_reported(
    place: Ground, notebook: Path
) -> None:
    type_in(place, "\n".join(HERE["notebooks"]))
    made = ["outputs/NAME/NAME.html", "first.html", "first.py", "first.md", "report.html"]
    assert [name for name in made if not (place.folder / name).is_file()] == []
    assert "print(m.n_layers * 7)" in (place.folder / "first.py").read_text()


@TYPED
async def test_replays(place: Ground, notebook: Path) -> None:
    type_in(place, "\n".join(HERE["replays"]))
    assert json.loads((place.folder / "said.json").read_text())


@TYPED
def test_models_are_fetched_once(place: Ground) -> None:
    model = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}"}
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "Qwen/Qwen3-0.6B"}'}
    with open_hub() as hub:
        hub.add("Qwen/Qwen3-0.6B", {**model, "model.safetensors": b"weights"})
        lora = hub.add("lab/lora", {**adapter, "adapter_model.safetensors": b"weights"})
        lora.refs["v2"] = lora.refs["main"]
        more = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "", "SEER_MCP_MODELS": "models"}
        said = type_in(place, "\n".join(HERE["models"]), **more)
    assert "Qwen/Qwen3-0.6B" in said and "lab/lora" in said


# -- read by what would run it -----------------------------------------------------------------


def is_ours(words: list[str]) -> None:
    """A command of seer-mcp that its parser does not know, or a flag of one, fails."""
    try:
        known = (words and not words[0].startswith("-")) or words[:1] in (["--version"], ["--help"])
        parser().parse_args(words if known else ["stdio", *words])
    except SystemExit as ended:
        assert ended.code == 0, words


def is_a_script(words: list[str]) -> None:
    """A script or module that is not there, or a flag that it does not mention, fails."""
    name = words[1] if words[0] == "-m" else words[0]
    if name == "venv":
        return
    file = ROOT / (f"{name.replace('.', '/')}.py" if words[0] == "-m" else name)
    assert file.is_file(), name
    flags = [word for word in words[1:] if word.startswith("--")]
    assert [flag for flag in flags if f'"{flag}"' not in file.read_text()] == []


def is_pytest(words: list[str]) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    marks = {mark.split(":")[0] for mark in settings["markers"]}
    rest = iter(words)
    for word in rest:
        if word == "-m":
            assert next(rest) in marks
        elif word in {"-n", "-k"}:
            assert next(rest)
        elif word not in {"-s", "-q"}:
            assert (ROOT / word).exists(), word


def is_an_evaluation(words: list[str]) -> None:
    assert words[0] == "eval"
    tree = ast.parse((ROOT / words[1]).read_text())
    (task,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.decorator_list)
    taken = {argument.arg for argument in task.args.args}
    given = {b.partition("=")[0] for a, b in pairwise(words) if a == "-T"}
    assert given <= taken


def is_of_compose(words: list[str]) -> None:
    file = words[words.index("--file") + 1]
    services = yaml.safe_load((ROOT / file).read_text())["services"]
    if "exec" in words:
        service, command, *rest = words[words.index("exec") + 1 :]
        assert service in services and command == "seer-mcp"
        is_ours(rest)


def is_of_modal(words: list[str]) -> None:
    known: Any = entrypoint_cli
    for word in words:
        if not hasattr(known, "commands"):
            break
        known = known.commands[word]
    assert words[0] != "deploy" or (ROOT / words[1]).is_file()


def is_of_claude(words: list[str]) -> None:
    assert words[:2] in (
        ["mcp", "add"],
        ["mcp", "list"],
        ["plugin", "install"],
        ["plugin", "marketplace"],
    )
    if "--" in words:
        is_known(words[words.index("--") + 1 :])


READERS: dict[str, Callable[[list[str]], None]] = {
    "seer-mcp": is_ours,
    "python": is_a_script,
    "python3": is_a_script,
    "pytest": is_pytest,
    "inspect": is_an_evaluation,
    "docker": is_of_compose,
    "modal": is_of_modal,
    "claude": is_of_claude,
}
PLAIN = {"git", "cd", "pip", "uv", "pre-commit", "sphinx-build"}
PLAIN |= {"useradd", "cp", "systemctl", "export", "curl", "kill", "tar"}


def is_known(words: list[str]) -> None:
    name, *arguments = program(words)
    if name not in PLAIN:
        READERS[name](arguments)


@pytest.mark.parametrize("page", sorted({page for page, _ in LINES}))
def test_every_line_is_understood_by_what_would_run_it(page: str) -> None:
    for line in (line for where, line in LINES if where == page):
        for words in commands(line):
            is_known(words)


@pytest.mark.parametrize(
    "wrong",
    [
        "uv run seer-mcp --scoep x.py",
        "uv run seer-mcp serv",
        'uvx "seer-mcp[local]" demo --jsno',
        "uv run pytest -m slwo",
        "uv run python -m tests.load.soak --hours 1",
    ],
)
def test_a_flag_that_is_not_there_is_seen(wrong: str) -> None:
    (words,) = commands(wrong)
    with pytest.raises(AssertionError):
        is_known(words)


IN_PROSE = re.compile(r"(uv run|uvx|seer-mcp) \S")
MEANT = {  # names of commands, without what they are given
    "seer-mcp install CLIENT": "seer-mcp install cursor",
    "seer-mcp models": "seer-mcp models list",
    "seer-mcp packs new": "seer-mcp packs new NAME",
    "seer-mcp packs new|check": "seer-mcp packs check FOLDER",
    "seer-mcp replay": "seer-mcp replay NOTEBOOK",
    "seer-mcp sandboxes": "seer-mcp sandboxes list",
}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_in_sentences_are_understood(page: Path) -> None:
    for text in INLINE.findall(prose(page)):
        text = " ".join(text.split())
        if IN_PROSE.match(text):
            for words in commands(MEANT.get(text, text)):
                is_known(words)


LANGUAGES = {"console", "text", "python", "toml", "json", "{toctree}"}


def test_every_block_says_what_it_is() -> None:
    assert [block for block in ALL if block.language not in LANGUAGES] == []
    prompts = re.compile(r"^(\$ |uv |uvx |seer-mcp |pip |claude |python )", re.M)
    shown = [block for block in ALL if block.language == "text" and prompts.search(block.text)]
    assert shown == [], "a command that nobody tries"


def of(language: str) -> Any:
    found = [block for block in ALL if block.language == language]
    return pytest.mark.parametrize("block", found, ids=lambda b: f"{b.page}: {b.text[:30]!r}")


def test_a_shell_can_read_them() -> None:
    for block in (block for block in ALL if block.language == "console"):
        done = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert done.returncode == 0, (block, done.stderr)


@of("json")
def test_it_is_json(block: Block) -> None:
    json.loads(block.text)


@of("toml")
def test_what_reads_such_a_file_takes_it(block: Block, tmp_path: Path) -> None:
    given = tomllib.loads(block.text)
    if "kind" in given:
        (tmp_path / "grader.toml").write_text(block.text)
        assert read_grader(tmp_path / "grader.toml")
    elif "project" in given:
        assert block.page == "docs/own-techniques.md"  # tests/test_pages.py has the entry points
    elif "interface" in given or "scoped" in given:
        (tmp_path / "target").mkdir()
        for folder in (tmp_path, tmp_path / "target"):
            (folder / "target.py").write_text(python_blocks("docs/scoped.md")[0])
        (tmp_path / "target.toml").write_text(block.text)
        reader = read_scope if "interface" in given else read_investigation
        assert reader(tmp_path / "target.toml")
    else:
        for name in ("task.md", "grade.py", "words.txt"):
            (tmp_path / name).write_text("Look.")
        for name in ("prompts", "data/prompts", "packs", "adapter"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "one.txt").write_text("one")
        (tmp_path / "investigation.toml").write_text(block.text)
        assert read_investigation(tmp_path)


# -- Python: what is not run here, other tests run -----------------------------------------------

RUN_BY = {
    "docs/tutorial.md": "tests/test_pages.py",
    "docs/own-techniques.md": "tests/packs/test_own_techniques_doc.py",
    "docs/scoped.md": "tests/scoped/test_interface.py",
}


def test_every_block_of_python_is_run() -> None:
    pages = {block.page for block in ALL if block.language == "python"}
    assert pages == RUN_BY.keys() | {
        "docs/investigations.md",
        "docs/models.md",
        "docs/organisms.md",
    }
    for page, test in RUN_BY.items():
        assert Path(page).name in (ROOT / test).read_text()


def test_a_kernel_finds_a_model_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from tool_packs import organisms

    monkeypatch.setenv("SEER_MODELS", "{}")  # to be put back: the block sets it
    (source,) = python_blocks("docs/models.md")
    found: dict[str, Any] = {}
    exec(source.replace("/data/models/one", str(organisms.path("base"))), found)
    assert found["m"].n_layers > 0


def test_the_organisms_tell_what_the_page_says() -> None:
    (source,) = python_blocks("docs/organisms.md")
    exec(source, found := {})
    organisms = found["organisms"]
    assert organisms.NAMES[:3] == ("base", "user_female", "user_male")
    assert organisms.SEEDS == (1, 0, 2)
    assert found["m"].adapters


async def test_the_grader_of_the_page_grades(tmp_path: Path) -> None:
    (source,) = (text for text in python_blocks("docs/investigations.md") if "def grade" in text)
    (tmp_path / "grade.py").write_text(source)
    grade = await graded(read_grader(tmp_path / "grade.py"), {"claim": "", "answer": ""}, None)
    assert (grade.failed, grade.score) == ("", 0.5)


def test_the_findings_of_the_page_are_what_the_tool_takes() -> None:
    (source,) = (
        text for text in python_blocks("docs/investigations.md") if "submit_findings(" in text
    )
    call = ast.parse(source).body[0].value  # type: ignore[attr-defined]
    given = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    (tool,) = (tool for tool in tables.all_tools() if tool.name == "submit_findings")
    jsonschema.validate(given, tool.parameters)
    assert given.keys() <= tool.parameters["properties"].keys()
