"""From a stream of deltas to an HTTP response: server-sent events, or one JSON body.

A reply is a pure object of one protocol: it turns deltas into bytes and knows no sockets. This file
does the input and output around it: it waits for the first delta before it sends a status, so that
a refused request is a plain HTTP error; it watches the connection, so that a vanished client ends
its request at once; and it closes the source of deltas on every path, which is what aborts.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from headrace.core.errors import Cancelled, HeadraceError
from headrace.core.messages import Delta
from headrace.frontend.validate import error_of
from headrace.server.errors import error_body, internal_error

log = logging.getLogger(__name__)

T = TypeVar("T")
Deltas = AsyncGenerator[tuple[int, Delta], None]
DONE = b"data: [DONE]\n\n"
SLOT = "\0slot\0"
# A client or proxy that hears nothing for longer may give up.
IDLE_SECONDS = 10.0


@runtime_checkable
class EventReply(Protocol):
    """A streamed answer of one protocol. Indices number the requests of the job."""

    def event(self, index: int, delta: Delta) -> bytes:
        """Events for one delta; may be empty."""

    def end(self) -> bytes:
        """Events after the last delta, before [DONE]."""


class WholeReply(Protocol):
    """An answer in one piece."""

    def add(self, index: int, delta: Delta) -> None:
        """Take in one delta."""

    def result(self) -> Any:
        """The JSON value, once every request has finished."""


def to_json(value: Any) -> bytes:
    """JSON bytes; NaN and infinities become null."""
    return orjson.dumps(value)


def event(value: Any) -> bytes:
    """One server-sent event with a JSON value."""
    return b"data: " + to_json(value) + b"\n\n"


def named_event(name: str, /, **fields: Any) -> bytes:
    """One server-sent event whose data repeats its name as `type`."""
    return b"event: %b\ndata: %b\n\n" % (name.encode(), to_json({"type": name, **fields}))


def split_event(value: Any) -> tuple[bytes, bytes]:
    """The bytes of an event before and after the last string `SLOT` in it.

    before + to_json(text) + after is the event with `text` there; the rest is encoded only once.
    """
    before, _, after = event(value).rpartition(to_json(SLOT))
    return before, after


def failure_event(error: HeadraceError) -> bytes:
    """The event with which a stream of an OpenAI or native route fails."""
    return event(error_body(error))


class Wire(NamedTuple):
    """How the stream of a protocol is framed: what `EventReply` does not say.

    `done` ends every stream; `failed` is what an error looks like once the status has been sent;
    `idle`, if any, is sent when there has been no news for a while.
    """

    media_type: str = "text/event-stream"
    done: bytes = DONE
    failed: Callable[[HeadraceError], bytes] = failure_event
    idle: bytes = b""


class EventStream(Response):
    """Sends the events of `reply` as `deltas` arrive; ends the request if the client leaves."""

    def __init__(
        self, deltas: Deltas, reply: EventReply, headers: Mapping[str, str], wire: Wire
    ) -> None:
        self.deltas = deltas
        self.reply = reply
        self.wire = wire
        self.media_type = wire.media_type
        self.status_code = 200
        self.background = None
        self.init_headers({**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(Cancelled):
            await until_disconnect(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        outlet = Outlet(send, self.raw_headers)
        alive = asyncio.ensure_future(outlet.keep_alive(self.wire.idle))
        try:
            async with aclosing(self.deltas) as deltas:
                tail = await self._write_events(deltas, outlet)
        finally:
            alive.cancel()
            await asyncio.gather(alive, return_exceptions=True)
        await outlet.write(tail + self.wire.done, more=False)

    async def _write_events(self, deltas: Deltas, outlet: "Outlet") -> bytes:
        """Write the events of all deltas; returns the last words."""
        try:
            async for index, delta in deltas:
                raise_failure(delta)
                if body := self.reply.event(index, delta):
                    await outlet.write(body)
            return self.reply.end()
        except HeadraceError as error:
            if not outlet.started:
                raise
            return self.wire.failed(error)
        except Exception:  # isolates one request: its client must get an answer
            if not outlet.started:
                raise
            log.exception("a stream failed")
            return self.wire.failed(internal_error())


class Outlet:
    """Writes pieces of one response, the status before the first."""

    def __init__(self, send: Send, raw_headers: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self._send = send
        self._headers = raw_headers
        self._lock = asyncio.Lock()
        self._quiet = True

    async def write(self, body: bytes, more: bool = True) -> None:
        """Send a piece; the last one without `more`."""
        self._quiet = False
        async with self._lock:
            if not self.started:
                self.started = True
                start = {"type": "http.response.start", "status": 200, "headers": self._headers}
                await self._send(start)
            await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def keep_alive(self, sign: bytes) -> None:
        """Send `sign`, unless it is empty, whenever nothing has been written for a while."""
        while sign:
            self._quiet = True
            await asyncio.sleep(IDLE_SECONDS)
            if self._quiet:
                await self.write(sign)


async def whole(receive: Receive, deltas: Deltas, reply: WholeReply) -> Any:
    """The result of `reply` once `deltas` end.

    Raises:
        Cancelled: the client left first; its requests are aborted.
        HeadraceError: a request failed; the others of the job are aborted.
    """
    return await until_disconnect(receive, collect(deltas, reply))


async def collect(deltas: Deltas, reply: WholeReply) -> Any:
    """`whole`, for an answer that nobody waits for on a connection."""
    async with aclosing(deltas):
        async for index, delta in deltas:
            raise_failure(delta)
            reply.add(index, delta)
    return reply.result()


def raise_failure(delta: Delta) -> None:
    """Raise the HeadraceError with which a request ended, if it did; a client's abort is none."""
    if delta.finish is not None and (error := error_of(delta.finish)) is not None:
        raise error


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`, but cancel it when the client goes away. The request body has been read before.

    Raises:
        Cancelled: the client went away.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Cancelled("The client closed the connection.")
        return task.result()
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
