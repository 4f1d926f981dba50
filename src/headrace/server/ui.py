"""The web page at /ui: its files, and the one stream of events that its dashboard listens to.

The files are read once and served from memory with an ETag; the page runs only its own scripts. All
watchers share one question to the scheduler per second, and nobody asks while nobody watches. Like
every route, the events need the API key if there is one; the page and its files do not.
"""

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response, StreamingResponse

from headrace import __version__
from headrace.core.errors import HeadraceError, NotFound, Overloaded
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.metrics.record import Histogram
from headrace.server.context import Context
from headrace.server.sse import event, failure_event

TYPES = {
    "html": "text/html",
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
}
SECONDS_BETWEEN = 1.0
MAX_WATCHERS = 32
_REMEMBERED = 512
_TIMEOUT = 10.0

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # ask, and hear 304: names do not change with their contents
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Asset(NamedTuple):
    """One file of the page."""

    body: bytes
    media_type: str
    etag: str


def read_assets() -> dict[str, Asset]:
    """The files of the page by name."""
    found = {}
    for path in files("headrace.server").joinpath("static").iterdir():
        body = path.read_bytes()
        kind = TYPES[path.name.rpartition(".")[2]]
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        found[path.name] = Asset(body, kind, tag)
    return found


def routes(context: Context) -> APIRouter:
    """The page, its files, its events."""
    router = APIRouter(include_in_schema=False)
    assets = read_assets()
    watch = Watch(context.manager, context.model_name)

    @router.get("/ui")
    async def page(http: Request) -> Response:
        return _send(assets["index.html"], http)

    @router.get("/ui/static/{name}")
    async def asset(name: str, http: Request) -> Response:
        if name not in assets:
            raise NotFound(f"/ui/static/{name}: no such file")
        return _send(assets[name], http)

    @router.get("/ui/events")
    async def events() -> Response:
        """What the dashboard shows, once a second, as server-sent events."""
        watch.check_room()
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(watch.events(), headers=headers, media_type="text/event-stream")

    return router


def _send(asset: Asset, http: Request) -> Response:
    headers = {**HEADERS, "ETag": asset.etag}
    if http.headers.get("if-none-match") == asset.etag:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)


class Watch:
    """Asks the scheduler for everybody who watches, and remembers the last steps."""

    def __init__(self, manager: TokenizerManager, model: str) -> None:
        self._manager = manager
        self._about = {"model": model, "version": __version__}
        self._watchers = 0
        self._steps: deque[list[float]] = deque(maxlen=_REMEMBERED)
        self._data: dict[str, Any] = {}
        self._asked_at = -SECONDS_BETWEEN
        self._asking = asyncio.Lock()

    def check_room(self) -> None:
        """Raise Overloaded when too many watch."""
        if self._watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} dashboards are open already.")

    async def events(self) -> AsyncIterator[bytes]:
        """One event a second with the steps that the watcher has not seen; ends with the service.

        While the server starts there is one event that says so; the page asks again.
        """
        self._watchers += 1
        seen = 0.0
        try:
            yield event({"status": "ready" if self._serves else "starting", **self._about})
            while self._serves:
                await self._refresh()
                fresh = [step for step in self._steps if step[0] > seen]
                seen = fresh[-1][0] if fresh else seen
                yield event({"status": "ready", **self._data, "steps": fresh})
                await asyncio.sleep(SECONDS_BETWEEN)
        except HeadraceError as error:
            yield failure_event(error)
        finally:
            self._watchers -= 1

    @property
    def _serves(self) -> bool:
        return self._manager.ready.is_set()

    async def _refresh(self) -> None:
        """Ask the scheduler, unless somebody just has."""
        async with self._asking:
            if time.monotonic() - self._asked_at < SECONDS_BETWEEN / 2:
                return
            since = int(self._steps[-1][0]) if self._steps else 0
            reply = await self._manager.control("watch", timeout=_TIMEOUT, since=since)
            self._asked_at = time.monotonic()
            data = dict(reply.data)
            self._steps.extend(data.pop("steps"))
            for node in data["tree"]:
                node[-1] = self._text(node[-1])
            metrics = await self._manager.peers.metrics(self._manager.metrics)
            self._data = {
                **data,
                "ttft": _histogram(metrics.time_to_first_token),
                "itl": _histogram(metrics.inter_token_latency),
            }

    def _text(self, ids: list[int]) -> str:
        """How a node of the tree begins, as text if there is a tokenizer."""
        tokenizer = self._manager.tokenizer
        return tokenizer.decode(ids, False) if tokenizer else " ".join(map(str, ids))


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {"bounds": histogram.bounds, "counts": histogram.counts}
