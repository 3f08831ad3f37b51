"""Access tokens of an OpenID Connect issuer: a real provider, and every way in which a token can be wrong."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from seer_mcp.errors import BadInput
from seer_mcp.http import oidc
from seer_mcp.http.oidc import Issuer

from ..faults.ground import Ground, http_server
from ..faults.test_h_http import HELLO, post
from ..support import text_of, until
from .conftest import Provider

pytestmark = pytest.mark.anyio
AUDIENCE = "https://seer.example.org/mcp"
ALL = "sandboxes:read sandboxes:write code:run"


async def test_h01_a_real_provider_lets_people_in_and_its_new_keys_are_found(
    place: Ground, provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "PAUSE_SECONDS", 0.0)
    issuer = Issuer(provider.url, AUDIENCE)
    async with http_server(
        place.config(team=True, team_backends=("local",)), issuer=issuer
    ) as server:
        anna = provider.token("anna-agent", AUDIENCE, ALL)
        async with server.lab(token=anna) as lab:
            handle = await lab.start()
            assert text_of(await lab.cell(handle, "6 * 7")).endswith("42")
            ben = provider.token("ben-agent", AUDIENCE, ALL)
            async with server.lab(token=ben) as other:
                assert handle not in await other.ok("list_sandboxes")
                assert "no sandbox" in (await other.no("read_notebook", sandbox=handle)).lower()
            other_audience = provider.token("anna-agent", "https://other.example.org/mcp", ALL)
            assert (await post(server, token=other_audience)).status_code == 401
            provider.restart()  # with new keys: the old token still holds until the keys are fetched again
            again = provider.token("anna-agent", AUDIENCE, ALL)
            assert (await post(server, token=again)).status_code == 200
            assert (await post(server, token=anna)).status_code == 401
            reader = provider.token("anna-agent", AUDIENCE, "sandboxes:read")
            async with server.lab(token=reader) as lab_of_reader:
                assert handle in await lab_of_reader.ok("list_sandboxes")
        metadata = server.url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
        async with httpx2.AsyncClient() as http:
            said = (await http.get(metadata)).json()
        assert said["authorization_servers"] == [f"{provider.url}/"] or said[
            "authorization_servers"
        ] == [provider.url]


# -- a small issuer with keys of the test, for tokens that no provider would make ----------------


class TestIssuer:
    """Discovery and keys on the loopback; counts who asks."""

    __test__ = False

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {}
        self.asked = 0
        self.broken = False
        self.answers = threading.Event()
        self.answers.set()
        self.redirect = ""
        issuer = self

        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                issuer.answers.wait(5)
                if issuer.broken:
                    self.send_error(500)
                    return
                if issuer.redirect:
                    self.send_response(302)
                    self.send_header("Location", issuer.redirect)
                    self.end_headers()
                    return
                if self.path == "/.well-known/openid-configuration":
                    said: Any = {"issuer": issuer.url, "jwks_uri": f"{issuer.url}/jwks"}
                else:
                    said = {"keys": [issuer.public(kid) for kid in issuer.keys]}
                body = json.dumps(said).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def new_key(self, kid: str, kind: str = "RS256") -> None:
        made = (
            rsa.generate_private_key(65537, 2048)
            if kind == "RS256"
            else ec.generate_private_key(ec.SECP256R1())
        )
        self.keys[kid] = (kind, made)

    def public(self, kid: str) -> dict[str, Any]:
        kind, key = self.keys[kid]
        algorithm = jwt.get_algorithm_by_name(kind)
        return {**json.loads(algorithm.to_jwk(key.public_key())), "kid": kid, "use": "sig"}

    def token(self, kid: str = "one", headers: dict[str, Any] | None = None, **changes: Any) -> str:
        kind, key = self.keys[kid]
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": "anna",
            "exp": now + 300,
            "iat": now,
            "scope": ALL,
        }
        claims = {k: v for k, v in {**claims, **changes}.items() if v is not None}
        return jwt.encode(claims, key, kind, {"kid": kid, **(headers or {})})


@pytest.fixture
def issued() -> Iterator[TestIssuer]:
    made = TestIssuer()
    made.new_key("one")
    with contextlib.closing(made):
        yield made


async def test_h01_every_claim_is_checked(issued: TestIssuer) -> None:
    issuer = Issuer(issued.url, AUDIENCE)
    good = await issuer.check(issued.token())
    assert good is not None and good.subject == "anna" and good.scopes == tuple(ALL.split())
    assert await issuer.check(issued.token(aud=["https://x.example", AUDIENCE])) is not None
    assert (await issuer.check(issued.token(scope=None, scp=["code:run"]))).scopes == ("code:run",)
    now = int(time.time())
    wrong = {
        "expired": {"exp": now - 31},
        "not yet valid": {"nbf": now + 31},
        "issued tomorrow": {"iat": now + 86400},
        "another audience": {"aud": "https://other.example/mcp"},
        "an audience that begins alike": {"aud": AUDIENCE + "x"},
        "no audience": {"aud": None},
        "another issuer": {"iss": "https://issuer.example"},
        "no issuer": {"iss": None},
        "no expiry": {"exp": None},
        "no subject": {"sub": None},
        "an empty subject": {"sub": ""},
    }
    for what, changes in wrong.items():
        assert await issuer.check(issued.token(**changes)) is None, what
    assert await issuer.check(issued.token(exp=now - 20)) is not None  # clocks differ


def encoded(part: Any) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_h01_a_forged_signature_is_no_token(issued: TestIssuer) -> None:
    issuer = Issuer(issued.url, AUDIENCE)
    good = issued.token()
    head, body, signature = good.split(".")
    claims = jwt.decode(good, options={"verify_signature": False})
    # The confusion of algorithms: the public key taken as the secret of an HMAC.
    start = f"{encoded({'alg': 'HS256', 'kid': 'one'})}.{encoded(claims)}"
    public = json.dumps(issued.public("one")).encode()
    confused = f"{start}.{encoded(hmac.digest(public, start.encode(), 'sha256'))}"
    forged = [
        f"{head}.{body}.",
        f"{head}.{body}.{signature[:-4]}AAAA",
        f"{head}.{jwt.encode({**claims, 'sub': 'ben'}, 'x' * 40).split('.')[1]}.{signature}",
        jwt.encode(claims, None, "none"),
        confused,
        jwt.encode(claims, rsa.generate_private_key(65537, 2048), "RS256", {"kid": "one"}),
        "a.b.c",
        "..",
        good + "." + body,
        "é.é.é",
        "\ud800",
    ]
    for token in forged:
        assert await issuer.check(token) is None, token
    assert await issuer.check(good) is not None


async def test_h01_made_up_keys_do_not_make_us_hammer_the_issuer(
    issued: TestIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    issuer = Issuer(issued.url, AUDIENCE)
    assert await issuer.check(issued.token()) is not None
    asked = issued.asked
    for number in range(50):
        assert await issuer.check(issued.token(headers={"kid": f"made up {number}"})) is None
    assert issued.asked == asked  # within PAUSE_SECONDS of the last look
    issued.new_key("two", "ES256")
    monkeypatch.setattr(oidc, "PAUSE_SECONDS", 0.0)
    assert await issuer.check(issued.token("two")) is not None
    assert issued.asked == asked + 2
    issued.broken = True  # what is known goes on to hold
    assert await issuer.check(issued.token(headers={"kid": "three"})) is None
    assert await issuer.check(issued.token()) is not None
    issued.broken = False
    del issued.keys["one"]
    issuer._fetched -= oidc.KEYS_SECONDS
    old = issued.token("two", headers={"kid": "one"})
    assert await issuer.check(old) is None


async def test_h01_a_token_with_a_known_key_does_not_wait_for_a_slow_issuer(
    issued: TestIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "PAUSE_SECONDS", 0.0)
    issuer = Issuer(issued.url, AUDIENCE)
    assert await issuer.check(issued.token()) is not None
    asked = issued.asked
    issued.answers.clear()
    made_up = asyncio.create_task(issuer.check(issued.token(headers={"kid": "made up"})))
    await until(lambda: issued.asked > asked)
    assert await issuer.check(issued.token()) is not None
    assert not made_up.done()
    issued.answers.set()
    assert await made_up is None


async def test_an_issuer_that_cannot_be_trusted_is_none(issued: TestIssuer) -> None:
    for url in ("http://issuer.example", "ftp://127.0.0.1", "issuer.example", "https://", ""):
        with pytest.raises(BadInput, match="https"):
            Issuer(url, AUDIENCE)
    token = issued.token()
    issued.redirect = "http://127.0.0.1:9/"
    assert await Issuer(issued.url, AUDIENCE).check(token) is None
    issued.redirect = ""
    lying = Issuer(
        issued.url.replace("127.0.0.1", "localhost"), AUDIENCE
    )  # it calls itself otherwise
    assert await lying.check(issued.token(iss=lying.url)) is None


async def test_h01_what_each_bad_token_is_told(place: Ground, issued: TestIssuer) -> None:
    issuer = Issuer(issued.url, AUDIENCE)
    async with http_server(place.config(team=True), issuer=issuer) as server:
        now = int(time.time())
        bodies: set[str] = set()
        for token in (
            None,
            "wrong",
            issued.token(exp=now - 60),
            issued.token(nbf=now + 60),
            issued.token(aud="x"),
            issued.token(iss="x"),
        ):
            answer = await post(server, token=token)
            assert answer.status_code == 401
            assert "resource_metadata=" in answer.headers["www-authenticate"]
            bodies.add(answer.text)
        assert len(bodies) == 1  # which of them it was is not said
        call = {
            "jsonrpc": "2.0",
            "id": 1,
            "method": "tools/call",
            "params": {"name": "run_command", "arguments": {"sandbox": "x", "command": "id"}},
        }
        for body in (call, [HELLO, call]):
            answer = await post(server, token=issued.token(scope="sandboxes:read"), body=body)
            assert answer.status_code == 403, answer.text
            challenge = answer.headers["www-authenticate"]
            assert 'scope="code:run"' in challenge and "resource_metadata=" in challenge
        answer = await post(server, token=issued.token(scope=None), body=HELLO)
        assert answer.status_code == 200  # any token may say hello
