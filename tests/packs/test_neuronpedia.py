"""The Neuronpedia client against a server on loopback that speaks its API."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from tool_packs import neuronpedia
from tool_packs.errors import PackError, ServiceError, TextError

NAME = "gpt2-small/6-res-jb/650"
SECRET = "sk-np-0123456789abcdef"
PAGE = {
    "modelId": "gpt2-small",
    "layer": "6-res-jb",
    "index": "650",
    "explanations": [{"description": "words about cats"}, {"description": "pets"}],
    "activations": [
        {"tokens": [" my", " dog"], "values": [0, 2.5], "maxValue": 2.5, "maxValueTokenIndex": 1},
        {"tokens": [" the", " cat", " sat"], "values": [0.5, 7.5, 0]},
    ],
    "pos_str": [" cat", " kitten"],
    "pos_values": [1.5, 1.25],
    "neg_str": [" tax"],
    "neg_values": [-0.5],
    "frac_nonzero": 0.0123,
}


class Server(ThreadingHTTPServer):
    """Answers as Neuronpedia does, or as `fault` says; keeps what it was asked."""

    daemon_threads = True
    fault = None

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.free = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.answer(None)

    def do_POST(self):
        assert self.headers["Content-Type"] == "application/json"
        self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def answer(self, body):
        s = self.server
        s.asked.append((self.command, self.path, body, dict(self.headers.items())))
        if s.fault is not None:
            return s.fault(self)
        if self.command == "GET" and self.path == f"/api/feature/{NAME}":
            return self.send(200, PAGE)
        if self.path in ("/api/explanation/search", "/api/explanation/search-model"):
            if body["modelId"] != "gpt2-small":
                return self.send(404, {"message": "no such model"})
            assert len(body["query"]) >= 3
            assert ("layers" in body) == self.path.endswith("/search")
            begin = body.get("offset", 0)
            hits = [
                {"modelId": "gpt2-small", "layer": "6-res-jb", "index": str(i),
                 "description": f"cats {i}", "cosine_similarity": 0.9 - i / 100}
                for i in range(begin, min(begin + 20, 45))
            ]  # fmt: skip
            more = begin + 20 < 45
            return self.send(200, {"results": hits, "resultsCount": len(hits), "hasMore": more})
        if self.path == "/api/activation/new":
            assert body["feature"] == dict(
                zip(("modelId", "source", "index"), NAME.split("/"), strict=True)
            )
            words = body["customText"].split()
            values = [7.5 if a == "black" and w == "cat" else 0.0
                      for a, w in zip(["", *words], words, strict=False)]  # fmt: skip
            best = max(range(len(values)), key=values.__getitem__)
            return self.send(
                200,
                {"tokens": words, "values": values, "maxValue": max(values),
                 "maxValueTokenIndex": best},
            )  # fmt: skip
        return self.send(404, {"message": "Not Found"})

    def send(self, code, value, **headers):
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(code)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@contextlib.contextmanager
def serving():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.free.set()
        server.shutdown()
        thread.join(10)
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    with serving() as s:
        yield s


def sentence(call, *args, **options):
    with pytest.raises(PackError) as caught:
        call(*args, **options)
    said = str(caught.value)
    assert "\n" not in said
    assert SECRET not in said
    assert SECRET not in repr(caught.value.__cause__)
    return said


class TestAnswers:
    @pytest.mark.parametrize("name", [NAME, f"https://www.neuronpedia.org/{NAME}"])
    def test_the_page_of_a_feature(self, llama, server, name):
        r = neuronpedia.feature(llama, name, url=server.url)
        assert r.labels["explanations"] == ["words about cats", "pets"]
        assert r["text"] == [" the« cat» sat", " my« dog»"]  # the largest first
        assert r["peak"].tolist() == [7.5, 2.5]
        assert r["top_logits"].tolist() == [1.5, 1.25]
        assert r.labels["promotes"] == [" cat", " kitten"]
        assert r["frequency"].item() == pytest.approx(0.0123)
        assert "words about cats" in r.summary()
        assert "the page is of gpt2-small, the model here is llama" in r.summary()

    def test_a_page_with_almost_nothing_on_it(self, llama):
        r = neuronpedia.feature(llama, NAME, ask=lambda *_: {"index": "650", "pos_str": None})
        assert r.rows == []
        assert r["frequency"].isnan()
        assert "no explanation" in r.summary()

    def test_a_search_goes_on_until_there_are_enough(self, llama, server):
        r = neuronpedia.search(llama, "cats", model="gpt2-small", n=30, url=server.url)
        assert [a[2].get("offset") for a in server.asked] == [None, 20]
        assert r["feature"] == [f"gpt2-small/6-res-jb/{i}" for i in range(30)]
        assert torch.allclose(r["similarity"], 0.9 - torch.arange(30) / 100)
        r = neuronpedia.search(llama, "cats", model="gpt2-small", n=99, url=server.url)
        assert len(r.rows) == 45

    def test_a_search_in_some_sources(self, llama, server):
        options = {"model": "gpt2-small", "sources": ["6-res-jb"], "n": 3, "url": server.url}
        assert len(neuronpedia.search(llama, "cats", **options).rows) == 3
        ((method, path, body, _),) = server.asked
        assert (method, path) == ("POST", "/api/explanation/search")
        assert body == {"modelId": "gpt2-small", "query": "cats", "layers": ["6-res-jb"]}

    def test_activations_stand_beside_those_of_the_words_in_another_order(self, llama, server):
        text = "I saw that a black cat is here today"
        r = neuronpedia.activations(llama, NAME, text, url=server.url)
        assert r.labels["token"] == text.split()
        assert r["activation"].argmax() == 5
        assert sorted(r.labels["control token"]) == sorted(text.split())
        assert r.labels["control token"] != text.split()
        assert r["activation_control"].max() == 0
        assert "control, its words in another order: peak 0" in r.summary()
        told = neuronpedia.activations(llama, NAME, text, control="a black cat", url=server.url)
        assert told["activation_control"].tolist() == [0, 0, 7.5]


class TestKey:
    def test_it_is_read_at_the_call_and_kept_nowhere(self, llama, server, monkeypatch, tmp_path):
        neuronpedia.feature(llama, NAME, url=server.url)
        monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
        r = neuronpedia.feature(llama, NAME, url=server.url)
        keys = [{k.lower(): v for k, v in a[3].items()}.get("x-api-key") for a in server.asked]
        assert keys == [None, SECRET]
        r.save(tmp_path)
        assert SECRET not in (tmp_path / "result.json").read_text()
        assert SECRET not in r.summary()

    def test_it_does_not_follow_a_redirect(self, llama, server, monkeypatch):
        monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
        with serving() as other:
            server.fault = lambda h: h.send(302, {}, Location=other.url + h.path)
            said = sentence(neuronpedia.feature, llama, NAME, url=server.url)
            assert "elsewhere (302)" in said
            assert other.asked == []

    def test_it_is_not_sent_in_the_clear(self, llama, monkeypatch):
        monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
        said = sentence(neuronpedia.feature, llama, NAME, url="http://neuronpedia.example")
        assert "https" in said

    def test_a_server_that_repeats_it_is_not_quoted(self, llama, server, monkeypatch):
        monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
        server.fault = lambda h: h.send(500, {"message": f"bad key {SECRET}"})
        assert "[key]" in sentence(neuronpedia.feature, llama, NAME, url=server.url)
        server.fault = lambda h: h.send(200, f"<html>{SECRET}".encode())
        assert "[key]" in sentence(neuronpedia.feature, llama, NAME, url=server.url)


def dropped(handler):
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def cut_short(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"explanations": [')
    handler.close_connection = True


class TestFaults:
    @pytest.mark.parametrize(
        ("fault", "shown"),
        [
            (lambda h: h.send(429, {}, Retry_After="37"), "after 37 s"),
            (lambda h: h.send(429, {}), "too many requests (429)"),
            (lambda h: h.send(404, {}), f"has no feature {NAME} (404)"),
            (lambda h: h.send(401, {}), "none is set: put one in NEURONPEDIA_API_KEY"),
            (lambda h: h.send(400, {"message": "bad\nindex"}), 'bad\\\\nindex'),
            (lambda h: h.send(503, b"busy"), "failed (503)"),
            (lambda h: h.send(200, b"<html>hello"), "no JSON"),
            (lambda h: h.send(200, [1]), "a list, not a feature"),
            (lambda h: h.send(200, {"activations": 3}), "no list 'activations'"),
            (lambda h: h.send(200, {"activations": [{"tokens": ["a"], "values": []}]}), "1 tokens"),
            (dropped, "broke off"),
            (cut_short, "broke off"),
        ],
    )  # fmt: skip
    def test_one_sentence_says_what_is_wrong(self, llama, server, fault, shown):
        server.fault = fault
        assert shown in sentence(neuronpedia.feature, llama, NAME, url=server.url)

    def test_a_key_that_is_not_taken(self, llama, server, monkeypatch):
        monkeypatch.setenv("NEURONPEDIA_API_KEY", SECRET)
        server.fault = lambda h: h.send(403, {})
        said = sentence(neuronpedia.search, llama, "cats", url=server.url)
        assert "does not take the one that it was given" in said

    def test_a_server_that_says_nothing(self, llama, server):
        server.fault = lambda h: server.free.wait(30)
        said = sentence(neuronpedia.feature, llama, NAME, url=server.url, timeout=0.2)
        assert "did not answer within 0.2 s" in said

    def test_no_network(self, llama):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            free = f"http://127.0.0.1:{s.getsockname()[1]}"
            said = sentence(neuronpedia.feature, llama, NAME, url=free)
        assert "cannot be reached" in said
        assert "ask=" in said

    def test_a_model_that_neuronpedia_does_not_have(self, llama, server):
        said = sentence(neuronpedia.search, llama, "cats", url=server.url)
        assert "has no model 'llama'" in said

    def test_arguments_that_do_not_fit(self, llama):
        for bad in ("650", "a/b/c", "a/b", "a/b/../c", ""):
            with pytest.raises(TextError, match="MODEL/SOURCE/INDEX"):
                neuronpedia.feature(llama, bad)
        with pytest.raises(TextError, match="three characters"):
            neuronpedia.search(llama, "a ")
        with pytest.raises(TextError, match="empty"):
            neuronpedia.activations(llama, NAME, " ")
        for url in ("ftp://x", "nowhere", "https://user:word@host"):
            with pytest.raises(TextError, match="no address"):
                neuronpedia.feature(llama, NAME, url=url)
        with pytest.raises(ServiceError, match="without modelId"):
            neuronpedia.search(llama, "cats", ask=lambda *_: {"results": [{}]})
