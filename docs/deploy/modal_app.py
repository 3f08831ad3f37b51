"""The endpoint of a team on Modal itself: modal deploy docs/deploy/modal_app.py, from the root of the project.

One container holds the server, a volume what it keeps; the sandboxes are machines of their own beside it. Set the name
that Modal gives (https://WORKSPACE--seer-mcp-serve.modal.run) as SEER_URL of the secret `seer-mcp`.
"""

import os
import subprocess
from pathlib import Path

import modal

ROOT = Path(__file__).parent.parent.parent
KEPT = Path("/data")
FLAGS = ["serve", "--users", "--host", "0.0.0.0", "--behind-proxy", "--owner-budget", "$20 a day"]

app = modal.App("seer-mcp")
image = modal.Image.debian_slim(python_version="3.12").uv_pip_install("uv")
for name in ("pyproject.toml", "uv.lock", "README.md", "LICENSE"):
    image = image.add_local_file(ROOT / name, f"/app/{name}", copy=True)
for name in ("seer_mcp", "tool_packs", "examples"):
    image = image.add_local_dir(ROOT / name, f"/app/{name}", copy=True)
image = image.run_commands("cd /app && uv sync --locked --no-dev")


@app.function(
    image=image,
    volumes={str(KEPT): modal.Volume.from_name("seer-mcp", create_if_missing=True)},
    secrets=[modal.Secret.from_name("seer-mcp")],  # SEER_URL, MODAL_TOKEN_ID, MODAL_TOKEN_SECRET
    min_containers=1,
    max_containers=1,  # one server writes the state folder
    timeout=24 * 3600,
)
@modal.concurrent(max_inputs=500)
@modal.web_server(8757, startup_timeout=60)
def serve() -> None:
    environment = {
        **os.environ,
        "SEER_MCP_STATE": str(KEPT / "state"),
        "SEER_MCP_OUTPUTS": str(KEPT / "notebooks"),
    }
    command = ["/app/.venv/bin/seer-mcp", *FLAGS, "--public-url", os.environ["SEER_URL"]]
    subprocess.Popen(command, env=environment, cwd=KEPT)
