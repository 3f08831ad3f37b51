import base64
import json
import os
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from ..faults.conftest import place
from ..load.serving import free_port
from ..typing_in import TOOLS

__all__ = ["place"]


class Provider:
    """The npm package oidc-provider as a process on the loopback."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        script = Path(__file__).with_name("oidc_provider.mjs")
        modules = TOOLS / "npm" / "node_modules"
        self._process = subprocess.Popen(
            [str(TOOLS / "node/bin/node"), str(script), str(modules), str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # the node of the wheel is a script that starts the real one
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline().strip() == "listening"

    def stop(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
            assert self._process.stdout is not None
            self._process.stdout.close()

    def restart(self) -> None:
        """With new keys."""
        self.stop()
        self.start()

    def token(self, client: str, resource: str, scope: str) -> str:
        """An access token by client credentials."""
        form = {"grant_type": "client_credentials", "resource": resource, "scope": scope}
        basic = base64.b64encode(f"{client}:secret-of-{client}-in-a-test".encode()).decode()
        request = urllib.request.Request(
            f"{self.url}/token",
            urlencode(form).encode(),
            {"Authorization": f"Basic {basic}"},
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.loads(answer.read())["access_token"]


@pytest.fixture
def provider() -> Iterator[Provider]:
    if not (TOOLS / "npm/node_modules/oidc-provider").is_dir():
        pytest.skip("the npm package oidc-provider is not there: .ci/clients installs it")
    made = Provider()
    made.start()
    try:
        yield made
    finally:
        made.stop()
