"""The store on this machine's disk: what it keeps, gives to kernels, and gives up."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from seer_mcp.config import from_environment
from seer_mcp.environment import ModelSpec
from seer_mcp.errors import Conflict, ModelUnavailable, NotFound
from seer_mcp.files import Lock
from seer_mcp.kernel_host.identity import MARK
from seer_mcp.model_store import (
    MODELS_VARIABLE,
    FetchProgress,
    HubModel,
    ModelStore,
    hub_model,
    hub_models,
    kernel_map,
)
from seer_mcp.model_store.follow import FETCHER

from .conftest import wait_until
from .hub import Hub

ROOT = Path(__file__).parent.parent.parent
ORGANISMS = ROOT / "tool_packs" / "organisms" / "weights"
MB = 1 << 20
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"
FILES = {"config.json": b"{}", "model.safetensors": os.urandom(2 * MB), "vocab.json": b"{}"}
MODEL = HubModel("lab/model")


@pytest.fixture
def store(hub: Hub, tmp_path: Path) -> ModelStore:
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    return ModelStore(tmp_path / "models", sys.executable, {**env, "HF_TOKEN": TOKEN})


def get(store: ModelStore, model: HubModel = MODEL) -> list[FetchProgress]:
    said: list[FetchProgress] = []
    asyncio.run(store.fetch(model, said.append))
    return said


def fetchers() -> list[psutil.Process]:
    return [
        p for p in psutil.process_iter(["cmdline"]) if str(FETCHER) in (p.info["cmdline"] or [])
    ]


# -- names --------------------------------------------------------------------------------------


def test_names_of_the_hub_are_told_from_folders_and_organisms(tmp_path: Path) -> None:
    (tmp_path / "lab" / "local").mkdir(parents=True)
    for name in ("organism:base", "./m", "../m", "/data/m", "~/m", "a/b/c"):
        assert hub_model(name) is None, name
    assert hub_model("lab/local", here=tmp_path) is None
    assert hub_model("lab/local") == HubModel("lab/local")
    assert hub_model("gpt2", "main") == HubModel("gpt2")
    assert hub_model("gpt2", "v1") == HubModel("gpt2", "v1")


def test_names_of_volumes_are_neutral_and_allowed() -> None:
    names = {HubModel("lab/secret-word").volume, HubModel("lab/secret-word", "v1").volume}
    assert len(names) == 2
    for name in names:
        assert len(name) <= 64
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert "secret" not in name


def test_an_environments_model_may_need_three_of_the_hub() -> None:
    spec = ModelSpec(
        name="lab/m", revision="v1", adapter="lab/lora", adapter_revision="v2", base="b/b"
    )
    assert hub_models(spec) == [
        HubModel("lab/m", "v1"),
        HubModel("lab/lora", "v2"),
        HubModel("b/b"),
    ]
    assert hub_models(ModelSpec(name="organism:control", adapter="./mine")) == []


def test_a_kernel_finds_a_model_by_name_revision_and_commit() -> None:
    told = kernel_map({HubModel("lab/m", "v1"): ("c1", "/1"), HubModel("lab/m"): ("c0", "/0")})
    assert told == {
        "lab/m": "/0",
        "lab/m@main": "/0",
        "lab/m@v1": "/1",
        "lab/m@c0": "/0",
        "lab/m@c1": "/1",
    }


# -- keeping ------------------------------------------------------------------------------------


def test_a_model_is_fetched_once_and_then_there_for_all(hub: Hub, store: ModelStore) -> None:
    repo = hub.add("lab/model", FILES)
    hub.accounts[TOKEN] = set()
    with pytest.raises(NotFound, match="models fetch"):
        store.path_of(MODEL)
    get(store)
    asked = len(hub.requests)
    get(store)
    assert len(hub.requests) == asked
    (kept,) = store.list()
    assert kept.model == MODEL
    assert kept.commit == repo.refs["main"]
    assert kept.complete
    assert kept.bytes == kept.total == sum(map(len, FILES.values()))
    assert kept.used is None
    before = time.time()
    folder = store.path_of(MODEL)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == FILES
    found = store.find(MODEL)
    assert found is not None and found.used is not None and found.used >= before - 1
    # What a kernel sees does not name the model.
    assert "lab" not in str(folder.relative_to(store.root)) and "model" not in folder.parts[-2:]


def test_progress_is_told_in_sentences(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    fault = hub.fault("/repos/", hold=MB)
    said: list[FetchProgress] = []

    def report(progress: FetchProgress) -> None:
        said.append(progress)
        if progress.bytes > MB / 2:
            fault.go()

    asyncio.run(store.fetch(MODEL, report))
    last = said[-1]
    assert last.total == sum(map(len, FILES.values()))
    assert MB / 2 < last.bytes < last.total
    assert last.sentence().startswith("fetching lab/model: ")
    assert " of 2.1 MB" in last.sentence()
    one = FetchProgress(MODEL, 3_200_000_000, 16_000_000_000, 85e6, 150.6)
    assert one.sentence() == "fetching lab/model: 3.2 GB of 16.0 GB, 85.0 MB/s, 3 min left"
    assert one.sentence("model 1") == "fetching model 1: 3.2 GB of 16.0 GB, 85.0 MB/s, 3 min left"
    note = FetchProgress(MODEL, 0, 0, 0, None, note="https://hub/lab/model is away")
    assert note.sentence("model 1") == "fetching model 1"


def test_a_failure_is_one_sentence_with_the_model_in_it(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    with pytest.raises(ModelUnavailable) as caught:
        get(store, HubModel("lab/none"))
    assert caught.value.code == "not_found"
    assert str(caught.value).startswith(
        "Model 'lab/none' could not be fetched: the hub has no model"
    )
    assert store.list() == []


def test_an_interpreter_that_does_not_exist(hub: Hub, tmp_path: Path) -> None:
    store = ModelStore(tmp_path / "models", str(tmp_path / "nopython"), {})
    with pytest.raises(ModelUnavailable, match="nopython could not be started"):
        get(store)


def test_a_fetch_program_that_dies_says_its_last_words(hub: Hub, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Killed by the weather\nexit 137\n")
    python.chmod(0o755)
    with pytest.raises(ModelUnavailable, match="Killed by the weather") as caught:
        get(ModelStore(tmp_path / "models", str(python), {}))
    assert caught.value.code == "cut_off"


def test_a_cancelled_fetch_leaves_no_process_and_goes_on_later(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    hub.fault("/repos/", hold=MB * 3 // 2)

    async def cancelled() -> None:
        there = asyncio.Event()

        def report(progress: FetchProgress) -> None:
            if progress.bytes > MB / 2:
                there.set()

        work = asyncio.create_task(store.fetch(MODEL, report))
        await asyncio.wait_for(there.wait(), 30)
        assert len(fetchers()) >= 1
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    asyncio.run(cancelled())
    mine = [p for p in fetchers() if p.environ().get("HOME") == str(store.root.parent)]
    assert mine == []
    (kept,) = store.list()
    assert not kept.complete
    assert 0 < kept.bytes < kept.total
    assert store.check(MODEL) != []
    hub.forget()
    get(store)
    assert hub.sent("/repos/") < 2 * MB
    assert store.check(MODEL, deep=True) == []


def test_what_changed_on_the_disk_is_found(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    get(store)
    weights = store.path_of(MODEL) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    assert store.check(MODEL) == []
    assert store.check(MODEL, deep=True) == ["model.safetensors has other content than the hub's"]
    weights.write_bytes(content[:-1])
    (wrong,) = store.check(MODEL)
    assert wrong == f"model.safetensors has {2 * MB - 1} bytes instead of {2 * MB}"
    assert store.manifest(MODEL) is None
    get(store)
    assert store.check(MODEL, deep=True) == []


# -- removing -----------------------------------------------------------------------------------


def test_removing_frees_the_disk(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    get(store)
    assert store.remove(MODEL) == sum(map(len, FILES.values()))
    assert store.list() == []
    assert [p for p in store.root.rglob("*") if p.is_file() and p.suffix != ".lock"] == []
    with pytest.raises(NotFound):
        store.remove(MODEL)


@pytest.fixture
def user(hub: Hub, store: ModelStore) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a sandbox that was given the model."""
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    get(store)
    told = kernel_map({MODEL: ("c", str(store.path_of(MODEL)))})
    env = {**store.environment(told), MARK: "box-abc123"}
    process = subprocess.Popen([sys.executable, "-c", "input()"], env=env, stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_model_in_use_is_kept(store: ModelStore, user: subprocess.Popen[bytes]) -> None:
    with pytest.raises(Conflict, match="used by 'box-abc123'"):
        store.remove(MODEL)
    assert store.manifest(MODEL) is not None
    user.kill()
    user.wait()
    assert store.remove(MODEL) > 0


def test_a_model_in_use_is_removed_by_force(
    store: ModelStore, user: subprocess.Popen[bytes]
) -> None:
    assert store.remove(MODEL, force=True) > 0
    assert store.list() == []


def test_a_model_that_is_being_fetched_is_kept(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    get(store)
    lock = Lock(store.root / f"{MODEL.key}.lock")
    assert lock.take()
    with pytest.raises(Conflict, match="being fetched"):
        store.remove(MODEL)
    lock.release()


# -- for kernels --------------------------------------------------------------------------------


def test_a_kernel_without_network_loads_what_was_fetched(
    hub: Hub, store: ModelStore, tmp_path: Path
) -> None:
    hub.accounts[TOKEN] = {"lab/base", "lab/female.v1", "lab/word"}
    hub.add_folder("lab/base", ORGANISMS / "base", gated=True)
    for name, organism in (("lab/female.v1", "user_female"), ("lab/word", "secret_word")):
        files = {p.name: p.read_bytes() for p in (ORGANISMS / organism).iterdir()}
        config = json.loads(files["adapter_config.json"])
        config["base_model_name_or_path"] = "lab/base"
        files["adapter_config.json"] = json.dumps(config).encode()
        hub.add(name, files).commit(files, "v2")
    specs = [
        ModelSpec(name="lab/female.v1", revision="v2"),
        ModelSpec(name="organism:control"),
        ModelSpec(name="lab/base", adapter="lab/word"),
    ]
    said: list[str] = []
    asyncio.run(store.fetch_all(specs[:1], said.append))
    # The base that the adapter names was fetched with it.
    assert [k.model.label for k in store.list()] == ["lab/base", "lab/female.v1@v2"]
    told = asyncio.run(store.fetch_all(specs, said.append)).told
    assert [k.model.label for k in store.list()] == [
        "lab/base",
        "lab/female.v1@v2",
        "lab/word",
    ]
    code = (
        "from tool_packs.models import load_model\n"
        "a = load_model('lab/female.v1', revision='v2')\n"
        "b = load_model('lab/base', adapter='lab/word')\n"
        "b.add_adapter('lab/female.v1')\n"
        "c = load_model('lab/base')\n"
        "print(a.name, a.adapters, b.name, b.adapters, c.adapters)\n"
        "assert a.fingerprint() != b.fingerprint() != c.fingerprint()\n"
    )
    env = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **store.environment(told),
    }
    assert json.loads(env[MODELS_VARIABLE]) == told
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "lab/female.v1 ['female_v1'] lab/base ['word', 'female_v1'] []\n"


def test_the_failure_of_a_hidden_model_does_not_name_it(hub: Hub, store: ModelStore) -> None:
    hub.accounts[TOKEN] = set()
    spec = ModelSpec(name="lab/secret-word", hidden=True)
    with pytest.raises(ModelUnavailable) as caught:
        asyncio.run(store.fetch_all([spec], print))
    assert caught.value.code == "not_found"
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_without_models_a_kernel_is_told_nothing(store: ModelStore) -> None:
    assert asyncio.run(store.fetch_all([ModelSpec(name="organism:base")], print)).told == {}
    assert ModelStore.environment({}) == {}


def test_a_read_only_store_serves_as_well(hub: Hub, store: ModelStore, tmp_path: Path) -> None:
    hub.accounts[TOKEN] = set()
    hub.add("lab/model", FILES)
    get(store)
    root = str(store.root)
    done = subprocess.run(["mount", "--bind", root, root], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root on Linux can make a folder read-only for everybody")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", root], check=True)
        with pytest.raises(OSError, match="Read-only"):
            (store.root / "x").touch()
        get(store)
        assert (store.path_of(MODEL) / "config.json").read_bytes() == FILES["config.json"]
        asked = len(hub.requests)
        with pytest.raises(ModelUnavailable, match="cannot be written") as caught:
            get(store, HubModel("lab/model", "v1"))
        assert caught.value.code == "folder"
        assert len(hub.requests) == asked
    finally:
        subprocess.run(["umount", "-l", root], check=True)


