"""The API key: every route asks for it, except the few named here. A plain ASGI middleware."""

import hmac
from collections.abc import Iterator

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.core.errors import Unauthorized
from headrace.server.errors import error_response

OPEN_PATHS = frozenset(
    ("/", "/health", "/health_generate", "/livez", "/readyz", "/ready", "/ping", "/metrics", "/ui")
)
# The files of the web page, which then asks its user for the key.
OPEN_FOLDER = "/ui/static/"


class RequireApiKey:
    """Lets through `Authorization: Bearer <key>` or `x-api-key: <key>` (Anthropic's clients), open
    paths and CORS preflights."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = Unauthorized("A valid API key is needed: Authorization: Bearer <key>.")
            error.code = "invalid_api_key"
            await error_response(error, scope["path"])(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allows(self, scope: Scope) -> bool:
        if scope["type"] == "http" and (
            scope["path"] in OPEN_PATHS
            or scope["path"].startswith(OPEN_FOLDER)
            or scope["method"] == "OPTIONS"
        ):
            return True
        return any(hmac.compare_digest(key, self._key) for key in _keys(scope))


def _keys(scope: Scope) -> Iterator[bytes]:
    """The keys that a request brings."""
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            yield value
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield key
