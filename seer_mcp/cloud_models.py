"""`seer-mcp models … --backend modal`: models on volumes of the Modal workspace."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from .backends import open_backend
from .config import Config
from .errors import NotFound, SandboxUnreachable
from .model_store.command import asked
from .model_store.fetch import big


async def run_cloud_models(flags: argparse.Namespace, config: Config) -> int:
    """Do what the command line says; the exit status. Raises SeerError."""
    from .backends.modal import ModalBackend
    from .backends.modal.account import BROKEN, why

    backend = open_backend("modal", config)
    assert isinstance(backend, ModalBackend)
    models = backend.models
    try:
        if flags.verb == "list":
            kept = await models.kept()
            if flags.json:
                facts = {name: asdict(found) if found else None for name, found in kept.items()}
                print(json.dumps({"volumes": facts}, indent=1))
                return 0
            for name, found in sorted(kept.items()):
                what = "incomplete: the next fetch goes on with it"
                if found is not None:
                    what = f"{found.name}@{found.revision or found.commit[:12]}  {big(found.bytes)}"
                print(f"{name}  {what}")
            print(f"at Modal: {len(kept)}")
            return 0
        model = asked(flags.model, flags.revision)
        if flags.verb == "remove":
            if not await models.remove(model):
                known = [found.name for found in (await models.kept()).values() if found]
                raise NotFound("model at Modal", model.label, known)
            print(f"{model.label}: its volume {model.volume} was deleted")
            return 0
        found = await models.fetch(model, lambda text: print(text, file=sys.stderr))
        print(f"{model.label}: {big(found.bytes)} on the volume {model.volume}")
        return 0
    except BROKEN as error:
        raise SandboxUnreachable(f"Models at Modal: {why(error)}.") from error
