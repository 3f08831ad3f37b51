"""Volumes, files in a sandbox, files that are sent with an image, snapshots."""

from __future__ import annotations

import io
import uuid
from pathlib import Path

import modal
import pytest
from modal.exception import (
    SandboxFilesystemDirectoryNotEmptyError,
    SandboxFilesystemIsADirectoryError,
    SandboxFilesystemNotFoundError,
    SandboxFilesystemPathAlreadyExistsError,
)

from .control import Controller
from .test_sandboxes import VERSIONS, create, output

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # of the test server itself
VOLUMES = pytest.mark.parametrize("version", [1, 2])


def new_volume(version: int = 2) -> modal.Volume:
    name = f"v-{uuid.uuid4().hex[:8]}"
    return modal.Volume.from_name(name, create_if_missing=True, version=version)


async def read(volume: modal.Volume, path: str) -> bytes:
    return b"".join([piece async for piece in volume.read_file.aio(path)])


@VOLUMES
async def test_a_volumes_files_from_the_client(cloud: Controller, version: int) -> None:
    volume = new_volume(version)
    large = bytes(range(256)) * 40_000 + bytes(9 << 20) + b"end"  # zeros are not sent
    async with volume.batch_upload.aio() as batch:
        batch.put_file(io.BytesIO(b"one"), "/a/one.txt")
        batch.put_file(io.BytesIO(large), "/large", mode=0o755)
        batch.put_file(io.BytesIO(b""), "/empty")
    assert await read(volume, "a/one.txt") == b"one"
    assert await read(volume, "/large") == large
    assert await read(volume, "empty") == b""
    listed = await volume.listdir.aio("/", recursive=True)
    assert {entry.path: entry.size for entry in listed if entry.type.name == "FILE"} == {
        "a/one.txt": 3,
        "large": len(large),
        "empty": 0,
    }
    with pytest.raises(FileExistsError):
        async with volume.batch_upload.aio() as batch:
            batch.put_file(io.BytesIO(b"two"), "/a/one.txt")
    async with volume.batch_upload.aio(force=True) as batch:
        batch.put_file(io.BytesIO(b"two"), "/a/one.txt")
    assert await read(volume, "a/one.txt") == b"two"
    await volume.copy_files.aio(["a/one.txt"], "b.txt")
    await volume.remove_file.aio("a", recursive=True)
    assert {entry.path for entry in await volume.listdir.aio("/")} == {"large", "empty", "b.txt"}
    for path in ("a", "a/one.txt"):
        with pytest.raises(FileNotFoundError):
            await read(volume, path)
    with pytest.raises(FileNotFoundError):
        await volume.remove_file.aio("a")
    uploads = cloud.stats()["uploads"]
    async with volume.batch_upload.aio() as batch:
        batch.put_file(io.BytesIO(large), "/again")
    assert cloud.stats()["uploads"] == uploads


async def test_volumes_are_found_by_name_and_deleted() -> None:
    volume = new_volume()
    await volume.hydrate.aio()
    name = volume.name or ""
    assert (await modal.Volume.from_name(name).hydrate.aio()).object_id == volume.object_id
    assert name in [one.name for one in await modal.Volume.objects.list.aio()]
    with pytest.raises(modal.exception.InvalidError):
        await modal.Volume.from_name(name, version=1).hydrate.aio()
    await modal.Volume.objects.delete.aio(name)
    with pytest.raises(modal.exception.NotFoundError):
        await modal.Volume.from_name(name).hydrate.aio()


@VERSIONS
async def test_what_is_written_is_the_sandboxs_own_until_sync(
    app: modal.App, gpu: str | None
) -> None:
    volume = new_volume()
    async with volume.batch_upload.aio() as batch:
        batch.put_file(io.BytesIO(b"old"), "/kept")
        batch.put_file(io.BytesIO(b"old"), "/gone")
        batch.put_file(io.BytesIO(b"old"), "/changed")
    sandbox = await create(app, volumes={"/vol": volume}, gpu=gpu)
    other = await create(app, volumes={"/vol": volume}, gpu=gpu)
    changes = "mkdir -p /vol/d; echo new > /vol/d/f; rm /vol/gone; echo -n more >> /vol/changed"
    script = "cat /vol/kept; " + changes
    assert await output(sandbox, "bash", "-c", script) == "old"
    with pytest.raises(FileNotFoundError):
        await read(volume, "d/f")
    assert await read(volume, "changed") == b"old"
    await output(sandbox, "sync", "/vol")
    assert await read(volume, "d/f") == b"new\n"
    assert await read(volume, "changed") == b"oldmore"
    with pytest.raises(FileNotFoundError):
        await read(volume, "gone")
    await output(sandbox, "bash", "-c", "echo 1 > /vol/mine; mkdir /vol/own; sync /vol")
    assert await read(volume, "mine") == b"1\n"
    await output(sandbox, "bash", "-c", "rm -r /vol/mine /vol/own; sync /vol")
    assert {entry.path for entry in await volume.listdir.aio("/")} == {"kept", "changed", "d"}
    assert await output(other, "ls", "/vol") == "changed\ngone\nkept\n"
    await other.reload_volumes.aio()
    assert await output(other, "ls", "/vol") == "changed\nd\nkept\n"
    await output(other, "bash", "-c", "cat /vol/d/f; echo last > /vol/last")
    await other.terminate.aio(wait=True)
    assert await read(volume, "last") == b"last\n"


