"""The fetch program against a hub: complete or not there, and never the same byte twice."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seer_mcp.model_store import fetch as fetch_program

from .conftest import Fetcher, wait_until
from .hub import Hub

MB = 1 << 20
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"
SMALL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b'{"version": "1.0"}'}
WEIGHTS = os.urandom(6 * MB + 12345)
MODEL = {**SMALL, "model.safetensors": WEIGHTS, "README.md": b"# A model"}


# -- what is fetched ----------------------------------------------------------------------------


def test_a_model_is_fetched_verified_and_written_down_last(hub: Hub, fetch: Fetcher) -> None:
    commit = hub.add("lab/model", MODEL).refs["main"]
    run = fetch("lab/model")
    assert run.files() == MODEL
    assert run.done["commit"] == commit
    assert run.done["bytes"] == sum(map(len, MODEL.values()))
    assert run.done["tokenizer"] is True
    assert json.loads((run.folder / "manifest.json").read_text()) == run.done
    assert {p.name for p in run.folder.iterdir()} == {"files", "manifest.json"}


def test_a_complete_model_is_not_asked_for_again(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    fetch("lab/model")
    hub.forget()
    again = fetch("lab/model")
    assert again.done["bytes"] == sum(map(len, MODEL.values()))
    assert hub.requests == []


def test_only_what_loading_takes_is_fetched(hub: Hub, fetch: Fetcher) -> None:
    more = [
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.00.pth",
        "consolidated.safetensors",
        "onnx/model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "training_args.bin",
        "checkpoint-500/model.safetensors",
        ".gitattributes",
    ]
    wanted = {**MODEL, "modeling_own.py": b"x = 1", "additional_chat_templates/a.jinja": b"{}"}
    hub.add("lab/model", {**wanted, **dict.fromkeys(more, b"elsewise")})
    assert fetch("lab/model").files() == wanted


def test_without_safetensors_the_bin_files_are_fetched(hub: Hub, fetch: Fetcher) -> None:
    files = {**SMALL, "pytorch_model.bin": b"weights"}
    hub.add("lab/model", {**files, "optimizer.pt": b"x", "training_args.bin": b"x"})
    assert fetch("lab/model").files() == files


def test_all_shards_of_the_index_are_fetched(hub: Hub, fetch: Fetcher) -> None:
    shards = {f"model-0000{i}-of-00003.safetensors": os.urandom(70_000) for i in (1, 2, 3)}
    index = {"weight_map": {f"layer.{i}": name for i, name in enumerate(shards)}}
    files = {**SMALL, **shards, "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("lab/model", files)
    run = fetch("lab/model")
    assert run.files() == files

    lost = "model-00002-of-00003.safetensors"
    (run.folder / "files" / lost).unlink()
    (run.folder / "files" / "tokenizer.json").write_bytes(b"{")
    fault = hub.fault("/repos/", -1, status=403)
    assert fetch("lab/model").failed == "refused"
    assert not run.complete
    fault.times = 0
    hub.forget()
    mended = fetch("lab/model")
    assert mended.files() == files
    assert hub.sent("/repos/") == 70_000
    assert mended.done["commit"] == run.done["commit"]


def test_an_adapter_names_its_base(hub: Hub, fetch: Fetcher) -> None:
    config = json.dumps({"base_model_name_or_path": "lab/base"}).encode()
    hub.add("lab/lora", {"adapter_config.json": config, "adapter_model.safetensors": b"weights"})
    assert fetch("lab/lora").done["base"] == "lab/base"


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, fetch: Fetcher) -> None:
    repo = hub.add("lab/model", MODEL)
    old = {**MODEL, "config.json": b'{"old": 1}'}
    commit = repo.commit(old, "v1.0/beta")
    for number, revision in enumerate(("v1.0/beta", commit)):
        run = fetch("lab/model", str(number), revision=revision)
        assert run.files() == old
        assert run.done["commit"] == commit
    assert fetch("lab/model").files() == MODEL


# -- cut off, and gone on with ------------------------------------------------------------------


def test_a_killed_fetch_goes_on_where_it_stopped(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", hold=4 * MB)
    run = fetch.start("lab/model")
    run.until("bytes", 3 * MB)
    run.kill()
    assert not run.complete
    part = max(p.stat().st_size for p in (run.folder / "parts").iterdir())
    assert part >= 2 * MB

    hub.forget()
    again = fetch("lab/model")
    assert again.files() == MODEL
    assert hub.sent("/repos/") == len(WEIGHTS) - part
    assert [r.start for r in hub.asked("/repos/")] == [part]
    # The small files had come as a whole.
    assert hub.asked("/resolve/.*json") == []


def test_a_connection_that_is_cut_is_taken_up_again(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", cut=3 * MB)
    run = fetch("lab/model")
    assert run.files() == MODEL
    assert hub.sent("/repos/") < len(WEIGHTS) + MB
    assert any("Trying to resume" in line.get("note", "") for line in run.lines)


def test_a_server_without_ranges_serves_the_whole_again(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", cut=3 * MB)
    hub.fault("/repos/", no_ranges=True)
    assert fetch("lab/model").files() == MODEL
    assert hub.asked("/repos/")[1].start > 0
    assert hub.asked("/repos/")[1].status == 200


def test_a_part_that_a_crash_damaged_is_fetched_anew(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", hold=4 * MB)
    run = fetch.start("lab/model")
    run.until("bytes", 3 * MB)
    run.kill()
    part = max((run.folder / "parts").iterdir(), key=lambda path: path.stat().st_size)
    part.write_bytes(bytes(part.stat().st_size))
    assert fetch("lab/model").files() == MODEL


def test_what_has_not_changed_is_kept_when_the_branch_moves(hub: Hub, fetch: Fetcher) -> None:
    first, second = os.urandom(MB), os.urandom(5 * MB)
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    index = json.dumps({"weight_map": dict(zip("ab", names, strict=True))}).encode()
    small = {**SMALL, "model.safetensors.index.json": index}
    repo = hub.add("lab/model", {**small, names[0]: first, names[1]: second, "gone.json": b"{}"})
    hub.fault("/repos/", times=-1, hold=4 * MB)
    run = fetch.start("lab/model")
    run.until("bytes", 3 * MB)
    wait_until(lambda: (run.folder / "files" / names[0]).exists())
    run.kill()
    same_size = SMALL["config.json"].replace(b"llama", b"gemma")
    moved = {**small, "config.json": same_size, names[0]: first, names[1]: os.urandom(2 * MB)}
    commit = repo.commit(moved)
    hub.forget()
    again = fetch("lab/model")
    assert again.files() == moved
    assert again.done["commit"] == commit
    assert hub.sent("/repos/") == 2 * MB
    assert not (run.folder / "parts").exists()


def test_two_fetches_at_once_bring_every_byte_once(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    fault = hub.fault("/repos/", hold=4 * MB)
    first = fetch.start("lab/model")
    first.until("bytes", MB)
    second = fetch.start("lab/model")
    second.until("waiting")
    assert second.lines[-1]["total"] == sum(map(len, MODEL.values()))
    fault.go()
    assert second.end().done == first.end().done
    assert hub.sent("/repos/") == len(WEIGHTS)


def test_who_waits_goes_on_when_the_other_is_killed(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", hold=4 * MB)
    first = fetch.start("lab/model")
    first.until("bytes", 3 * MB)
    second = fetch.start("lab/model")
    second.until("waiting")
    first.kill()
    assert second.end().files() == MODEL
    assert hub.asked("/repos/")[-1].start >= 2 * MB


def test_a_fetch_ends_when_nobody_listens(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", hold=MB)
    run = fetch.start("lab/model")
    run.until("bytes", 1)
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert run.process.wait(20) == 1
    assert not run.complete


def killed_again_and_again(hub: Hub, fetch: Fetcher, times: int, seed: int) -> None:
    """Kills at random moments; then the model is whole, and little came twice."""
    chance = random.Random(seed)
    names = [f"model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    index = json.dumps({"weight_map": {name: name for name in names}}).encode()
    shards = {name: os.urandom(2 * MB + 999) for name in names}
    files = {**SMALL, "model.safetensors.index.json": index, **shards}
    hub.add("lab/model", files)
    wholes = 1
    for _ in range(times):
        for name in names:
            sha256 = hashlib.sha256(shards[name]).hexdigest()
            hub.fault(sha256, hold=chance.randrange(MB // 2, 3 * MB))
        run = fetch.start("lab/model")
        run.until("bytes" if chance.random() < 0.8 else "total")
        time.sleep(chance.random() * 0.3)
        run.kill()
        if run.complete:  # it was done just before
            assert run.files() == files
            shutil.rmtree(run.folder)
            wholes += 1
        for fault in hub.faults:
            fault.go()
        hub.faults.clear()
    assert fetch("lab/model").files() == files
    total = sum(map(len, shards.values()))
    # A kill loses what was on its way: a piece of each file in work, and what sockets hold.
    assert hub.sent("/repos/") <= total * wholes + times * 4 * 4 * MB


def test_a_fetch_that_is_killed_three_times_comes_to_its_end(hub: Hub, fetch: Fetcher) -> None:
    killed_again_and_again(hub, fetch, 3, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(4))
def test_a_fetch_that_is_killed_25_times_comes_to_its_end(
    hub: Hub, fetch: Fetcher, seed: int
) -> None:
    killed_again_and_again(hub, fetch, 25, seed)


def test_the_hubs_own_downloader_is_content_with_this_hub(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    hub.accounts[TOKEN] = {"lab/gated"}
    code = (
        "import huggingface_hub as h, sys; h.snapshot_download('lab/gated', local_dir=sys.argv[1])"
    )
    env = {"PATH": os.environ["PATH"], "HOME": str(fetch.home), "HF_ENDPOINT": hub.url}
    folder = fetch.root / "other"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "GatedRepoError" in done.stderr
    done = subprocess.run(command, env={**env, "HF_TOKEN": TOKEN}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {name: (folder / name).read_bytes() for name in MODEL} == MODEL


# -- failures -----------------------------------------------------------------------------------


def one_sentence(error: str) -> None:
    assert "\n" not in error
    assert "Traceback" not in error
    assert error.endswith((".", "/model", "/gated"))


@pytest.mark.parametrize(
    ("token", "says"),
    [("", "private and HF_TOKEN is not set"), (TOKEN, "this HF_TOKEN may not see it")],
)
def test_a_model_that_does_not_exist(hub: Hub, fetch: Fetcher, token: str, says: str) -> None:
    hub.accounts[TOKEN] = set()
    run = fetch("lab/modle", token=token)
    assert run.failed == "not_found"
    assert says in run.error
    assert "lab/modle" in run.error
    one_sentence(run.error)
    assert not run.folder.exists()


def test_a_private_model_looks_like_none(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL, private=True)
    assert fetch("lab/model").failed == "not_found"
    hub.accounts[TOKEN] = {"lab/model"}
    assert fetch("lab/model", token=TOKEN).files() == MODEL


def test_a_revision_that_does_not_exist(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    run = fetch("lab/model", revision="v9")
    assert run.failed == "no_revision"
    assert "'v9'" in run.error
    one_sentence(run.error)


def test_a_gated_model_without_a_token(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    run = fetch("lab/gated")
    assert run.failed == "gated"
    assert "HF_TOKEN is not set" in run.error
    assert f"{hub.url}/lab/gated" in run.error
    one_sentence(run.error)
    assert hub.asked("/repos/") == []
    assert not run.complete


def test_a_gated_model_that_the_account_may_not_read(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    hub.accounts[TOKEN] = set()
    run = fetch("lab/gated", token=TOKEN)
    assert run.failed == "gated"
    assert "has no access" in run.error
    one_sentence(run.error)
    assert not run.complete


def test_a_token_that_the_hub_does_not_know(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    run = fetch("lab/gated", token=TOKEN)
    assert run.failed == "bad_token"
    assert "mistyped, expired or revoked" in run.error
    one_sentence(run.error)


def test_a_token_opens_the_gate_and_is_left_nowhere(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    hub.accounts[TOKEN] = {"lab/gated"}
    fault = hub.fault("/repos/", hold=4 * MB)
    run = fetch.start("lab/gated", token=TOKEN)
    run.until("bytes", MB)
    if sys.platform == "linux":
        process = Path(f"/proc/{run.process.pid}")
        assert TOKEN.encode() not in (process / "cmdline").read_bytes()
        assert TOKEN.encode() not in (process / "environ").read_bytes()
    fault.go()
    assert run.end().files() == MODEL
    assert TOKEN not in json.dumps(run.lines) + run.stderr
    for path in fetch.root.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    # The store of large files is another origin: the token is not for it.
    assert {r.token for r in hub.requests if r.server == "store"} == {""}
    assert {r.token for r in hub.asked("/resolve/")} == {TOKEN}


def test_a_token_in_the_environment_serves_as_well(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/gated", MODEL, gated=True)
    hub.accounts[TOKEN] = {"lab/gated"}
    assert fetch("lab/gated", env={"HF_TOKEN": TOKEN}).files() == MODEL
    hub.accounts[TOKEN] = set()
    refused = fetch("lab/gated", "other", env={"HF_TOKEN": TOKEN})
    assert "the account of this HF_TOKEN has no access" in refused.error


def test_a_line_with_the_token_in_it_is_masked(capsys: pytest.CaptureFixture[str]) -> None:
    fetch_program.Lines(TOKEN).write(note=f"GET https://user:{TOKEN}@host")
    assert capsys.readouterr().out == '{"note": "GET https://user:***@host"}\n'


def test_a_rate_limit_that_lasts_is_said_at_once(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/api/models/", -1, status=429, headers={"RateLimit": '"api";r=0;t=290'})
    run = fetch("lab/model")
    assert run.failed == "rate_limited"
    assert "in 291 s" in run.error
    one_sentence(run.error)
    assert len(hub.asked("/api/models/")) == 1


def test_a_rate_limit_that_passes_is_waited_for(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/api/models/", status=429, headers={"Retry-After": "0"})
    hub.fault("/repos/", status=429, headers={"Retry-After": "0"})
    run = fetch("lab/model")
    assert run.files() == MODEL
    assert any("429" in line.get("note", "") for line in run.lines)


@pytest.mark.parametrize("pattern", ["/api/models/", "/repos/"])
def test_a_hub_that_is_out_of_order(hub: Hub, fetch: Fetcher, pattern: str) -> None:
    hub.add("lab/model", MODEL)
    hub.fault(pattern, -1, status=503, body="Service Unavailable")
    run = fetch("lab/model")
    assert run.failed == "hub_down"
    assert "503" in run.error
    one_sentence(run.error)
    assert not run.complete
    hub.faults.clear()
    assert fetch("lab/model").files() == MODEL


def test_a_hub_that_comes_back_is_waited_for(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/api/models/", 2, status=502)
    hub.fault("/repos/", 2, status=500)
    assert fetch("lab/model").files() == MODEL


def test_no_hub_at_all(hub: Hub, fetch: Fetcher) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        run = fetch("lab/model", env={"HF_ENDPOINT": url})
    assert run.failed == "hub_away"
    assert url in run.error
    one_sentence(run.error)


def test_a_hub_that_takes_calls_and_never_answers(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/api/models/", -1, mute=True)
    run = fetch("lab/model", timeout=0.2)
    assert run.failed == "hub_away"
    assert "timed out" in run.error
    one_sentence(run.error)
    assert len(hub.asked("/api/models/")) == 5


def test_a_hub_that_is_switched_off(hub: Hub, fetch: Fetcher) -> None:
    run = fetch("lab/model", env={"HF_HUB_OFFLINE": "1"})
    assert run.failed == "offline"
    assert "HF_HUB_OFFLINE" in run.error
    assert hub.requests == []


def test_a_page_of_a_hotel_is_no_hub(hub: Hub, fetch: Fetcher) -> None:
    kind = {"Content-Type": "text/html"}
    hub.fault("/api/models/", -1, status=200, body="<html>Log in to the wifi</html>", headers=kind)
    run = fetch("lab/model")
    assert run.failed == "not_a_hub"
    one_sentence(run.error)


def test_names_that_no_model_has(hub: Hub, fetch: Fetcher) -> None:
    for name in ("a b", "lab/model/x", "lab/--x", "-"):
        run = fetch(name)
        assert run.failed == "bad_name", name
        one_sentence(run.error)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("files", "code", "says"),
    [
        ({"model.gguf": b"x", "README.md": b"x"}, "not_a_model", "only GGUF"),
        ({"model.safetensors": b"x"}, "not_a_model", "neither config.json"),
        ({**SMALL, "model.gguf": b"x"}, "no_weights", "no weights"),
        ({**SMALL, "../../out.safetensors": b"x"}, "bad_listing", "would leave its folder"),
        ({**SMALL, "/etc/cron.d/x": b"x"}, "bad_listing", "would leave its folder"),
    ],
)
def test_repositories_that_hold_no_model(
    hub: Hub, fetch: Fetcher, files: dict[str, bytes], code: str, says: str
) -> None:
    hub.add("lab/model", files)
    run = fetch("lab/model")
    assert run.failed == code
    assert says in run.error
    one_sentence(run.error)
    assert hub.asked("/resolve/") == []


@pytest.mark.parametrize(
    ("size", "code", "says"),
    [
        (10**11, "too_large", "has 100.0 GB"),
        (49 * 10**9, "disk_full", "needed"),
    ],
)
def test_what_is_too_large_is_said_before_anything_is_fetched(
    hub: Hub, fetch: Fetcher, size: int, code: str, says: str
) -> None:
    names = [f"model-{i}.safetensors" for i in range(100)]
    files = {**SMALL, "pytorch_model.bin": b"x", **dict.fromkeys(names, b"x")}
    hub.add("lab/model", files, claims=dict.fromkeys(names, size))
    run = fetch("lab/model")
    assert run.failed == code
    assert says in run.error
    one_sentence(run.error)
    assert hub.asked("/resolve/") == []


def test_what_comes_is_not_what_was_listed(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL, claims={"model.safetensors": len(WEIGHTS) + 5})
    run = fetch("lab/model", tries=2)
    assert run.failed == "corrupt"
    assert "shorter file" in run.error
    one_sentence(run.error)
    assert not run.complete


def test_an_index_that_names_shards_which_the_hub_has_not(hub: Hub, fetch: Fetcher) -> None:
    shard = "model-00001-of-00002.safetensors"
    index = {"weight_map": {"a": shard, "b": "model-00002-of-00002.safetensors"}}
    files = {shard: WEIGHTS, "model.safetensors.index.json": json.dumps(index).encode()}
    hub.add("lab/model", {**SMALL, **files})
    run = fetch("lab/model")
    assert run.failed == "incomplete_at_hub"
    assert "model-00002-of-00002.safetensors" in run.error
    one_sentence(run.error)
    assert hub.asked("/repos/") == []


def test_wrong_content_is_fetched_once_more_and_then_refused(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("/repos/", wrong=True)
    assert fetch("lab/model", "once").files() == MODEL
    hub.fault("/repos/", -1, wrong=True)
    run = fetch("lab/model", "always")
    assert run.failed == "corrupt"
    one_sentence(run.error)
    assert not run.complete
    assert "model.safetensors" not in run.files()


def test_wrong_content_of_a_small_file_is_noticed_too(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    hub.fault("resolve-cache.*tokenizer.json", -1, wrong=True)
    assert fetch("lab/model").failed == "corrupt"


def test_a_folder_that_cannot_be_written(hub: Hub, fetch: Fetcher) -> None:
    hub.add("lab/model", MODEL)
    (fetch.root / "models").write_text("a file")
    run = fetch("lab/model")
    assert run.failed == "folder"
    one_sentence(run.error)


def test_an_interpreter_without_the_hubs_client(hub: Hub, fetch: Fetcher) -> None:
    bare = [sys.executable, "-S", fetch_program.__file__]
    run = fetch("lab/model", command=bare)
    assert run.failed == "no_client"
    assert "pip install huggingface_hub" in run.error


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for the model and what must stay free beside it."""
    path = tmp_path / "models"
    path.mkdir()
    kind = ["mount", "-t", "tmpfs", "-o", "size=25m", "tmpfs", str(path)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(kind, check=False).returncode:
        pytest.skip("only root on Linux can mount a small disk")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_without_room_is_said_before_the_fetch(hub: Hub, fetch: Fetcher, disk: Path) -> None:
    hub.add("lab/model", MODEL)
    (disk / "other").write_bytes(bytes(10 * MB))
    run = fetch("lab/model")
    assert run.failed == "disk_full"
    assert "23.1 MB are needed, 15" in run.error
    one_sentence(run.error)
    assert hub.asked("/resolve/") == []


def test_a_disk_that_fills_up_leaves_what_has_come(hub: Hub, fetch: Fetcher, disk: Path) -> None:
    hub.add("lab/model", MODEL)
    fault = hub.fault("/repos/", hold=4 * MB)
    run = fetch.start("lab/model")
    run.until("bytes", 2 * MB)
    with (disk / "other").open("wb", buffering=0) as other:
        try:
            while other.write(bytes(65536)):
                pass
        except OSError:
            pass
    fault.go()
    assert run.end().failed == "disk_full"
    one_sentence(run.error)
    assert not run.complete
    had = max(p.stat().st_size for p in (run.folder / "parts").iterdir())
    (disk / "other").unlink()
    hub.forget()
    again = fetch("lab/model")
    assert again.files() == MODEL
    assert had >= MB
    assert hub.sent("/repos/") == len(WEIGHTS) - had


# -- on a volume, and alone ---------------------------------------------------------------------


def test_a_volume_is_told_to_commit_before_and_after_the_manifest(
    hub: Hub, fetch: Fetcher, tmp_path: Path
) -> None:
    hub.add("lab/model", MODEL)
    program = tmp_path / "bin" / "sync"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\nls "$1" | tr "\\n" " " >> {tmp_path}/seen\necho >> {tmp_path}/seen\n'
    )
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    assert fetch("lab/model", sync=True, env={"PATH": path}).done
    before, after = (tmp_path / "seen").read_text().splitlines()
    assert before.split() == ["files", "parts", "plan.json"]
    assert after.split() == ["files", "manifest.json"]


def test_the_page_on_models_has_every_code() -> None:
    room = Path(fetch_program.__file__).parent
    used: set[str] = {"cut_off", "not_hidden"}  # these two are no Failed of the program
    for path in (room / "fetch.py", room / "store.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Failed":
                used.add(ast.literal_eval(node.args[0]))
    page = (Path(__file__).parent.parent.parent / "docs" / "models.md").read_text()
    table = page.partition("| code |")[2]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(firsts))) == used


def test_the_fetch_program_travels_alone() -> None:
    tree = ast.parse(Path(fetch_program.__file__).read_text(), feature_version=(3, 9))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= sys.stdlib_module_names
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            assert str(node.module).split(".")[0] in sys.stdlib_module_names
