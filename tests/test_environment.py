"""Environments as code: investigation.toml, amounts with units, GPUs, the schema."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from seer_mcp.environment import (
    GPUS,
    ModelSpec,
    Repo,
    SandboxSpec,
    parse_gpu,
    read_investigation,
    schema,
)
from seer_mcp.environment.units import dollars, mebibytes, seconds
from seer_mcp.errors import BadInput, InvestigationRefused, NotFound
from seer_mcp.money import TABLE, Rates, estimate, hard_stop, priced_as, terms
from seer_mcp.sessions.blinding import refuse_what_tells

WHOLE = """
name = "whole"
title = "Everything at once"
task = "text/task.md"
packs = ["activations", "./packs"]
grader = "grade.py"

[sandbox]
backend = "modal"
gpu = "H100:4"
cpu = 8
memory = "64 GiB"
lifetime = "4 h"
idle_limit = 30
budget = "$5"
gpu_minutes = 90
network = ["HuggingFace.co", "*.hf.co"]
python_packages = ["torch==2.9.1", "sae-lens>=6"]
system_packages = ["git", "ffmpeg=7:6.1-3"]
secrets = ["HF_TOKEN", "ANTHROPIC_API_KEY"]
docker = true

[sandbox.files]
"data/prompts" = "prompts"
"words.txt" = "words.txt"

[sandbox.env]
OMP_NUM_THREADS = 4
MODE = "fast"

[[sandbox.repos]]
url = "https://github.com/someone/something"
ref = "v1.2"
install = true
path = "lib/something"

[[models]]
name = "google/gemma-2-9b-it"
revision = "main"
adapter = "./adapter"
dtype = "bfloat16"
hidden = true

[[models]]
name = "organism:base"
variable = "reader"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    here = tmp_path / "My Investigation"
    for name in ("prompts/deep", "packs", "text", "adapter"):
        (here / name).mkdir(parents=True)
    (here / "prompts" / "deep" / "one.txt").write_text("one")
    (here / "words.txt").write_text("words")
    (here / "text" / "task.md").write_text("Find out what it wants.\n")
    (here / "grade.py").write_text("def grade(): ...\n")
    return here


def write(folder: Path, text: str) -> Path:
    (folder / "investigation.toml").write_text(text)
    return folder


def problems(folder: Path, text: str) -> list[str]:
    with pytest.raises(InvestigationRefused) as caught:
        read_investigation(write(folder, text))
    assert str(folder / "investigation.toml") in str(caught.value)
    return list(caught.value.problems)


# -- the file ---------------------------------------------------------------------------------


def test_everything_that_a_file_can_say_is_read(folder: Path) -> None:
    found = read_investigation(write(folder, WHOLE))
    assert found.sandbox == SandboxSpec(
        backend="modal",
        gpu="H100",
        gpu_count=4,
        cpu=8,
        memory=65536,
        lifetime=4 * 3600,
        idle_limit=1800,
        budget=5,
        gpu_minutes=90,
        network=("huggingface.co", "*.hf.co"),
        python_packages=("torch==2.9.1", "sae-lens>=6"),
        system_packages=("git", "ffmpeg=7:6.1-3"),
        secrets=("HF_TOKEN", "ANTHROPIC_API_KEY"),
        docker=True,
        files={
            "data/prompts": str(folder / "prompts"),
            "words.txt": str(folder / "words.txt"),
        },
        env={"OMP_NUM_THREADS": "4", "MODE": "fast"},
        repos=(
            Repo(
                url="https://github.com/someone/something",
                ref="v1.2",
                install=True,
                path="lib/something",
            ),
        ),
        models=(
            ModelSpec(
                name="google/gemma-2-9b-it",
                revision="main",
                adapter=str(folder / "adapter"),
                dtype="bfloat16",
                hidden=True,
            ),
            ModelSpec(name="organism:base", variable="reader"),
        ),
    )
    assert (found.name, found.title) == ("whole", "Everything at once")
    assert found.task == "Find out what it wants.\n"
    assert (found.packs, found.pack_folders) == (("activations",), (folder / "packs",))
    assert (found.grader, found.folder) == (folder / "grade.py", folder)
    assert found.models == found.sandbox.models
    assert found.sandbox.limit().gpu_minutes == 90
    assert read_investigation(folder / "investigation.toml") == found


def test_an_empty_file_is_a_local_sandbox(folder: Path) -> None:
    found = read_investigation(write(folder, ""))
    assert found.sandbox == SandboxSpec()
    assert (found.name, found.task, found.grader) == ("my-investigation", "", None)
    (folder / "task.md").write_text("Look.")
    assert read_investigation(folder).task == "Look."


