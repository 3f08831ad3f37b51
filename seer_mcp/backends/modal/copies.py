"""Copies without names of hidden models, on the volumes of the models.

A machine without a GPU and without a token makes one, once; a sandbox has the copy's folder mounted
and nothing else of the volume.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import modal
import modal.exception

from ...errors import ModelUnavailable
from ...model_store import HubModel, not_hidden, staging
from .account import APP, HANDLE, Account
from .image import PYTHON, Images
from .sandbox import Ending

VOLUME = "/model"  # where the machine that copies has the volume
PROGRAM = "/seer/copy"
SECONDS = 3600
CORES, MEBIBYTES = 2.0, 4096
CALLED = "seer-model-"  # as machines that fetch are: they end by themselves, and sweeps know them
COPIES = "copies"  # a folder of the volume


class Copies:
    def __init__(self, account: Account, images: Images, ending: Ending) -> None:
        self._account = account
        self._ending = ending
        self._images = images

    async def made(
        self,
        model: HubModel,
        volume: Any,
        alias: str,
        names: Sequence[str],
        tags: dict[str, str],
        app: Any,
    ) -> tuple[str, dict[str, Any]]:
        """The copy's folder on the volume, and what is known of it. Raises ModelUnavailable."""
        told = json.dumps([staging.FORMAT, alias, sorted(names)])
        key = hashlib.sha256(f"copy\0{model.key}\0{told}".encode()).hexdigest()[:20]
        place = f"{COPIES}/{key}"
        known = await record_of(volume, f"{place}.json")
        if known is None:
            await self._make(volume, place, f"{CALLED}{key}", alias, names, tags, app)
            known = await record_of(volume, f"{place}.json")
        if known is None:
            raise not_hidden(alias, "the machine that makes it ended without a result")
        return place, known

    async def _make(
        self,
        volume: Any,
        place: str,
        name: str,
        alias: str,
        names: Sequence[str],
        tags: dict[str, str],
        app: Any,
    ) -> None:
        program = Path(staging.__file__).read_text()
        image = await self._images.made(
            PROGRAM,
            lambda: modal.Image.debian_slim(python_version=PYTHON).add_local_dir(
                self._images.stage_text("staging.py", program), PROGRAM
            ),
            app,
        )
        client = await self._account.client()
        asked = {
            "source": f"{VOLUME}/files",
            "target": f"{VOLUME}/{place}",
            "names": list(names),
            "alias": alias,
            "sync": VOLUME,
        }
        try:
            there = await modal.Sandbox.create.aio(
                "python",
                f"{PROGRAM}/staging.py",
                json.dumps(
                    asked
                ),  # not by stdin: a machine whose maker has died does not wait for it
                app=app,
                name=name,
                tags={**tags, HANDLE: name},
                image=image,
                timeout=SECONDS,
                cpu=(CORES, CORES),
                memory=MEBIBYTES,
                volumes={VOLUME: volume},
                block_network=True,
                client=client,
            )
        except modal.exception.AlreadyExistsError:  # another server of the workspace makes it
            with suppress(modal.exception.NotFoundError):  # it is over already
                there = await modal.Sandbox.from_name.aio(APP, name, client=client)
                await there.wait.aio(raise_on_termination=False)
            return
        try:
            heard(await there.stdout.read.aio(), alias)
        finally:
            await self._ending.end(name, there)


def heard(output: str, alias: str) -> None:
    """Raises ModelUnavailable if the program said that it cannot be done."""
    for line in output.splitlines():
        with suppress(ValueError):
            said: Any = json.loads(line)
            if isinstance(said, dict) and "failed" in said:
                raise not_hidden(alias, str(said["error"]))
            if isinstance(said, dict) and "done" in said:
                return
    raise ModelUnavailable(
        alias, "cut_off", "the machine that copies it ended without a result; start again"
    )


async def record_of(volume: Any, path: str) -> dict[str, Any] | None:
    """What was written last, when the copy was whole."""
    text = bytearray()
    with suppress(FileNotFoundError, modal.exception.NotFoundError):
        async for piece in volume.read_file.aio(path):
            text += piece
    return json.loads(text) if text else None
