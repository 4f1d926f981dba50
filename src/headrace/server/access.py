"""The API key: every route asks for it, except the few named here. A plain ASGI middleware."""

import hmac

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.core.errors import Unauthorized
from headrace.server.errors import error_response

OPEN_PATHS = frozenset(("/", "/health", "/health_generate", "/ready", "/metrics"))


class RequireApiKey:
    """Lets through `Authorization: Bearer <key>`, open paths and CORS preflights."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._key = key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._allows(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            error = Unauthorized("A valid API key is needed: Authorization: Bearer <key>.")
            error.code = "invalid_api_key"
            await error_response(error)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _allows(self, scope: Scope) -> bool:
        if scope["type"] == "http" and (
            scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS"
        ):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)
