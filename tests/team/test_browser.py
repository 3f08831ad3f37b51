"""The watch page in a real browser: it grows, its buttons work, nothing of a notebook runs; light, dark, on a phone.

uv run --with playwright pytest -m slow -n 0 tests/team/test_browser.py     (and Debian's package chromium)

With SEER_PICTURES=docs it also takes the pictures that stand there.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ..faults.ground import TOKEN, Endpoint, Ground, http_server

api = pytest.importorskip("playwright.async_api", reason="uv run --with playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
]
PICTURE_BYTES = 150_000
PLOT = """\
import matplotlib.pyplot as plt
import numpy as np

layers = np.arange(12)
plt.figure(figsize=(5, 2.2))
plt.plot(layers, 0.5 + 0.45 / (1 + np.exp(5 - layers)), "o-", label="planted")
plt.plot(layers, 0.5 + 0.03 * np.sin(layers), "s--", label="control")
plt.xlabel("layer"); plt.ylabel("probe AUROC"); plt.legend(); plt.show()"""
STEPS = """\
from tqdm.auto import tqdm
for layer in tqdm(range(12), desc="layers"):
    pass
print("layer 7: effect +2.41, random direction +0.12")"""


class Watching:
    """One page of a browser, and what it complained of."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.complaints: list[str] = []
        page.on("console", lambda m: m.type == "error" and self.complaints.append(m.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    async def picture(self, folder: Path, name: str) -> None:
        path = folder / f"{name}.png"
        await self.page.screenshot(path=path)
        assert 5_000 < path.stat().st_size < PICTURE_BYTES, path.stat().st_size


@asynccontextmanager
async def browsing(server: Endpoint, **context: Any) -> AsyncIterator[Watching]:
    """Somebody who has signed in by typing the token."""
    async with api.async_playwright() as program:
        browser = await program.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            opened = await browser.new_context(**context)
            watching = Watching(await opened.new_page())
            await watching.page.goto(server.url.removesuffix("/mcp"))
            await watching.page.get_by_label("Your token").fill(TOKEN)
            await watching.page.keyboard.press("Enter")
            await watching.page.get_by_role("heading", name="Sandboxes").wait_for()
            watching.complaints.clear()  # the browser notes the 401 of the sign-in page
            yield watching
        finally:
            await browser.close()


@pytest.mark.timeout(180)
async def test_a_person_watches_a_notebook_grow_and_ends_it(place: Ground, tmp_path: Path) -> None:
    folder = Path(os.environ.get("SEER_PICTURES") or tmp_path)
    async with http_server(place.config()) as server, server.lab() as lab:
        handle = await lab.start(name="hidden-belief")
        await lab.call(
            "create_cell",
            sandbox=handle,
            type="markdown",
            source="# Does it believe something about the user?\nA direction of equal norm is the control.",
        )
        async with browsing(
            server, viewport={"width": 900, "height": 980}, color_scheme="light"
        ) as seen:
            page = seen.page
            await page.get_by_role("link", name="hidden-belief").click()
            await page.get_by_role("heading", name="Does it believe").wait_for()
            # It grows without a reload, and keeps what was typed into the window.
            await page.evaluate("window.kept = 1")
            await lab.cell(handle, STEPS)
            await page.get_by_text("layer 7: effect +2.41").nth(1).wait_for()
            await lab.cell(handle, PLOT)
            await page.locator(".outputs img").wait_for()
            assert await page.evaluate("window.kept") == 1
            assert await page.evaluate("document.querySelector('.outputs img').naturalWidth") > 100
            # By keyboard: j goes from cell to cell.
            await page.keyboard.press("j")
            first = await page.evaluate("document.activeElement.id")
            await page.keyboard.press("j")
            assert first and await page.evaluate("document.activeElement.id") != first
            await page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
            tops = "[...document.querySelectorAll('.actions button')].map(b => b.getBoundingClientRect().top)"
            assert len(set(await page.evaluate(tops))) == 1  # the buttons stand in a row
            await seen.picture(folder, "watch-light")
            assert seen.complaints == []
        async with browsing(
            server,
            viewport={"width": 390, "height": 844},
            device_scale_factor=1,
            color_scheme="dark",
        ) as seen:
            page = seen.page
            await page.get_by_role("link", name="hidden-belief").click()
            await page.locator(".outputs img").wait_for()
            wide = await page.evaluate("document.documentElement.scrollWidth")
            assert wide <= 390, f"the page is {wide} pixels wide on a phone"
            paper = await page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert paper == "rgb(15, 19, 24)"
            await seen.picture(folder, "watch-dark")
            # Nothing of a notebook runs: what tries to is text.
            evil = "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
            await lab.cell(
                handle, f"from IPython.display import HTML\nprint({evil!r})\nHTML({evil!r})"
            )
            await page.get_by_text("document.title").first.wait_for()
            assert await page.title() == "hidden-belief"
            # The end asks first, and the page says that it is over.
            page.on("dialog", lambda dialog: dialog.accept())
            await page.get_by_role("button", name="Stop the sandbox").click()
            await page.locator(".badge.ended").wait_for()
            assert await page.get_by_role("button", name="Stop the sandbox").count() == 0
            assert seen.complaints == []
    assert place.processes() == []


# A host of MCP Apps, as small as can be: a page with the app in a frame, whose messages are answered by `host`.
HOST = """
const frame = document.createElement("iframe");
frame.setAttribute("sandbox", "allow-scripts");
frame.style.width = "600px";
frame.srcdoc = html;
addEventListener("message", async ({ data }) => {
  if (data.method === "ui/notifications/size-changed") frame.style.height = `${data.params.height}px`;
  if (data.method === "ui/notifications/initialized")
    frame.contentWindow.postMessage({ jsonrpc: "2.0", method: "ui/notifications/tool-result", params: result }, "*");
  if (data.id === undefined) return;
  frame.contentWindow.postMessage({ jsonrpc: "2.0", id: data.id, ...(await host(data.method, data.params)) }, "*");
});
document.body.append(frame);
"""


@pytest.mark.timeout(120)
async def test_a_host_of_mcp_apps_shows_the_notebook_beside_the_chat(place: Ground) -> None:
    async with http_server(place.config()) as server, server.lab() as lab, browsing(server) as seen:
        result = await lab.call("start_sandbox", name="beside-the-chat")
        handle = result.meta["seer/sandbox"]["handle"]
        (app,) = (await lab.client.read_resource("ui://seer/notebook.html")).contents

        async def host(method: str, params: Any) -> dict[str, Any]:
            if method == "ui/initialize":
                assert params["appInfo"]["name"] == "seer-mcp"
                context = {"theme": "dark"}
                return {"result": {"protocolVersion": "2026-01-26", "hostContext": context}}
            assert method == "resources/read", method
            read = await lab.client.read_resource(params["uri"], cache_mode="bypass")
            return {"result": read.model_dump(mode="json", by_alias=True, exclude_none=True)}

        page = await seen.page.context.new_page()
        await page.expose_function("host", host)
        given = {"html": app.text, "result": result.model_dump(mode="json", by_alias=True)}
        await page.goto("about:blank")
        await page.evaluate(f"({{ html, result }}) => {{ {HOST} }}", given)
        frame = page.frame_locator("iframe")
        await frame.get_by_text("beside-the-chat").wait_for()
        await lab.cell(handle, "print('six times seven is', 6 * 7)")
        await frame.get_by_text("six times seven is 42").wait_for()
        await lab.cell(handle, "1/0")
        await frame.get_by_text("ZeroDivisionError").first.wait_for()
        assert await frame.locator(".cell").count() == 2
        await lab.ok("stop_sandbox", sandbox=handle)
        await frame.locator(".badge.ended").wait_for()