def test_plain_numbers_are_gib_minutes_and_dollars(folder: Path) -> None:
    text = "[sandbox]\nmemory = 1.5\nlifetime = 90\nidle_limit = 0.5\nbudget = 2.5\n"
    spec = read_investigation(write(folder, text)).sandbox
    assert (spec.memory, spec.lifetime, spec.idle_limit, spec.budget) == (1536, 5400, 30, 2.5)


def test_an_interpreter_may_lie_in_a_folder_with_a_space(folder: Path) -> None:
    text = "[sandbox]\npython = '/Users/Jane Doe/venv/bin/python'"
    assert (
        read_investigation(write(folder, text)).sandbox.python == "/Users/Jane Doe/venv/bin/python"
    )
    assert "sandbox.python" in problems(folder, "[sandbox]\npython = '-c'")[0]


def test_in_code_the_same_fields_count_mib_and_seconds() -> None:
    spec = SandboxSpec(memory=1536, lifetime=90)
    assert (spec.memory, spec.lifetime) == (1536, 90)


def test_where_there_is_no_investigation_it_is_said(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere.toml"):
        with pytest.raises(NotFound, match=r"investigation\.toml"):
            read_investigation(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[sandbox\n", "it is no TOML"),
        (b"\xff\xfe", "not UTF-8"),
        (b"a = 1\n" * 300_000, "more than 1,000,000 bytes"),
        (b"a = " + b"[" * 5000 + b"]" * 5000, "nested too deep|no TOML"),
    ],
)
def test_a_file_that_cannot_be_parsed_is_refused(folder: Path, content: bytes, said: str) -> None:
    (folder / "investigation.toml").write_bytes(content)
    with pytest.raises(InvestigationRefused, match=said):
        read_investigation(folder)


# -- what is wrong, and what is allowed -------------------------------------------------------

WRONG = [
    ('nmae = "x"', "the file has no key 'nmae'. Did you mean 'name'?"),
    ('gpu = "T4"', "gpu belongs into [sandbox]"),
    ("[sandbox]\nmodels = []", "models stands outside of [sandbox]: [[models]]"),
    ('[sandbox]\ngpu_cuont = 2', "[sandbox] has no key 'gpu_cuont'. Did you mean 'gpu_count'?"),
    ('[sandbox]\ngpu = "H1000"', "sandbox.gpu = 'H1000': no such GPU. Did you mean 'H100'?"),
    ('[sandbox]\ngpu = "A10:8"', "sandbox.gpu_count = 8: 8 × A10: 1 to 4"),
    ('[sandbox]\ngpu = "H100:2"\ngpu_count = 4', "gpu = 'H100:2' and gpu_count = 4 differ"),
    ('[sandbox]\ngpu = "T4"\ngpu_count = true', "sandbox.gpu_count = True"),
    ("[sandbox]\ncpu = -1", "sandbox.cpu = -1: input should be greater than 0"),
    ('[sandbox]\ncpu = "many"', "sandbox.cpu = 'many': input should be a valid number"),
    ('[sandbox]\nmemory = "lots"', 'sandbox.memory = \'lots\': write a number with its unit: "64 GiB"'),
    ("[sandbox]\nmemory = 65536", "sandbox.memory = 65536: a plain number counts GiB"),
    ('[sandbox]\nmemory = "1 MiB"', "sandbox.memory = '1 MiB': a kernel needs at least 64 MiB"),
    ('[sandbox]\nlifetime = "soon"', 'sandbox.lifetime = \'soon\': write a number with its unit: "45 min"'),
    ("[sandbox]\nlifetime = 99999", "sandbox.lifetime = 99999: a plain number counts min"),
    ('[sandbox]\nidle_limit = "-5 min"', "sandbox.idle_limit = '-5 min': write a number"),
    ("[sandbox]\nidle_limit = 0", "sandbox.idle_limit = 0: input should be greater than 0"),
    ('[sandbox]\nbudget = "free"', "sandbox.budget = 'free': write dollars"),
    ('[sandbox]\nbudget = "40 GPU-minutes"', "write gpu_minutes = 40"),
    ('[sandbox]\nnetwork = "off"', "sandbox.network = 'off': write true, false, or a list of domains"),
    ('[sandbox]\nnetwork = ["https://x.org/"]', "'https://x.org/' is no domain"),
    ('[sandbox]\npython_packages = ["--index-url=x"]', "sandbox.python_packages[0] = '--index-url=x'"),
    ('[sandbox]\nsystem_packages = ["; rm"]', "sandbox.system_packages[0] = '; rm': write the name"),
    ('[sandbox]\nsecrets = ["MODAL_TOKEN_SECRET"]', "no sandbox gets them"),
    ('[sandbox]\nsecrets = ["PATH"]', "a setting of the system"),
    ('[sandbox.env]\nSEER_MCP_STATE = "x"', "belong to this server"),
    ("[sandbox.env]\nA = true", "sandbox.env.A: write what the program expects"),
    ('[sandbox.env]\n"A B" = "x"', "write the name of an environment variable"),
    ('[[sandbox.repos]]\nref = "main"', "sandbox.repos[0] needs url"),
    ('[[sandbox.repos]]\nurl = "rm -rf"', "sandbox.repos[0].url = 'rm -rf': write https://"),
    ('[[sandbox.repos]]\nurl = "https://x.org/y"\nref = "--upload-pack=x"', "sandbox.repos[0].ref"),
    ('[[sandbox.repos]]\nurl = "https://x.org/y"\npath = "../y"', "stays in the kernel's working folder"),
    ('[[sandbox.repos]]\nurl = "https://x.org/y"\ncommit = "x"', "[sandbox.repos[0]] has no key 'commit'"),
    ("[[models]]\nvariable = 'm'", "models[0] needs name"),
    ("[[models]]\nname = 'a'\nvariable = 'class'", "models[0].variable = 'class': write the name of a Python variable"),
    ("[[models]]\nname = 'a'\ndtype = 'fp8'", "models[0].dtype = 'fp8'"),
    ("[[models]]\nname = 'a'\n[[models]]\nname = 'b'", "two models have the variable 'm'"),
    ("[[models]]\nname = './nowhere'", "models[0].name = './nowhere': there is no such file"),
    ("name = 'Not A Name'", "name = 'Not A Name': 1 to 40 of a-z"),
    ("task = 'nowhere.md'", "task = 'nowhere.md': there is no such file"),
    ("task = '../task.md'", "task = '../task.md': name something in the investigation's folder"),
    ("task = '/etc/hostname'", "task = '/etc/hostname': name something in"),
    ("grader = 'words.txt'", "grader = 'words.txt': it must be a Python file"),
    ("packs = ['activation']", "neither a built-in pack nor a folder here. Did you mean 'activations'?"),
    ("packs = ['./words.txt']", "packs[0] = './words.txt': name the folder"),
    ("[sandbox.files]\n'../x' = 'words.txt'", "stays in the kernel's working folder"),
    ("[sandbox.files]\n'/x' = 'words.txt'", "stays in the kernel's working folder"),
    ("[sandbox.files]\nx = '../secret'", "sandbox.files.x = '../secret': name something in"),
    ("[sandbox.files]\nx = '~/.ssh'", "sandbox.files.x = '~/.ssh': name something in"),
    ("[sandbox.files]\nx = 'nothing'", "sandbox.files.x = 'nothing': there is no such file"),
    ("[sandbox.files]\nx = 5", "sandbox.files.x = 5: input should be a valid string"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), WRONG, ids=[said for _, said in WRONG])
def test_what_is_wrong_is_said_with_key_value_and_what_is_allowed(
    folder: Path, text: str, said: str
) -> None:
    found = problems(folder, text)
    assert len(found) == 1 and said in found[0], found


def test_everything_that_is_wrong_is_said_at_once(folder: Path) -> None:
    found = problems(folder, "nmae = 1\n[sandbox]\ngpu = 'X'\nmemory = 'x'\nlifetime = 1e9\n")
    assert len(found) == 4
    found = problems(folder, "task = 'x'\ngrader = 'y'\n[sandbox.files]\na = 'z'\n")
    assert len(found) == 3


@pytest.mark.parametrize(
    "text",
    [
        "[sandbox.env]\nTOKEN = 'hf_abcdefghijklmnopqrstuvwx'",
        "[sandbox.env]\nKEY = 'sk-proj-abcdefghijklmnopqrstuvwx'",
        "[[sandbox.repos]]\nurl = 'https://me:hf_abcdefghijklmnopqrstuvwx@x.org/y'",
    ],
)
def test_a_key_in_the_file_is_refused_and_not_repeated(folder: Path, text: str) -> None:
    (found,) = problems(folder, text)
    assert "secret" in found
    assert "abcdefghijklm" not in found


def test_a_hidden_models_sandbox_has_no_network_unless_the_file_says_so(folder: Path) -> None:
    model = "[[models]]\nname = 'organism:base'\nhidden = true\n"
    assert read_investigation(write(folder, model)).sandbox.blocked
    found = read_investigation(write(folder, f"[sandbox]\nnetwork = true\n{model}"))
    with pytest.raises(BadInput, match="network = True: a hidden model can be looked up"):
        refuse_what_tells(found.sandbox)
    text = f"[sandbox]\nsecrets = ['HF_TOKEN']\n{model}"
    with pytest.raises(BadInput, match="hidden models among them"):
        refuse_what_tells(read_investigation(write(folder, text)).sandbox)


def test_a_hidden_models_name_is_not_repeated(folder: Path) -> None:
    text = "[[models]]\nname = 'the/hidden-one'\nhidden = true\n[[models]]\nname = 'b'\n"
    (found,) = problems(folder, text)
    assert "hidden-one" not in found


# -- paths ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "deep", "pack", "task", "model"])
def test_links_do_not_lead_out(folder: Path, kind: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    link = folder / {"deep": "prompts/deep/link"}.get(kind, "link")
    link.symlink_to(outside / "secret.txt" if kind in ("file", "deep", "task") else outside)
    text = {
        "file": "[sandbox.files]\nx = 'link'",
        "folder": "[sandbox.files]\nx = 'link/secret.txt'",
        "deep": "[sandbox.files]\nx = 'prompts'",
        "pack": "packs = ['./link']",
        "task": "task = 'link'",
        "model": "[[models]]\nname = './link'",
    }[kind]
    (found,) = problems(folder, text)
    assert "lead" in found and "out" in found


def test_links_within_the_folder_are_fine(folder: Path) -> None:
    (folder / "prompts" / "again").symlink_to("deep/one.txt")
    assert read_investigation(write(folder, "[sandbox.files]\nx = 'prompts'")).sandbox.files


def test_a_link_to_nowhere_and_a_pipe_are_said(folder: Path) -> None:
    (folder / "prompts" / "gone").symlink_to("nowhere")
    assert "leads nowhere" in problems(folder, "[sandbox.files]\nx = 'prompts'")[0]
    (folder / "prompts" / "gone").unlink()
    os.mkfifo(folder / "prompts" / "pipe")
    assert "no file" in problems(folder, "[sandbox.files]\nx = 'prompts'")[0]


def test_grader_settings_and_keys_do_not_get_into_a_sandbox(folder: Path) -> None:
    whole = "[sandbox.files]\nall = '.'"
    assert "investigation.toml into the sandbox" in problems(folder, whole)[0]
    text = "grader = 'prompts/grade.py'\n[sandbox.files]\nx = 'prompts'"
    (folder / "prompts" / "grade.py").write_text("")
    assert "the grader" in problems(folder, text)[0]
    (folder / "prompts" / "grade.py").unlink()
    (folder / ".env").write_text("A=b")
    assert "values of secrets" in problems(folder, "[sandbox.files]\nx = '.env'")[0]
    (folder / "prompts" / "env").symlink_to(folder / ".env")
    assert problems(folder, "[sandbox.files]\nx = 'prompts'")


@settings(max_examples=300, deadline=None)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
        ),
        max_leaves=5,
    ),
    st.sampled_from(sorted(SandboxSpec.model_fields)),
)
def test_any_value_is_taken_or_refused_with_a_sentence(value: Any, key: str) -> None:
    try:
        spec = SandboxSpec.model_validate({key: value})
    except ValidationError as error:
        assert error.errors()
        return
    assert SandboxSpec.model_validate(spec.model_dump()) == spec


