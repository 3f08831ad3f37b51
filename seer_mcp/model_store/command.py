"""`seer-mcp models`: list, fetch, check, remove."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from typing import Any

from ..config import Config
from ..errors import BadInput
from .fetch import big
from .follow import FetchProgress, Manifest, span
from .names import HubModel, hub_model
from .store import Kept, ModelStore

SAY_SECONDS = 10.0  # between lines of progress where the last one cannot be written over


def add_models(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command line of `models`."""
    models = commands.add_parser("models", help="models of the hub that are kept on this machine")
    verbs = models.add_subparsers(dest="verb", metavar="VERB", required=True)
    listed = verbs.add_parser(
        "list", parents=[common], help="what is there, and what of it is missing"
    )
    fetch = verbs.add_parser(
        "fetch", parents=[common], help="fetch a model once, or go on where a fetch was cut off"
    )
    check = verbs.add_parser(
        "check", parents=[common], help="compare the files with the hub's listing"
    )
    check.add_argument(
        "--deep", action="store_true", help="read all files and compare their content"
    )
    remove = verbs.add_parser("remove", parents=[common], help="delete a model")
    remove.add_argument("--force", action="store_true", help="even while a sandbox uses it")
    for verb in (fetch, check, remove):
        verb.add_argument(
            "model", metavar="NAME", help="owner/name on the hub, or owner/name@revision"
        )
        verb.add_argument("--revision", metavar="REF", default="", help="a branch, tag or commit")
    for verb in (listed, fetch, remove):
        verb.add_argument(
            "--backend",
            choices=("local", "modal"),
            default="local",
            help="where: this machine, or volumes at Modal (default: local)",
        )
    for verb in (listed, fetch):
        verb.add_argument("--json", action="store_true", help="print one JSON object")


def run_models(flags: argparse.Namespace, config: Config) -> int:
    """Do what the command line says; the exit status. Raises SeerError."""
    store = ModelStore(config.models_dir, config.python, config.fetch_env)
    if flags.verb == "list":
        return show_list(store, flags.json)
    model = asked(flags.model, flags.revision)
    if flags.verb == "check":
        wrong = store.check(model, flags.deep)
        say("\n".join(wrong) or f"{model.label} is complete")
        return 1 if wrong else 0
    if flags.verb == "remove":
        say(f"{model.label}: {big(store.remove(model, flags.force))} freed")
        return 0
    token = config.secrets.find(["HF_TOKEN"]).values.get("HF_TOKEN", "")
    try:
        return asyncio.run(fetch_shown(store, model, token, flags.json))
    except KeyboardInterrupt:
        sys.stderr.write("\nStopped. The same command goes on from here.\n")
        return 130


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def asked(name: str, revision: str) -> HubModel:
    name, _, after = name.partition("@")
    model = hub_model(name, revision or after)
    if model is None:
        why = "this is a folder or an organism, and needs no fetch; give owner/name of the hub"
        raise BadInput("model", name, why)
    return model


def show_list(store: ModelStore, as_json: bool) -> int:
    kept = store.list()
    if as_json:
        say(json.dumps({"folder": str(store.root), "models": [facts(k) for k in kept]}, indent=1))
        return 0
    width = max((len(k.model.label) for k in kept), default=0)
    for k in kept:
        say(f"{k.model.label:{width}}  {k.commit[:12]}  {state(k)}")
    say(f"{len(kept)} models, {big(sum(k.bytes for k in kept))} in {store.root}")
    return 0


def state(kept: Kept) -> str:
    if not kept.complete:
        return f"{big(kept.bytes)} of {big(kept.total)}; models fetch goes on with it"
    used = f"used {span(time.time() - kept.used)} ago" if kept.used else "not used yet"
    return f"{big(kept.total)}, {used}"


def facts(kept: Kept) -> dict[str, Any]:
    return {
        "name": kept.model.name,
        "revision": kept.model.revision,
        "commit": kept.commit,
        "complete": kept.complete,
        "bytes": kept.bytes,
        "total": kept.total,
        "used": kept.used,
        "folder": str(kept.folder),
    }


class Shown:
    """Progress on stderr: one line that is written over, or one now and then where it goes to a file."""

    def __init__(self) -> None:
        self._over = sys.stderr.isatty()
        self._last = 0.0

    def __call__(self, progress: FetchProgress) -> None:
        line = progress.sentence()
        if self._over and not progress.note:
            sys.stderr.write(f"\r\x1b[K{line}")
        elif progress.note or time.monotonic() - self._last > SAY_SECONDS:
            self._last = time.monotonic()
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if self._over:
            sys.stderr.write("\r\x1b[K")


async def fetch_shown(store: ModelStore, model: HubModel, token: str, as_json: bool) -> int:
    """The model and, of an adapter, the base that it names."""
    found: list[Manifest] = []
    wanted: list[HubModel] = [model]
    shown = Shown()
    for one in wanted:
        try:
            manifest = await store.fetch(one, shown, token)
        finally:
            shown.end()
        found.append(manifest)
        base = hub_model(manifest.base) if manifest.base else None
        if base is not None and base not in wanted:
            wanted.append(base)
        if not as_json:
            where = store.find(one)
            assert where is not None
            tokenizer = "" if manifest.tokenizer or manifest.base else ", without a tokenizer"
            say(
                f"{one.label}: {big(manifest.bytes)}{tokenizer}, commit {manifest.commit}, in {where.folder}"
            )
    if as_json:
        kept = [store.find(one) for one in wanted]
        say(json.dumps({"models": [facts(k) for k in kept if k is not None]}, indent=1))
    return 0
