"""Who may call what: one table gives every route its role; a route without one stops the start.

    open    everybody: is it alive, the files of the web page
    user    whoever has a key, if there are keys
    admin   with an admin key if there is one, else like user; on --admin-port if there is one

Keys are compared by digest in constant time. A path that is not in the table is refused like a
user's before anybody looks whether it exists. The caller goes on in `core.tenant.caller`.
"""

import re
from collections.abc import Iterable, Iterator
from enum import Enum
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from headrace.core.errors import BadRequest, Forbidden, HeadraceError, NotFound, Unauthorized
from headrace.core.serve_options import ServeOptions
from headrace.core.tenant import ANYONE, KeyRing, Tenant, caller, digest, read_keys
from headrace.server.errors import error_response


class Role(Enum):
    """Who may call a route."""

    OPEN = "open"
    USER = "user"
    ADMIN = "admin"


_OPEN = "/ /health /health_generate /livez /readyz /ready /ping /metrics /ui /ui/static/{name}"
_USER = """
/generate /encode /classify /rerank /tokenize /detokenize /invocations /abort_request
/open_session /close_session /parse_function_call /separate_reasoning
/v1/chat/completions /v1/completions /v1/embeddings /v1/score /v1/rerank /v2/rerank /v1/classify
/v1/tokenize /v1/detokenize /v1/messages /v1/messages/count_tokens
/v1/responses /v1/responses/{id} /v1/responses/{id}/cancel /v1/responses/{id}/input_items
/v1/files /v1/files/{id} /v1/files/{id}/content /v1/files/{rest:path}
/v1/batches /v1/batches/{id} /v1/batches/{id}/cancel /v1/batches/{rest:path}
/v1/models /v1/models/{model:path} /v1/loads /get_load
/model_info /get_model_info /server_info /get_server_info
/api/chat /api/generate /api/embed /api/embeddings /api/show /api/tags /api/ps /api/version
/openapi.json /docs /docs/oauth2-redirect /redoc
"""
_ADMIN = """
/flush_cache /pause_generation /continue_generation /drain /start_profile /stop_profile
/configure_logging /freeze_gc /slow_down /ui/events /debug/scheduler
/init_weights_send_group_for_remote_instance /send_weights_to_remote_instance
"""
ROLES: dict[str, Role] = {
    path: role
    for role, paths in ((Role.OPEN, _OPEN), (Role.USER, _USER), (Role.ADMIN, _ADMIN))
    for path in paths.split()
}
# Pages that this machine serves itself, and those of applications on it.
_LOCAL = (
    r"(https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?)|((app|file|tauri|vscode-webview)://.*)"
)
_PATTERNS = [
    (re.compile(re.sub(r"\{\w+\}", "[^/]+", re.sub(r"\{\w+:path\}", ".+", path))), role)
    for path, role in ROLES.items()
    if "{" in path
]


def check_roles(paths: Iterable[str]) -> None:
    """Every route has a role.

    Raises:
        RuntimeError: names the routes without one. The server must not start.
    """
    if missing := sorted(set(paths) - set(ROLES)):
        raise RuntimeError(f"routes without a role in headrace/server/access.py: {missing}")


def role_of(path: str) -> Role:
    """The role of a request's path; USER for paths that no route has."""
    role = ROLES.get(path)
    if role is None:
        role = next((role for pattern, role in _PATTERNS if pattern.fullmatch(path)), Role.USER)
    return role


def key_ring(serve: ServeOptions) -> KeyRing:
    """The keys of a server. Raises LoadError when --api-key-file is wrong."""
    named = read_keys(serve.api_key_file) if serve.api_key_file else []
    entries = [(entry.digest(), entry.tenant()) for entry in named]
    if serve.api_key:
        entries.append((digest(serve.api_key.reveal().encode()), ANYONE))
    if serve.admin_api_key:
        entries.append((digest(serve.admin_api_key.reveal().encode()), Tenant(admin=True)))
    return KeyRing(entries)


def allowed_origins(option: str) -> dict[str, Any]:
    """--allow-origins as CORSMiddleware takes it.

    Raises:
        BadRequest: something in the list is no origin.
    """
    if option == "local":
        return {"allow_origin_regex": _LOCAL}
    origins = [origin.strip().rstrip("/") for origin in option.split(",") if origin.strip()]
    for origin in origins:
        if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise BadRequest(
                f"--allow-origins: {origin!r} is no origin like https://example.org",
                field="allow_origins",
            )
    return {"allow_origins": origins}


class Guard:
    """The middleware: lets through `Authorization: Bearer <key>` or `x-api-key: <key>`
    (Anthropic's clients), open paths and CORS preflights."""

    def __init__(self, app: ASGIApp, keys: KeyRing, admin_port: int = 0) -> None:
        self._app = app
        self._keys = keys
        self._admin_port = admin_port

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        try:
            tenant = self._admit(scope)
        except HeadraceError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        token = caller.set(tenant)
        try:
            await self._app(scope, receive, send)
        finally:
            caller.reset(token)

    def _admit(self, scope: Scope) -> Tenant:
        """Who asks. Raises what is to be answered to those who may not."""
        role = role_of(scope["path"])
        if role is Role.OPEN or scope["method"] == "OPTIONS":
            return ANYONE
        if self._admin_port:
            self._check_port(scope, role)
        if self._keys.empty:
            return ANYONE
        tenant = next(filter(None, map(self._keys.owner, _keys(scope))), None)
        if tenant is None:
            error = Unauthorized("A valid API key is needed: Authorization: Bearer <key>.")
            error.code = "invalid_api_key"
            raise error
        if role is Role.ADMIN and self._keys.has_admin and not tenant.admin:
            raise Forbidden(f"{scope['path']} needs an admin key.")
        return tenant

    def _check_port(self, scope: Scope, role: Role) -> None:
        here = (scope.get("server") or ("", 0))[1] == self._admin_port
        if here != (role is Role.ADMIN):
            place = "another port" if here else "the admin port"
            raise NotFound(f"{scope['path']} is served on {place}.")


def _keys(scope: Scope) -> Iterator[bytes]:
    """The keys that a request brings."""
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            yield value
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield key