# -- amounts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("64 GiB", 65536), ("512MiB", 512), ("1.5g", 1536), ("2 TB", 2 * 2**20), (77, 77)],
)
def test_memory(text: Any, value: int) -> None:
    assert mebibytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("4 h", 14400), ("90min", 5400), ("1 h 30 min", 5400), ("1.5 hours", 5400), ("2 days", 172800),
     ("45 s", 45), ("1h, 5m", 3900), (77, 77)],
)  # fmt: skip
def test_times(text: Any, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("$5", 5), ("2.50 USD", 2.5), ("3 dollars", 3), (7, 7)]
)
def test_dollars(text: Any, value: float) -> None:
    assert dollars(text) == value


@pytest.mark.parametrize("text", ["", "4", "h", "4 weeks", "4 h x", "four h", "4 hh"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="unit"):
        seconds(text)


# -- GPUs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A100-80GB", ("A100-80GB", 1)),
        ("a100-80", ("A100-80GB", 1)),
        ("NVIDIA A100 80 GB", ("A100-80GB", 1)),
        ("a100", ("A100", 1)),
        ("A10G", ("A10", 1)),
        ("H100:4", ("H100", 4)),
        ("h100 x 2", ("H100", 2)),
        ("8xH200", ("H200", 8)),
        ("4 × l40s", ("L40S", 4)),
        ("H100!", ("H100!", 1)),
        ("b200+:2", ("B200+", 2)),
        ("rtx pro 6000", ("RTX-PRO-6000", 1)),
    ],
)
def test_gpus_are_understood_as_people_write_them(text: str, found: tuple[str, int]) -> None:
    assert parse_gpu(text) == found
    assert SandboxSpec(gpu=text).gpu_count == found[1]
    assert SandboxSpec(gpu=text).gpu == found[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H1000", "Did you mean 'H100'?"),
        ("A100-60GB", "Did you mean 'A100-80GB'?"),
        ("", "Known: T4"),
        ("A10:5", "1 to 4"),
        ("H100:9", "1 to 8"),
        ("H100:0", "1 to 8"),
        ("2xH100:2", "no such GPU"),
        ("RTX 4090", "no such GPU"),
    ],
)
def test_gpus_that_cannot_be_had_are_refused_with_the_nearest(text: str, said: str) -> None:
    with pytest.raises(BadInput) as caught:
        parse_gpu(text)
    assert said in str(caught.value)
    with pytest.raises(ValidationError):
        SandboxSpec(gpu=text)


