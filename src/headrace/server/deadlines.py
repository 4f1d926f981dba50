"""How long a client wants to wait, in headers of any route:

    x-request-timeout: 30    seconds to the end of the answer
    x-ttft-timeout: 2.5      seconds to its first token

What takes longer ends with 503 and gives its room to others. A plain ASGI middleware.
"""

import math

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.core.deadline import Deadline, deadline
from headrace.core.errors import BadRequest
from headrace.server.errors import error_response

_NAMES = {b"x-request-timeout": 0, b"x-ttft-timeout": 1}
_MOST = 86400.0


class ReadDeadlines:
    """Passes the headers on in `core.deadline.deadline`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        seconds = [0.0, 0.0]
        if scope["type"] == "http":
            for name, value in scope["headers"]:
                if name in _NAMES:
                    try:
                        seconds[_NAMES[name]] = read_seconds(name.decode(), value)
                    except BadRequest as error:
                        await error_response(error, scope["path"])(scope, receive, send)
                        return
        if not any(seconds):
            await self._app(scope, receive, send)
            return
        token = deadline.set(Deadline(*seconds))
        try:
            await self._app(scope, receive, send)
        finally:
            deadline.reset(token)


def read_seconds(name: str, value: bytes) -> float:
    """The number in a header.

    Raises:
        BadRequest: it is no number of seconds.
    """
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0.001 <= seconds <= _MOST:
        shown = value[:40].decode("latin1")
        raise BadRequest(f"{name} must be 0.001 to {_MOST:.0f} seconds, not {shown!r}", field=name)
    return seconds