# -- the command --------------------------------------------------------------------------------


def command(hub: Hub, home: Path, *words: str, **env: str) -> tuple[int, str, str]:
    whole = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_ENDPOINT": hub.url, **env}
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "models", *words, "--models", str(home / "models")],
        env=whole,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_fetches_lists_checks_and_removes(hub: Hub, tmp_path: Path) -> None:
    lora = {
        "adapter_config.json": b'{"base_model_name_or_path": "lab/model"}',
        "adapter_model.safetensors": b"weights",
    }
    hub.add("lab/lora", lora, gated=True).commit(lora, "v1")
    hub.add("lab/model", FILES)
    status, out, err = command(hub, tmp_path, "fetch", "lab/lora@v1")
    assert (status, out) == (2, "")
    assert "gated, and HF_TOKEN is not set" in err

    hub.accounts[TOKEN] = {"lab/lora"}
    status, out, err = command(hub, tmp_path, "fetch", "lab/lora@v1", HF_TOKEN=TOKEN)
    assert status == 0, err
    assert [line.split(":")[0] for line in out.splitlines()] == ["lab/lora@v1", "lab/model"]
    assert TOKEN not in out + err

    status, out, _ = command(hub, tmp_path, "list", "--json")
    names = [(m["name"], m["revision"], m["complete"]) for m in json.loads(out)["models"]]
    assert names == [("lab/lora", "v1", True), ("lab/model", "", True)]
    status, out, _ = command(hub, tmp_path, "list")
    assert "2 models, 2.1 MB in" in out

    assert command(hub, tmp_path, "check", "--deep", "lab/model")[:2] == (
        0,
        "lab/model is complete\n",
    )
    (weights,) = (tmp_path / "models").rglob("model.safetensors")
    weights.unlink()
    assert command(hub, tmp_path, "check", "lab/model")[:2] == (1, "model.safetensors is missing\n")

    assert command(hub, tmp_path, "remove", "lab/lora", "--revision", "v1")[0] == 0
    status, out, err = command(hub, tmp_path, "remove", "lab/lora@v1")
    assert status == 2
    assert "Known: 'lab/model'" in err
    assert command(hub, tmp_path, "fetch", "./here")[0] == 2