def test_a_machine_of_ones_own_may_have_any_gpu() -> None:
    spec = SandboxSpec(backend="ssh", gpu="RTX 4090:2")
    assert (spec.gpu, spec.gpu_count) == ("RTX 4090", 2)
    with pytest.raises(ValidationError):
        SandboxSpec(backend="ssh", gpu=" ")


def test_every_gpu_has_a_price_and_every_price_a_gpu() -> None:
    assert {priced_as(name) for name in GPUS} == TABLE.gpus.keys()


# -- the schema -------------------------------------------------------------------------------


def test_the_schema_is_printed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "schema"], capture_output=True, text=True, check=True
    )
    printed = json.loads(done.stdout)
    assert printed == json.loads(json.dumps(schema()))
    assert printed["additionalProperties"] is False
    settings = printed["$defs"]["SandboxSettings"]["properties"]
    assert settings.keys() == SandboxSpec.model_fields.keys() - {"models"}
    assert all("description" in field for field in settings.values())
    assert settings["memory"]["anyOf"][-1] == {"type": "null"}
    amount = settings["memory"]["anyOf"][0]["anyOf"]
    assert amount == [{"type": "number", "exclusiveMinimum": 0}, {"type": "string"}]


def test_the_schema_is_one_and_agrees_with_the_reader(folder: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    import tomllib

    jsonschema.Draft202012Validator.check_schema(schema())
    check = jsonschema.Draft202012Validator(schema())
    assert list(check.iter_errors(tomllib.loads(WHOLE))) == []
    for text in ("nmae = 'x'", "[sandbox]\ngpu_cuont = 2", "[[models]]\nvariable = 'm'"):
        assert list(check.iter_errors(tomllib.loads(text)))


# -- the page ---------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "environments.md"
EXAMPLES = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.S)


