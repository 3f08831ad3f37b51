"""An OpenAI-compatible server of shipped models on loopback: GET /v1/models, POST /v1/chat/completions.

python server.py    # prints its address; ends when its stdin is closed

One base with an adapter for each name of models.json. A conversation that ends with an assistant's message
is continued inside that message, as providers that allow a prefill do. It streams nothing.
"""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from tool_packs import organisms
from tool_packs.errors import PackError
from tool_packs.generation import generate
from tool_packs.models import load_model

torch.set_num_threads(1)
NAMES = json.loads((Path(__file__).parent / "models.json").read_text())
KNOWN = {"model", "messages", "n", "temperature", "top_p", "max_tokens", "seed"}
LARGEST = 1_000_000  # bytes of a request
LONGEST = 48  # tokens of a reply: more than these models have ever to say


class Refused(Exception):
    """A request that cannot be answered: the status and a sentence."""

    def __init__(self, status, sentence):
        super().__init__(sentence)
        self.status = status


def number(asked, key, default, low, high):
    value = asked.get(key, default)
    if isinstance(value, bool) or not isinstance(value, type(default) | int):
        raise Refused(400, f"{key} = {value!r}: give a number from {low} to {high}")
    if not low <= value <= high:
        raise Refused(400, f"{key} = {value}: give a number from {low} to {high}")
    return value


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, {"error": {"message": f"no {self.path} here"}})
        return self.answer(
            200, {"object": "list", "data": [{"id": n, "object": "model"} for n in NAMES]}
        )

    def do_POST(self):
        try:
            self.answer(200, self.complete())
        except Refused as refused:
            self.answer(
                refused.status, {"error": {"message": str(refused), "code": refused.status}}
            )

    def complete(self):
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= LARGEST:
            self.close_connection = True
            raise Refused(413, f"a body of {length} bytes: send JSON of at most {LARGEST:,}")
        body = self.rfile.read(length)
        if self.path != "/v1/chat/completions":
            raise Refused(404, f"no {self.path} here; POST /v1/chat/completions")
        try:
            asked = json.loads(body)
        except ValueError as error:
            raise Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(asked, dict) or set(asked) - KNOWN:
            raise Refused(400, f"send an object with keys among {', '.join(sorted(KNOWN))}")
        name, messages = asked.get("model"), asked.get("messages")
        if name not in NAMES:
            raise Refused(404, f"no model {name!r}; there are {', '.join(NAMES)}")
        if not isinstance(messages, list) or not messages:
            raise Refused(400, "messages: give a list of {role, content}")
        options = {
            "n": number(asked, "n", 1, 1, 128),
            "temperature": number(asked, "temperature", 1.0, 0, 2),
            "top_p": number(asked, "top_p", 1.0, 0.01, 1),
            "seed": number(asked, "seed", 0, 0, 2**31),
            "max_new_tokens": min(number(asked, "max_tokens", LONGEST, 1, 100_000), LONGEST),
        }
        try:
            with self.server.lock, self.server.model.adapter(NAMES[name]):
                made = generate(self.server.model, messages, **options)
        except PackError as error:
            raise Refused(400, str(error)) from error
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": row["text"]},
                "finish_reason": "stop" if row["finished"] else "length",
            }
            for i, row in enumerate(made.rows)
        ]
        return {"object": "chat.completion", "model": name, "choices": choices}

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        first, *others = NAMES.values()
        self.model = load_model(f"organism:{first}")
        for other in others:
            self.model.add_adapter(str(organisms.path(other)), other)
        self.lock = threading.Lock()  # one forward pass at a time
        super().__init__(("127.0.0.1", 0), Handler)


if __name__ == "__main__":
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    sys.stdin.read()
