"""docs/team.md: its commands are run as they stand there; only names of places are the test's."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import os
import re
import signal
import ssl
import subprocess
from pathlib import Path

import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from ..faults.ground import Ground
from ..load.serving import free_port
from ..pages import blocks
from ..typing_in import TOOLS, shell, type_in

pytestmark = pytest.mark.anyio
ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "team.md").read_text()
BLOCKS = [block.splitlines() for block in re.findall(r"```console\n(.*?)```", PAGE, re.S)]
LINES = [line for block in BLOCKS for line in block]
SERVERS = [line for line in LINES if " serve " in line and not line.endswith("&")]
WATCH = "uv run seer-mcp watch --no-browser"


def test_every_line_of_the_page_is_in_one_of_these_tests() -> None:
    assert WATCH in LINES  # tests/team/test_watch.py runs it
    assert len(SERVERS) == 4 and len(LINES) >= 15


README = next(
    block.text
    for block in blocks(ROOT / "README.md")
    if "serve --users" in block.text and block.language == "console"
).splitlines()
# What the browser does: sign in with the token, see the list, open the notebook.
LOOK = """\
curl --silent --fail --output /dev/null --cookie-jar jar --header "Origin: http://127.0.0.1:8757" \
    --data-urlencode "token=$(cat anna.token)" http://127.0.0.1:8757/enter
curl --silent --fail --cookie jar http://127.0.0.1:8757/ | tee overview.html
page=$(grep -o 'href="/s/[^"]*"' overview.html | head -n 1 | cut -d '"' -f 2)
curl --silent --fail --cookie jar "http://127.0.0.1:8757$page"
"""


def typed(place: Ground, lines: list[str]) -> str:
    """What is said when `lines` are typed, then the end of the trial."""
    port = free_port()
    if not (TOOLS / "npm/node_modules/.bin/claude").exists():  # .ci/clients installs it
        lines = [line for line in lines if not line.startswith("claude ")]
    script = "\n".join([*lines, *BLOCKS[1], "wait"])
    script = script.replace(":8757", f":{port}").replace("--users", f"--users --port {port}", 1)
    script = script.replace("examples/", f"{ROOT}/examples/")
    return type_in(place, script)


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "page", ["docs/team.md", pytest.param("README.md", marks=pytest.mark.slow)]
)
def test_the_path_from_nothing(place: Ground, page: str) -> None:
    lines = [line for line in README if " watch" not in line] if page == "README.md" else BLOCKS[0]
    said = typed(place, [*lines, LOOK])
    assert "the answer is 42" in said
    assert re.search(r"signed in with the token: http://127.0.0.1:\d+/\n", said)
    if page != "README.md" and (TOOLS / "npm/node_modules/.bin/claude").exists():
        assert re.search(r"seer: .*Connected", said), said[-3000:]
    (path,) = place.folder.rglob("anna/hello/*.ipynb")
    assert "6 * 7" in path.read_text()
    listed, shown = (place.folder / "overview.html").read_text(), said.split("<!doctype html>")[-1]
    assert ">hello<" in listed
    assert "the answer is 42" in shown and "6 * 7" in re.sub(r"<[^>]*>", "", shown)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_what_comes_after_the_path(place: Ground) -> None:
    rest = [line for block in BLOCKS[2:] for line in block]
    said = typed(place, [*BLOCKS[0], *(line for line in rest if line not in (*SERVERS, WATCH))])
    assert "seer_call_seconds_count{" in said  # /metrics
    assert re.search(r"\w{8} of watcher is revoked", said)
    names = subprocess.run(
        ["tar", "--list", "--file", place.folder / "seer-backup.tar.gz"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {"./tokens.json", "./audit.jsonl"} <= set(names.split()) and "logs/" not in names


def certificate(folder: Path, name: str) -> None:
    """cert.pem and key.pem for a name, signed by themselves."""
    key = ec.generate_private_key(ec.SECP256R1())
    who = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    made = (
        x509.CertificateBuilder()
        .subject_name(who)
        .issuer_name(who)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, *plain))


@pytest.mark.timeout(120)
async def test_each_server_of_the_page_starts_and_asks_for_a_token(place: Ground) -> None:
    certificate(place.folder, "seer.example.org")
    trusted = ssl.create_default_context(cafile=str(place.folder / "cert.pem"))

    async def served(number: int, line: str) -> None:
        port = free_port()
        command = line.replace(" serve ", f" serve --port {port} ").replace(":8757", f":{port}")
        env = shell(place, SEER_MCP_STATE=str(place.folder / f"state-{number}"))
        process = await asyncio.create_subprocess_exec(
            *("bash", "-c", f"exec {command}"),
            cwd=place.folder,
            env=env,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        secure = "--tls-cert" in line
        named = re.search(r"--public-url (\S+)", command)
        host = named[1].split("//")[1] if named else f"127.0.0.1:{port}"
        base = f"http{'s' if secure else ''}://127.0.0.1:{port}"
        try:
            async with (
                asyncio.timeout(40),
                httpx2.AsyncClient(verify=trusted, headers={"Host": host}) as http,
            ):
                while True:
                    try:
                        assert (await http.get(f"{base}/readyz")).text == "ready"
                        break
                    except httpx2.ConnectError:
                        assert process.returncode is None, await process.stderr.read()
                        await asyncio.sleep(0.1)
                for extra, status in (({}, 401), ({"Host": "evil.example"}, 421)):
                    answer = await http.post(f"{base}/mcp", json={}, headers=extra)
                    assert answer.status_code == status, (line, answer.text)
                    assert (
                        status != 401 or "resource_metadata=" in answer.headers["www-authenticate"]
                    )
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            assert await asyncio.wait_for(process.wait(), 20) == 0

    await asyncio.gather(*(served(number, line) for number, line in enumerate(SERVERS)))
