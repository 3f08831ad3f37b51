"""The pages of those who watch: what runs, its notebook as it grows, and what is finished."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from sse_starlette.sse import EventSourceResponse
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from ..errors import NotFound, SeerError
from .page import CellHtml, read_cells, style
from .source import Card, Source, day, finished, notebook_in
from .visitors import COOKIE, HOURS, OneTime, Visitor, Visitors

POLICY = (
    "default-src 'none'; img-src data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
FILE_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; sandbox"
LOOK_SECONDS = 0.5  # between two looks at a notebook's file
CHECK_SECONDS = 5.0  # between two looks whether the visitor may still read it
STREAMS = 200  # pages that are open at once, of all visitors
FORM_BYTES = 16_384

Handler = Callable[[Request, Visitor], Awaitable[Response]]


class Pages:
    def __init__(
        self,
        source: Source,
        visitors: Visitors,
        *,
        secure: bool,
        once: OneTime | None = None,
        wait: Callable[[str], float] = lambda owner: 0.0,
    ) -> None:
        """`wait` counts one more request of an owner: 0 if it may be made now, else the seconds to wait."""
        self._source = source
        self._visitors = visitors
        self._secure = secure
        self._once = once
        self._wait = wait
        self._open = 0
        self._templates = Environment(
            loader=PackageLoader("seer_mcp.watch"), autoescape=True, undefined=StrictUndefined
        )
        static = files("seer_mcp.watch") / "static"
        self._static = {
            "watch.js": (static.joinpath("watch.js").read_text(), "text/javascript"),
            "watch.css": (style(), "text/css"),
        }

    def routes(self) -> list[BaseRoute]:
        seen = self._seen
        return [
            Route("/", seen(self.overview)),
            Route("/enter", self.enter, methods=["GET", "POST"]),
            Route("/leave", self.leave, methods=["POST"]),
            Route("/static/{name}", self.static),
            Route("/cards", seen(self.cards)),
            Route("/s/{handle}", seen(self.notebook)),
            Route("/s/{handle}/events", seen(self.events)),
            Route("/s/{handle}/notebook.ipynb", seen(self.download)),
            Route("/s/{handle}/notebook.html", seen(self.saved)),
            Route("/s/{handle}/{act:str}", seen(self.act), methods=["POST"]),
            Route("/n/{path:path}", seen(self.past)),
        ]

    # -- who is there -------------------------------------------------------------------------

    def _seen(self, handler: Handler) -> Callable[[Request], Awaitable[Response]]:
        """For those who are signed in; whatever may not be seen is not there."""

        async def answer(request: Request) -> Response:
            try:
                visitor = await self._visitors.who(request.cookies.get(COOKIE))
                if visitor is None or not visitor.may("sandboxes:read"):
                    if request.method == "GET" and request.url.path == "/":
                        return await self.enter(request)
                    return PlainTextResponse("Sign in first.", 401)
                if request.method != "GET" and "origin" not in request.headers:
                    return PlainTextResponse("Invalid Origin header", 403)
                if seconds := math.ceil(self._wait(visitor.owner)):
                    says = f"Too many requests: come again in {seconds} s."
                    return PlainTextResponse(says, 429, {"Retry-After": str(seconds)})
                return await handler(request, visitor)
            except NotFound:
                return self._page("missing.html", 404)
            except SeerError as error:
                return self._page("trouble.html", 409, says=str(error))

        return answer

    async def enter(self, request: Request) -> Response:
        given = ""
        if request.method == "POST":
            if "origin" not in request.headers:
                return PlainTextResponse("Invalid Origin header", 403)
            if int(request.headers.get("content-length") or FORM_BYTES + 1) > FORM_BYTES:
                return PlainTextResponse("Too large", 413)
            try:
                async with request.form(max_files=0, max_fields=2) as form:
                    given = str(form.get("token") or "")
            except ClientDisconnect:
                return PlainTextResponse("Nothing came", 400)
        elif self._once is not None and (once := request.query_params.get("once")):
            given = self._once.exchange(once) or "used"
        if not given:
            return self._page("enter.html", 401 if request.url.path == "/" else 200, wrong=False)
        cookie = await self._visitors.enter(given)
        if cookie is None:
            return self._page("enter.html", 401, wrong=True)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE,
            cookie,
            max_age=HOURS * 3600,
            httponly=True,
            samesite="strict",
            secure=self._secure,
        )
        return answer

    async def leave(self, request: Request) -> Response:
        self._visitors.leave(request.cookies.get(COOKIE))
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(COOKIE)
        return answer

    # -- what is shown ------------------------------------------------------------------------

    async def static(self, request: Request) -> Response:
        text, kind = self._static.get(request.path_params["name"], ("", ""))
        return Response(text, 200 if kind else 404, media_type=kind or "text/plain")

    async def overview(self, request: Request, visitor: Visitor) -> Response:
        cards = await self._source.cards(visitor.owner)
        home = self._source.home(visitor.owner)
        live = {card.notebook for card in cards if card.live and card.notebook}
        past = await asyncio.to_thread(finished, home, live)
        shown = [{"path": path, "url": quote(path), "when": day(when)} for path, when in past]
        return self._page("overview.html", cards=cards, past=shown, who=visitor.owner)

    async def cards(self, request: Request, visitor: Visitor) -> Response:
        """The list alone, for a page that is open."""
        return self._page("cards.html", cards=await self._source.cards(visitor.owner))

    async def notebook(self, request: Request, visitor: Visitor) -> Response:
        card = await self._source.card(request.path_params["handle"], visitor.owner)
        cells = await self._cells(card)
        return self._page(
            "notebook.html",
            title=card.name,
            card=card,
            cells=cells,
            live=card.live,
            acts=self._source.acts and card.mine and card.live and visitor.may("sandboxes:write"),
            shares=self._source.acts and card.mine and visitor.may("sandboxes:write"),
        )

    async def past(self, request: Request, visitor: Visitor) -> Response:
        path = notebook_in(self._source.home(visitor.owner), request.path_params["path"])
        if "download" in request.query_params:
            return as_file(path.read_bytes(), path.name, "application/x-ipynb+json")
        cells = await asyncio.to_thread(readable, path)
        if "html" in request.query_params:
            return self._file(path.stem, cells)
        return self._page(
            "notebook.html",
            title=path.stem,
            card=None,
            cells=cells,
            live=False,
            acts=False,
            shares=False,
        )

    async def download(self, request: Request, visitor: Visitor) -> Response:
        card = await self._source.card(request.path_params["handle"], visitor.owner)
        if card.notebook is None:
            raise NotFound("notebook", card.handle, [])
        return as_file(card.notebook.read_bytes(), card.notebook.name, "application/x-ipynb+json")

    async def saved(self, request: Request, visitor: Visitor) -> Response:
        """The notebook as one HTML file that needs nothing else."""
        card = await self._source.card(request.path_params["handle"], visitor.owner)
        return self._file(card.name, await self._cells(card))

    def _file(self, title: str, cells: list[CellHtml]) -> Response:
        template = self._templates.get_template("saved.html")
        text = template.render(title=title, cells=cells, style=self._static["watch.css"][0])
        answer = as_file(text.encode(), f"{title}.html", "text/html; charset=utf-8")
        answer.headers["Content-Security-Policy"] = FILE_POLICY
        return answer

    async def act(self, request: Request, visitor: Visitor) -> Response:
        handle, act = request.path_params["handle"], request.path_params["act"]
        if not visitor.may("sandboxes:write"):
            return PlainTextResponse("This token may only look.", 403)
        does: dict[str, Callable[[], Awaitable[None]]] = {
            "interrupt": lambda: self._source.interrupt(handle, visitor.owner),
            "stop": lambda: self._source.stop(handle, visitor.owner),
            "share": lambda: self._source.share(handle, visitor.owner, True),
            "unshare": lambda: self._source.share(handle, visitor.owner, False),
        }
        if act not in does:
            raise NotFound("action", act, list(does))
        await does[act]()
        return RedirectResponse(f"/s/{quote(handle)}", 303)

    async def events(self, request: Request, visitor: Visitor) -> Response:
        await self._source.card(request.path_params["handle"], visitor.owner)
        if self._open >= STREAMS:
            return PlainTextResponse("Too many pages are open.", 503, {"Retry-After": "30"})
        return EventSourceResponse(self._growing(request), ping=15, send_timeout=30)

    async def _growing(self, request: Request) -> AsyncIterator[dict[str, str]]:
        """What changes in a notebook: its cells, their order, and the state of the sandbox."""
        self._open += 1
        known: dict[str, str] = {}
        order: list[str] = []
        stamp: Any = None
        status = ""
        try:
            while True:
                visitor = await self._visitors.who(request.cookies.get(COOKIE))
                if visitor is None:
                    return
                card = await self._source.card(request.path_params["handle"], visitor.owner)
                now = f"{card.state}|{card.detail}"
                if now != status:
                    status = now
                    yield sent("state", {"state": card.state, "detail": card.detail})
                checked = time.monotonic()
                while time.monotonic() - checked < CHECK_SECONDS:
                    if (seen := stamp_of(card.notebook)) != stamp:
                        stamp = seen
                        cells = await self._cells(card)
                        for cell in cells:
                            if known.get(cell.id) != cell.version:
                                known[cell.id] = cell.version
                                yield sent("cell", {"id": cell.id, "html": cell.html})
                        if [cell.id for cell in cells] != order:
                            order = [cell.id for cell in cells]
                            known = {id: known[id] for id in order}
                            yield sent("order", order)
                        break  # and say at once whether it still runs
                    await asyncio.sleep(LOOK_SECONDS)
                if not card.live:
                    yield sent("over", {})
                    return
        except SeerError:  # it is no longer there, or no longer shared
            yield sent("over", {})
        finally:
            self._open -= 1

    async def _cells(self, card: Card) -> list[CellHtml]:
        return await asyncio.to_thread(readable, card.notebook) if card.notebook else []

    def _page(self, name: str, status: int = 200, **given: Any) -> HTMLResponse:
        text = self._templates.get_template(name).render(**given)
        return HTMLResponse(text, status, {"Content-Security-Policy": POLICY})


def readable(path: Path) -> list[CellHtml]:
    """The cells of a notebook; none if its file cannot be read just now."""
    try:
        return read_cells(path)
    except (OSError, ValueError, RecursionError):
        return []


def stamp_of(path: Path | None) -> Any:
    try:
        info = path.stat() if path else None
    except OSError:
        return None
    return (info.st_ino, info.st_mtime_ns, info.st_size) if info else None


def sent(event: str, data: Any) -> dict[str, str]:
    return {"event": event, "data": json.dumps(data)}


def as_file(data: bytes, name: str, kind: str) -> Response:
    disposition = f"attachment; filename*=UTF-8''{quote(name)}"
    return Response(data, media_type=kind, headers={"Content-Disposition": disposition})
