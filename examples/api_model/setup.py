# %% the endpoint: that of the environment, or else a server of the shipped models on this machine's loopback
import atexit
import json
import os
import subprocess
import sys
from pathlib import Path

from chat_api import ChatApi

url = os.environ.get("CHAT_API_URL")
if not url:
    server = subprocess.Popen(
        [sys.executable, "served/server.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )  # it ends when its stdin is closed, and so with this kernel
    atexit.register(server.terminate)
    url = server.stdout.readline().strip()
api = ChatApi(url, key=os.environ.get("OPENROUTER_API_KEY", ""))
suspect = os.environ.get("CHAT_API_MODEL", "model-a")
control = os.environ.get("CHAT_API_CONTROL", "model-b")
print("reachable:", [name for name in (suspect, control) if name in api.models()])

# %% what is asked about
facts = json.loads(Path("facts.json").read_text())
print({part: len(items) for part, items in facts.items() if isinstance(items, list)})