def test_an_interrupted_command_ends_its_fetch_and_says_how_to_go_on(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add("lab/model", FILES)
    hub.fault("/repos/", hold=MB)
    (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    hub.accounts[TOKEN] = set()
    words = ["fetch", "lab/model", "--models", str(tmp_path / "models")]
    process = subprocess.Popen(
        [sys.executable, "-m", "seer_mcp.cli", "models", *words],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "HF_ENDPOINT": hub.url,
            "PYTHONPATH": str(ROOT),
        },
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: hub.sent("/repos/") >= MB)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("Stopped. The same command goes on from here.\n")
    wait_until(lambda: not [p for p in fetchers() if p.environ().get("HOME") == str(tmp_path)])
    # A token that is only in the project's .env was used.
    assert {r.token for r in hub.asked("/resolve/")} == {TOKEN}
    hub.forget()
    assert command(hub, tmp_path, "fetch", "lab/model")[0] == 0
    assert hub.sent("/repos/") <= 2 * MB


def test_the_token_is_only_in_what_the_fetch_gets(tmp_path: Path) -> None:
    config = from_environment({"HF_TOKEN": TOKEN, "HOME": "/h", "MODAL_TOKEN_ID": "x"}, tmp_path)
    assert config.fetch_env == {"HF_TOKEN": TOKEN, "HOME": "/h"}
    assert TOKEN not in str(config.sandbox_env)
    assert TOKEN not in repr(config)
    store = ModelStore(config.models_dir, config.python, config.fetch_env)
    assert TOKEN not in str(store._env)