async def test_renames_on_a_volume_are_committed(app: modal.App) -> None:
    volume = new_volume()
    async with volume.batch_upload.aio() as batch:
        for name in ("d/one", "d/sub/two", "e/three", "f/four"):
            batch.put_file(io.BytesIO(name.encode()), name)
    sandbox = await create(app, volumes={"/vol": volume})
    script = (
        "import os; os.chdir('/vol'); os.rename('d', 'g'); os.rename('g/sub', 'sub'); "
        "os.rename('e', 'g/e'); open('g/e/new', 'w').write('n'); os.rename('f/four', 'five'); "
        "os.rename('f', 'd')"
    )
    await output(sandbox, "python", "-c", script)
    seen = await output(sandbox, "bash", "-c", "cd /vol; find . -type f -printf '%P\\n' | sort")
    assert seen.split() == ["five", "g/e/new", "g/e/three", "g/one", "sub/two"]
    await output(sandbox, "sync", "/vol")
    listed = await volume.listdir.aio("/", recursive=True)
    assert sorted(e.path for e in listed if e.type.name == "FILE") == seen.split()
    assert {e.path for e in listed if e.type.name == "DIRECTORY"} == {"d", "g", "g/e", "sub"}
    assert await read(volume, "g/e/three") == b"e/three"
    assert await read(volume, "sub/two") == b"d/sub/two"


@VERSIONS
async def test_a_part_of_a_volume_and_a_mount_that_is_read_only(
    app: modal.App, gpu: str | None
) -> None:
    volume = new_volume()
    async with volume.batch_upload.aio() as batch:
        batch.put_file(io.BytesIO(b"1"), "/a/b/one")
        batch.put_file(io.BytesIO(b"2"), "/two")
    there = await create(app, volumes={"/v": volume.with_mount_options(sub_path="/a/b")}, gpu=gpu)
    assert await output(there, "ls", "/v") == "one\n"
    await output(there, "bash", "-c", "echo -n 3 > /v/three; rm /v/one; sync /v")
    assert await read(volume, "a/b/three") == b"3"
    with pytest.raises(FileNotFoundError):
        await read(volume, "a/b/one")
    made = await create(app, volumes={"/v": volume.with_mount_options(sub_path="new/er")}, gpu=gpu)
    await output(made, "bash", "-c", "echo 4 > /v/four")
    await made.reload_volumes.aio()
    assert await output(made, "cat", "/v/four") == "4\n"
    assert await read(volume, "new/er/four") == b"4\n"
    read_only = volume.with_mount_options(read_only=True, sub_path="a")
    reader = await create(app, volumes={"/v": read_only}, gpu=gpu)
    process = await reader.exec.aio("bash", "-c", "cat /v/b/three; echo > /v/x")
    assert "Read-only file system" in await process.stderr.read.aio()
    assert await process.stdout.read.aio() == "3"
    await reader.reload_volumes.aio()


async def test_reload_says_so_if_files_are_open(app: modal.App) -> None:
    entry = "cd /vol; touch /tmp/inside; sleep 60"
    sandbox = await create(app, "bash", "-c", entry, volumes={"/vol": new_volume()})
    await output(sandbox, "bash", "-c", "until [ -e /tmp/inside ]; do sleep 0.05; done")
    with pytest.raises(modal.exception.ConflictError, match="open files"):
        await sandbox.reload_volumes.aio()


