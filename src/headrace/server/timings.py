"""What HTTP knows of a call's time: when it came, which trace it belongs to, when it was answered.

A plain ASGI middleware around all routes. A client that sends `x-headrace-timings: 1` gets the
timings of its requests back: in the body where a protocol has a place for them, and in a header of
the same name on every answer that is not a stream.
"""

import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from headrace.frontend.observer import CALL, Call, Observer
from headrace.server.sse import to_json

HEADER = "x-headrace-timings"
_OFF = (b"", b"0", b"false", b"no")
_TRACE = (b"traceparent", b"tracestate")
# A batch of many prompts does not fit into a header.
_MOST = 16


class Timings:
    """Opens a call for each HTTP request and closes it when the last byte is out."""

    def __init__(self, app: ASGIApp, observer: Observer) -> None:
        self._app = app
        self._observer = observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = call_of(scope)
        token = CALL.set(call)
        try:
            await self._app(scope, receive, telling(call, send) if call.wants else send)
        finally:
            CALL.reset(token)
            call.over = True
            self._observer.close(call)


def call_of(scope: Scope) -> Call:
    """The call that a request's headers describe."""
    wants, trace = False, {}
    for name, value in scope["headers"]:
        if name in _TRACE:
            trace[name.decode()] = value.decode("latin-1")
        elif name == HEADER.encode():
            wants = value.lower() not in _OFF
    return Call(time.monotonic(), wants, trace)


def telling(call: Call, send: Send) -> Send:
    """`send`, with the timings known by then in the head of the answer."""

    async def tell(message: Message) -> None:
        if message["type"] == "http.response.start" and call.seen:
            found: list[dict[str, Any]] = [one.timeline.to_wire() for one in call.seen[:_MOST]]
            value = to_json(found[0] if len(found) == 1 else found)
            message["headers"] = [*message.get("headers", ()), (HEADER.encode(), value)]
        await send(message)

    return tell
