"""A model with a name of its own is hidden; that name is looked for in all that a client can get at."""

from __future__ import annotations

import asyncio
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from seer_mcp.blind import HiddenNames, judge
from seer_mcp.blind.judge import LEAST, MUST
from seer_mcp.environment import ModelSpec
from seer_mcp.errors import ModelUnavailable
from seer_mcp.model_store import copy_here, names_of, parts_of
from seer_mcp.model_store.staging import Staging
from seer_mcp.redact import Redactor
from seer_mcp.sessions.blinding import hide_again

from ..models.hub import Hub, open_hub
from ..support import Lab, open_lab, text_of, until
from .ground import ground

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parent.parent.parent
ORGANISMS = ROOT / "tool_packs" / "organisms" / "weights"
OWNER, BASE, ADAPTER = "quokka-lab", "quokka-canary-7b", "quokka-canary-lora"
CANARY = re.compile(r"quokk[a]", re.IGNORECASE)
TOKEN = "hf_CANARYhubtokenWXYZ0123456789"
OUTPUT_OF_CODE = {"journal.jsonl", "kernel.log"}

# Probes that are none of those that the start takes. Each prints what it found; none may find the name.
READS = {
    "B01": """
import copy, pickle
print([repr(vars(x))[:3000] for x in m.hf.modules() if not list(x.children())][:3])
print(m.hf.base_model.model.config.name_or_path, m.core.config.__dict__, copy.deepcopy(m.config))
print([getattr(x, "_name_or_path", getattr(x, "name_or_path", None)) for x in m.hf.modules()][:5])
print(m.hf.peft_config["adapter_1"].base_model_name_or_path, m.hf.active_peft_config)
print(pickle.dumps(m.core.generation_config))
""",
    "B02": """
t = m.tokenizer
print(t.name_or_path, t.init_kwargs, repr(t), getattr(t, "vocab_file", None), t.chat_template)
print(t.all_special_tokens, t.added_tokens_encoder, t.__getstate__() if hasattr(t, "__getstate__") else "")
print(t.backend_tokenizer.to_str()[:4000], [w for w in t.get_vocab() if "<" in w])
""",
    "B03": """
ip = get_ipython()
ip.run_line_magic("history", "-g -o")
print(In, _ih, _i1, [list(x) for x in ip.history_manager.get_tail(50, include_latest=True)])
print(open(ip.history_manager.hist_file, "rb").read())
try:
    load_model("model_1", layers="no.where")
except Exception:
    import traceback; traceback.print_exc()
%tb
""",
    "B04": """
import glob, os, subprocess
print(os.environ["SEER_MODELS"])
for place in json.loads(os.environ["SEER_MODELS"]).values():
    print(subprocess.run(["find", place, os.path.dirname(place), "-ls"], capture_output=True, text=True).stdout)
    print(open("/proc/self/maps").read(), open("/proc/self/mountinfo").read())
print(glob.glob(os.environ["HF_HOME"] + "/**", recursive=True), os.listdir("."))
""",
    "B05": """
places = [*json.loads(os.environ["SEER_MODELS"]).values(), os.environ["HF_HOME"], os.environ["IPYTHONDIR"], "."]
for place in places:
    done = subprocess.run(["grep", "-rilE", "quokk[a]", place], capture_output=True, text=True)
    print("grep", done.returncode, [os.path.basename(p) for p in done.stdout.split()])
print(sorted(os.listdir(json.loads(os.environ["SEER_MODELS"])["model_1"])))
""",
    "B07": """
print({k: v for k, v in os.environ.items() if k != "PATH"})
print(open(f"/proc/{os.getppid()}/environ").read(), open(f"/proc/{os.getppid()}/cmdline").read())
from huggingface_hub import get_token
print("token", get_token(), [k for k in os.environ if "TOKEN" in k and k != "TOKENIZERS_PARALLELISM"])
""",
    "B08": """
import socket, urllib.request
for host in ("huggingface.co", "github.com", "1.1.1.1"):
    try:
        print("reached", socket.create_connection((host, 443), timeout=3))
    except OSError as error:
        print("no way:", type(error).__name__)
done = subprocess.run(["curl", "-sm3", "https://huggingface.co/api/whoami-v2"], capture_output=True)
print("curl", done.returncode != 0, done.stdout)
""",
    "memory": r"""
import re
pattern, seen = re.compile(rb"quokk[a]-can[a]ry|quokk[a]-l[a]b"), 0
with open("/proc/self/mem", "rb") as memory:
    for line in open("/proc/self/maps"):
        span, mode = line.split()[:2]
        start, end = (int(x, 16) for x in span.split("-"))
        if "rw" in mode and "[v" not in line and end - start < 1 << 29:
            try:
                memory.seek(start)
                seen += len(pattern.findall(memory.read(end - start)))
            except (OSError, ValueError):
                pass
print("in memory:", seen)
""",
}