async def test_volumes_commit_in_the_background_and_not_when_a_machine_is_taken(
    app: modal.App, cloud: Controller
) -> None:
    cloud.background_commits(seconds=0.2)
    volume = new_volume()
    sandbox = await create(app, volumes={"/vol": volume})
    await output(sandbox, "bash", "-c", "echo a > /vol/a; sleep 1")
    assert await read(volume, "a") == b"a\n"
    cloud.background_commits(seconds=60)
    sandbox = await create(app, volumes={"/vol": volume})
    await output(sandbox, "bash", "-c", "echo b > /vol/b")
    cloud.preempt(sandbox=sandbox.object_id)
    assert await sandbox.poll.aio() == 137
    with pytest.raises(FileNotFoundError):
        await read(volume, "b")


async def test_a_full_volume(app: modal.App, cloud: Controller) -> None:
    volume = new_volume()
    await volume.hydrate.aio()
    cloud.limit_volume(name=volume.name, size=1 << 20)
    sandbox = await create(app, volumes={"/vol": volume})
    process = await sandbox.exec.aio("bash", "-c", "head -c 2M /dev/zero > /vol/f")
    assert "No space left on device" in await process.stderr.read.aio()


async def test_files_in_a_sandbox(app: modal.App, tmp_path: Path) -> None:
    sandbox = await create(app)
    files = sandbox.filesystem
    await files.write_text.aio("héllo", "/data/new/text")
    assert await files.read_text.aio("/data/new/text") == "héllo"
    large = bytes(range(256)) * 20_000
    (tmp_path / "large").write_bytes(large)
    await files.copy_from_local.aio(tmp_path / "large", "/data/large")
    await files.copy_to_local.aio("/data/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == large
    listed = {one.name: (one.is_dir(), one.size) for one in await files.list_files.aio("/data")}
    assert listed["large"] == (False, len(large)) and listed["new"][0]
    info = await files.stat.aio("/data/large")
    assert (info.is_file(), info.size, info.permissions) == (True, len(large), "rw-r--r--")
    await files.make_directory.aio("/data/x/y")
    with pytest.raises(SandboxFilesystemPathAlreadyExistsError):
        await files.make_directory.aio("/data/x", create_parents=False)
    with pytest.raises(SandboxFilesystemDirectoryNotEmptyError):
        await files.remove.aio("/data/x")
    await files.remove.aio("/data/x", recursive=True)
    with pytest.raises(SandboxFilesystemNotFoundError):
        await files.stat.aio("/data/x")
    with pytest.raises(SandboxFilesystemIsADirectoryError):
        await files.read_bytes.aio("/data")


@VERSIONS
async def test_files_that_come_with_an_image_are_sent_once(
    app: modal.App, cloud: Controller, tmp_path: Path, gpu: str | None
) -> None:
    content = uuid.uuid4().hex
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/a.py").write_text(content)
    (tmp_path / "run.sh").write_text("#!/bin/sh\necho " + content)
    (tmp_path / "run.sh").chmod(0o755)
    base = modal.Image.debian_slim(python_version="3.11")
    before = cloud.stats()

    async def run() -> str:
        image = base.add_local_dir(tmp_path, "/root/pack")
        sandbox = await create(app, image=image, gpu=gpu)
        return await output(sandbox, "bash", "-c", "cat /root/pack/sub/a.py; /root/pack/run.sh")

    assert await run() == content + content + "\n"
    assert cloud.stats()["uploads"] == before["uploads"] + 2
    assert await run() == content + content + "\n"
    assert cloud.stats()["uploads"] == before["uploads"] + 2
    (tmp_path / "sub/a.py").write_text(f"changed {content}")
    assert await run() == f"changed {content}{content}\n"
    after = cloud.stats()
    assert after["uploads"] == before["uploads"] + 3
    assert after["builds"] <= before["builds"] + 1  # the base, if it is the first to ask for it


@VERSIONS
async def test_a_snapshot_is_an_image(app: modal.App, gpu: str | None) -> None:
    sandbox = await create(app, gpu=gpu, env={"A": "1"})
    script = "echo kept > /root/kept; rm /usr/bin/awk; mkdir /new; echo 2 > /new/two"
    await output(sandbox, "bash", "-c", script)
    image = await sandbox.snapshot_filesystem.aio()
    await output(sandbox, "bash", "-c", "echo later > /root/kept")
    await sandbox.terminate.aio(wait=True)
    again = await create(app, image=modal.Image.from_id(image.object_id), gpu=gpu)
    script = "cat /root/kept /new/two; test -e /usr/bin/awk || echo gone; echo more >> /root/kept"
    assert await output(again, "bash", "-c", script) == "kept\n2\ngone\n"
    second = await again.snapshot_filesystem.aio()
    third = await create(app, image=second, gpu=gpu)
    assert await output(third, "cat", "/root/kept") == "kept\nmore\n"