@pytest.mark.parametrize("text", EXAMPLES, ids=lambda text: text.splitlines()[0])
def test_every_example_of_the_page_can_be_read(folder: Path, text: str) -> None:
    (folder / "task.md").write_text("Look.")
    found = read_investigation(write(folder, text))
    assert found.task == "Look."


def test_the_page_shows_every_key_in_an_example() -> None:
    assert len(EXAMPLES) >= 6
    shown = set(re.findall(r"^(\w+) = ", "".join(EXAMPLES), re.M))
    shown |= set(re.findall(r"^\[+sandbox\.(\w+)\]+$", "".join(EXAMPLES), re.M))
    missing = SandboxSpec.model_fields.keys() - shown - {"models"}
    assert missing == {"gpu_count", "processes", "snapshot"}  # said in the table alone
    assert ModelSpec.model_fields.keys() - shown == {"adapter_revision"}


def test_the_sentence_of_the_page_is_that_of_the_code() -> None:
    rates = Rates(TABLE.gpus, TABLE.core, TABLE.gib, "the workspace's rates")
    spec = SandboxSpec(gpu="H100", budget=10)
    price = estimate(spec, rates)
    said = terms(price, hard_stop(price, 4 * 3600, spec.limit()), spec.limit())
    assert said in PAGE.read_text()