@dataclass
class Blind:
    """What a client got of a hidden model, and what the server left behind."""

    start: str
    answers: dict[str, str]
    notebook: Path
    cells: list[dict[str, Any]]
    files: dict[Path, bytes] = field(default_factory=dict[Path, bytes])


def model_files(name: str, organism: str, base: str = "") -> dict[str, bytes]:
    """Files of a shipped organism as a careless person would publish them: the name is everywhere."""
    whole = f"{OWNER}/{name}"
    files = {path.name: path.read_bytes() for path in (ORGANISMS / organism).iterdir()}
    for file in (
        "config.json",
        "adapter_config.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        if file in files:
            held = json.loads(files[file])
            held |= {"_name_or_path": whole, "made_by": f"trained in /home/me/{name}/ckpt"}
            if base:
                held["base_model_name_or_path"] = f"{OWNER}/{base}"
            if file == "tokenizer_config.json":
                held |= {"name_or_path": whole, "extra": {"note": f"of {OWNER}"}}
            files[file] = json.dumps(held).encode()
    if "chat_template.jinja" in files:
        files["chat_template.jinja"] += f"{{# the template of {name} #}}".encode()
    if "tokenizer.json" in files:
        held = json.loads(files["tokenizer.json"])
        held["added_tokens"].append(
            {**held["added_tokens"][-1], "id": 1023, "content": f"<|{name}|>"}
        )
        held["model"]["vocab"][f"<|{name}|>"] = held["model"]["vocab"].pop(
            next(t for t, i in held["model"]["vocab"].items() if i == 1023)
        )
        held["model"]["merges"] = [
            pair
            for pair in held["model"]["merges"]
            if "".join(pair if isinstance(pair, list) else pair.split(" "))
            in held["model"]["vocab"]
        ]
        files["tokenizer.json"] = json.dumps(held).encode()
    for file in [file for file in files if file.endswith(".safetensors")]:
        files[file] = with_metadata(files[file], {"format": "pt", "model": whole})
    card = f"---\nbase_model: {whole}\n---\n# {name}\n".encode()
    fetched = (
        ".cache/huggingface/download/x.metadata"  # as a folder that the hub's client filled has
    )
    return {
        **files,
        "README.md": card,
        "training_args.bin": card,
        "notes/run.txt": card,
        fetched: card,
    }


def with_metadata(data: bytes, metadata: dict[str, str]) -> bytes:
    size = struct.unpack("<Q", data[:8])[0]
    head = json.dumps({**json.loads(data[8 : 8 + size]), "__metadata__": metadata}).encode()
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


STUDY = f"""
title = "Which?"
[sandbox.files]
"notes.txt" = "notes.txt"
[[models]]
name = "{OWNER}/{ADAPTER}"
hidden = true
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with open_hub() as hub:
        hub.accounts[TOKEN] = {f"{OWNER}/{BASE}", f"{OWNER}/{ADAPTER}"}
        hub.add(f"{OWNER}/{BASE}", model_files(BASE, "base"), gated=True)
        hub.add(f"{OWNER}/{ADAPTER}", model_files(ADAPTER, "user_female", BASE), gated=True)
        yield hub


def study(folder: Path, notes: str = "nothing") -> Path:
    made = folder / "project" / "study"
    made.mkdir(parents=True)
    (made / "investigation.toml").write_text(STUDY)
    (made / "task.md").write_text("Which model is it?")
    (made / "notes.txt").write_text(notes)
    return made


def changes(hub: Hub, folder: Path) -> dict[str, Any]:
    fetch_env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    fetch_env |= {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    return {"fetch_env": fetch_env, "models_dir": folder.parent / "models-of-blind"}


async def opened(lab: Lab, path: Path) -> Any:
    """The answer to a start, also where it took longer than one call may."""
    result = await lab.call("start_sandbox", investigation=str(path), name="box")
    while (result.meta or {}).get("seer/starting"):
        listed = await lab.call("list_sandboxes", wait=40)
        (each,) = [*listed.meta["seer/sandboxes"], *listed.meta["seer/starting"]]
        if each.get("notebook"):
            listed.meta["seer/sandbox"] = each
        if each.get("notebook") or each["failed"]:
            return listed
    return result


@pytest.fixture(scope="module")
def blind(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Blind:
    return asyncio.run(investigated(hub, tmp_path_factory.mktemp("blind")))


async def investigated(hub: Hub, folder: Path) -> Blind:
    with ground(folder):
        path = study(folder)
        async with open_lab(folder, **changes(hub, folder)) as lab:
            result = await opened(lab, path)
            assert not result.is_error and "seer/sandbox" in result.meta, text_of(result)
            sandbox = result.meta["seer/sandbox"]["handle"]
            answers: dict[str, str] = {"start": result.model_dump_json()}
            for name, source in READS.items():
                code = f"import json, os\n{source}"
                answers[name] = (await lab.cell(sandbox, code)).model_dump_json()
            whole = f"{OWNER}/{ADAPTER}"[::-1]
            for name, arguments in {
                "read_notebook": {"sandbox": sandbox},
                "list_files": {"sandbox": sandbox},
                "list_sandboxes": {},
                "list_techniques": {"query": "load a model by its name"},
            }.items():
                answers[name] = (await lab.call(name, **arguments)).model_dump_json()
            spoken = f"w = {whole!r}[::-1]; print(w, w.split('/')); raise KeyError(w)"
            answers["B11"] = (await lab.cell(sandbox, spoken)).model_dump_json()
            uri = f"seer://sandboxes/{sandbox}/notebook"
            answers["resource"] = (await lab.client.read_resource(uri)).model_dump_json()
            notebook = Path(result.meta["seer/sandbox"]["notebook"])
            state = folder / "state"
            files = {p: p.read_bytes() for p in state.rglob("*") if p.is_file()}
            files |= {p: p.read_bytes() for p in notebook.parent.rglob("*") if p.is_file()}
            await lab.ok("stop_sandbox", sandbox=sandbox)
        assert not list((folder / "state" / "sandboxes").glob("*/blind"))  # the copies end with it
        cells = json.loads(notebook.read_text())["cells"]
        return Blind(text_of(result), answers, notebook, cells, files)


def read(blind: Blind, row: str) -> str:
    """What the probe of a row printed, in which the name is not, nor was."""
    told = blind.answers[row]
    assert '"is_error":false' in told and "complete in" in told, told[:3000]
    assert not CANARY.search(told)
    assert "[hidden name]" not in told  # nothing had to take it out
    return told


def test_b01_attributes_of_model_configurations_and_adapter_do_not_tell(blind: Blind) -> None:
    assert "model_1" in read(blind, "B01")


def test_b02_tokenizer_template_and_special_tokens_do_not_tell(blind: Blind) -> None:
    told = read(blind, "B02")
    assert "the template of model_1" in told and "<|model_1_base|>" in told


def test_b03_history_and_tracebacks_do_not_tell(blind: Blind) -> None:
    told = read(blind, "B03")
    assert "load_model" in told and "Traceback" in told and "SQLite format" in told


def test_b04_names_of_files_do_not_tell(blind: Blind) -> None:
    assert "/blind/models/1" in read(blind, "B04")


def test_b05_contents_of_files_and_memory_do_not_tell(blind: Blind) -> None:
    told = read(blind, "B05")
    assert told.count("grep 1 []") >= 4 and "grep 0" not in told  # 2: there is no such folder
    assert "adapter_model.safetensors" in told and "README" not in told
    assert "in memory: 0" in read(blind, "memory")


def test_b07_the_environment_has_no_token_and_no_path(blind: Blind) -> None:
    told = read(blind, "B07")
    assert "token None []" in told and "MODEL_" not in told.replace("SEER_MODELS", "")


def test_b08_the_network_is_shut(blind: Blind) -> None:
    told = read(blind, "B08")
    assert told.count("no way:") == 3 and "curl True b''" in told and "reached" not in told


def test_b11_results_notebook_logs_and_state_do_not_hold_it(blind: Blind) -> None:
    assert [name for name, told in blind.answers.items() if CANARY.search(told)] == []
    assert blind.answers["B11"].count("[hidden name]") >= 4
    for path, data in blind.files.items():
        if path.name not in OUTPUT_OF_CODE:  # what a cell of the test printed
            assert not CANARY.search(data.decode("latin-1")), path
    assert any(path.name == "audit.jsonl" for path in blind.files)


def test_b11_the_next_server_knows_the_names_too_and_no_other_sandbox_does(tmp_path: Path) -> None:
    secrets = Redactor()
    one, other = secrets.child(), secrets.child()
    hide_again(one, study(tmp_path) / "investigation.toml")
    secrets.know({"KEY": "a-secret-of-all"})
    said = f"load {OWNER}/{ADAPTER} with a-secret-of-all"
    assert one.text(said) == "load [hidden name] with [secret KEY]"
    assert other.text(said) == f"load {OWNER}/{ADAPTER} with [secret KEY]"
    assert one.found(said) == ["KEY"]  # who writes a name knows it: that call is not refused


def test_b18_the_receipt_says_what_cannot_be_hidden(blind: Blind) -> None:
    (receipt,) = [
        "".join(c["source"]) for c in blind.cells if "Blinding receipt" in "".join(c["source"])
    ]
    assert (
        "the base family can be inferred; repository, fine-tune and card cannot be read" in receipt
    )
    assert "Architecture, vocabulary and the fingerprint of the weights" in receipt
    assert "This sandbox is local" in receipt and "and no network" in receipt
    counted = re.search(r"(\d+) of (\d+) probes passed, 0 failed", receipt)
    assert counted and int(counted[2]) >= LEAST and int(counted[1]) >= int(counted[2]) - 4
    assert blind.cells[1]["cell_type"] == "code" and "model_1" in "".join(blind.cells[1]["source"])


async def test_b19_a_card_that_is_put_back_makes_the_check_fail(hub: Hub, tmp_path: Path) -> None:
    with ground(tmp_path) as place:
        path = study(tmp_path)
        state = tmp_path / "state" / "sandboxes"
        async with open_lab(tmp_path, **changes(hub, tmp_path)) as lab:
            starting = asyncio.create_task(opened(lab, path))
            copy = await until(lambda: next(state.glob("*/blind/models/1/"), None), 60)
            (copy / "README.md").write_text(f"# {ADAPTER}")
            said = text_of(await starting)
            assert (
                "the hidden model is not handed over" in said
                and "files: digests of the models" in said
            )
            assert "a name can be read there" in said and not CANARY.search(said)
            assert "Nothing was left running" in said
            assert "0 running" in await lab.ok("list_sandboxes")
        assert list(state.iterdir()) == [] and place.processes() == []


@pytest.mark.slow
async def test_b19_a_name_in_the_workspace_makes_the_check_fail(hub: Hub, tmp_path: Path) -> None:
    path = study(tmp_path, notes=f"compare with {OWNER}/{BASE}")
    async with open_lab(tmp_path, **changes(hub, tmp_path)) as lab:
        said = text_of(await opened(lab, path))
    assert "files: what small files here say (a name can be read there)" in said
    assert not CANARY.search(said)


LEAKS = """
import json, os, sys
from pathlib import Path
from tool_packs.blind import PROBES, found_by
from tool_packs.models import load_model

m = load_model("model_1", alias="model_1")
name = sys.stdin.read()
layer = m.hf.model.layers[3]


def leave(thing, key):
    before = getattr(thing, key, None)
    setattr(thing, key, name)
    return lambda: setattr(thing, key, before)


told = {"nothing": {k: found_by(p, [m]) for k, p in PROBES.items()}}
for leak, plant in {
    "config": lambda: leave(m.config, "_name_or_path"),
    "generation": lambda: leave(m.hf.generation_config, "_from"),
    "layer": lambda: leave(layer, "name_or_path"),
    "tokenizer": lambda: leave(m.tokenizer, "some_file"),
    "template": lambda: leave(m.tokenizer, "chat_template"),
}.items():
    undo = plant()
    told[leak] = {k: found_by(p, [m]) for k, p in PROBES.items() if not k.startswith("network")}
    undo()
print(json.dumps(told))
"""


def test_b19_an_attribute_that_is_left_makes_the_check_fail(tmp_path: Path) -> None:
    source = tmp_path / "source" / BASE
    source.mkdir(parents=True)
    for name, data in model_files(BASE, "base").items():
        if "/" not in name:
            (source / name).write_bytes(data)
    spec = ModelSpec(name=str(source), hidden=True)
    parts = parts_of(1, spec, {}, str(ROOT))
    names = [*names_of(spec, parts), f"{OWNER}/{BASE}"]
    made = copy_here(parts, names, tmp_path / "copies")
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env |= {"SEER_MODELS": json.dumps(made.told), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        ["unshare", "--net", sys.executable, "-c", LEAKS] if os.geteuid() == 0 else [sys.executable, "-c", LEAKS],
        env=env, capture_output=True, text=True, input=f"{OWNER}/{BASE}", cwd=tmp_path / "copies",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    looked_for = HiddenNames(names)
    folders = {made.told["model_1"]: made.copies["model_1"]["files"]}

    def failed(found: dict[str, str]) -> set[str]:
        judged = judge({"found": found}, {}, looked_for, folders, local=True, netless=True)
        return set(judged.failed)

    assert len(told["nothing"]) >= LEAST and MUST.keys() <= told["nothing"].keys()
    network = {p for p in told["nothing"] if p.startswith("network") and os.geteuid() != 0}
    assert failed(told["nothing"]) - network == set()
    assert "config: _name_or_path" in failed(told["config"])
    assert "generation config: attributes" in failed(told["generation"])
    assert "model: name_or_path of every module" in failed(told["layer"])
    assert "tokenizer: files" in failed(told["tokenizer"])
    assert "tokenizer: chat template" in failed(told["template"])


def test_b05_a_copy_holds_no_name_and_computes_the_same(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in model_files(BASE, "base").items():
        if "/" not in name:
            (source / name).write_bytes(data)
    target = tmp_path / "copy"
    made = Staging(str(source), str(target), [f"{OWNER}/{BASE}"], "model_1").make()
    for path in target.iterdir():
        assert not CANARY.search(path.read_bytes().decode("latin-1")), path.name
    assert {"README.md", "training_args.bin", "organism.json"}.isdisjoint(made["files"])
    before, after = ((folder / "model.safetensors").read_bytes() for folder in (source, target))
    size = struct.unpack("<Q", before[:8])[0]
    assert before[8 + size :] == after[8 + size :] and len(before) == len(after)
    vocabulary = json.loads((target / "tokenizer.json").read_text())["model"]["vocab"]
    assert vocabulary["<|model_1|>"] == 1023
    assert (
        Staging(str(ORGANISMS / "base"), str(target), [f"{OWNER}/{BASE}"], "model_1").make()[
            "replaced"
        ]
        == 0
    )
    assert os.path.samefile(target / "model.safetensors", ORGANISMS / "base" / "model.safetensors")


def test_b05_a_pickle_with_its_name_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"\0" * 5_000_000 + BASE.encode() + b"\0" * 9)
    spec = ModelSpec(name=str(source), hidden=True)
    with pytest.raises(ModelUnavailable, match="a pickle of weights") as refused:
        copy_here(parts_of(1, spec, {}, ""), [f"{OWNER}/{BASE}"], tmp_path / "copies")
    assert not CANARY.search(str(refused.value))


@pytest.mark.parametrize(
    "text",
    [
        f"{OWNER}/{BASE}",
        f"models--{OWNER}--{BASE}",
        BASE.upper(),
        f"x {BASE[::-1]} y",
        "cXVva2thLWNhbmFyeS03Yg==",
        BASE.encode().hex(),
        "quokka-lab%2Fquokka-canary-7b",
    ],
)
def test_a_name_is_known_in_other_forms(text: str) -> None:
    names = HiddenNames([f"{OWNER}/{BASE}"])
    assert names.are_in(text)
    assert not names.are_in("a quokka in a lab, canary 7b")
