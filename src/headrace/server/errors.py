"""Errors as HTTP answers: one JSON shape for each protocol, and never the text of a bug.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}            OpenAI, native
    {"type": "error", "error": {"type": ..., "message": ...}, "request_id": ...}   Anthropic
    {"error": "..."}                                                               Ollama

The path decides. A wrong request is 400, never 422. Messages of unexpected exceptions go to the
log, not to the client.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from headrace.core.errors import (
    BadRequest,
    HeadraceError,
    NotFound,
    TooLong,
    Unauthorized,
    Unsupported,
)

RETRY_AFTER_SECONDS = 1
# The names under which the OpenAI routes know fields of the native protocol.
_OPENAI_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "logprob_start_len": "logprobs",
}
_ROUTE_NAMES = {
    "/v1/completions": {**_OPENAI_NAMES, "top_logprobs_num": "logprobs", "input_ids": "prompt"},
    "/v1/chat/completions": {
        **_OPENAI_NAMES,
        "top_logprobs_num": "top_logprobs",
        "input_ids": "messages",
    },
    "/v1/responses": {
        **_OPENAI_NAMES,
        "max_new_tokens": "max_output_tokens",
        "top_logprobs_num": "top_logprobs",
        "input_ids": "input",
    },
    "/v1/messages": {**_OPENAI_NAMES, "stop": "stop_sequences", "input_ids": "messages"},
    "/api/chat": {"max_new_tokens": "num_predict", "input_ids": "messages"},
    "/api/generate": {"max_new_tokens": "num_predict", "input_ids": "prompt"},
}
_KINDS = {400: BadRequest, 401: Unauthorized, 404: NotFound}


class TooLarge(BadRequest):
    """The request body has more bytes than --max-request-bytes."""

    status = 413
    code = "request_too_large"


def internal_error() -> HeadraceError:
    """What a client is told of an exception nobody foresaw."""
    return HeadraceError("Internal server error; the log of the server has the details.")


def error_body(error: HeadraceError) -> dict[str, Any]:
    """The JSON object that describes `error`."""
    return {
        "error": {
            "message": error.message,
            "type": error.kind,
            "param": error.field,
            "code": error.code,
        }
    }


def anthropic_body(error: HeadraceError) -> dict[str, Any]:
    """`error` as Anthropic's clients read it; agents look for "prompt is too long"."""
    kind = _ANTHROPIC_KINDS.get(error.status, "api_error")
    if isinstance(error, Unsupported):
        kind = "invalid_request_error"
    message = error.message
    if isinstance(error, TooLong):
        message = f"prompt is too long: {message}"
    detail = {"type": kind, "message": message, "param": error.field, "code": error.code}
    return {"type": "error", "error": detail, "request_id": None}


_ANTHROPIC_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def ollama_body(error: HeadraceError) -> dict[str, Any]:
    """`error` as Ollama's clients read it."""
    return {"error": error.message}


def _body_of(path: str) -> Callable[[HeadraceError], dict[str, Any]]:
    if path.startswith("/v1/messages"):
        return anthropic_body
    return ollama_body if path.startswith("/api/") else error_body


def error_response(error: HeadraceError, path: str = "") -> Response:
    """`error` as a complete HTTP response of the route `path`."""
    # Clients retry every 5xx; asking again for what is not built does not help.
    status = 400 if isinstance(error, Unsupported) else error.status
    headers = {}
    if error.status in (429, 503):
        headers["retry-after"] = str(math.ceil(error.retry_after or RETRY_AFTER_SECONDS))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    if error.status == 413:
        headers["connection"] = "close"  # the rest of the body is not read
    return Response(
        orjson.dumps(_body_of(path)(error)),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def explain(problems: Sequence[Any]) -> BadRequest:
    """The first wrong field of a request, as a sentence that names it and the limit.

    `problems` are pydantic's. A field that may have several types has one problem per type; all of
    them are told.
    """
    name = _field(problems[0]["loc"])
    top = name.split("[")[0].split(".")[0]
    reasons: list[str] = []
    for problem in problems[:20]:
        if _field(problem["loc"]).split("[")[0].split(".")[0] == top:
            reason = str(problem["msg"]).removeprefix("Value error, ")
            if reason not in reasons:
                reasons.append(reason)
    text = " or ".join(reasons).replace(" or Input should be", " or")
    return BadRequest(f"{name}: {text}" if name else text, field=top or None)


def _field(location: tuple[int | str, ...]) -> str:
    """("prompt", "list[int]", 3) -> "prompt[3]": without the names of union branches."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in _TYPE_NAMES:
            path += f".{part}" if path else part
    return path


_TYPE_NAMES = {"str", "int", "float", "bool", "dict", "list", "body", "query", "none"}


def _renamed(error: HeadraceError, names: dict[str, str]) -> HeadraceError:
    """The error in the words of the route that the client called."""
    if not isinstance(error, BadRequest):
        return error
    renamed = type(error)(error.message, field=names.get(error.field or "", error.field))
    renamed.code = error.code
    for native, name in names.items():
        renamed.message = renamed.message.replace(native, name)
    return renamed


def install(app: FastAPI) -> None:
    """Answer every exception of a route in the shape of this module."""

    async def known(request: Request, error: HeadraceError) -> Response:
        path = request.url.path
        return error_response(_renamed(error, _ROUTE_NAMES.get(path, {})), path)

    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(explain(error.errors()), request.url.path)

    async def http(request: Request, error: HTTPException) -> Response:
        known_as = _KINDS.get(error.status_code, HeadraceError)(str(error.detail))
        known_as.status = error.status_code
        if error.status_code == 405:
            known_as.kind = "MethodNotAllowedError"
        response = error_response(known_as, request.url.path)
        response.headers.update(error.headers or {})
        return response

    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)

    async def bug(request: Request, error: Exception) -> Response:
        return error_response(internal_error(), request.url.path)

    handlers: dict[Any, Any] = {
        HeadraceError: known,
        RequestValidationError: invalid,
        HTTPException: http,
        ClientDisconnect: gone,
        Exception: bug,
    }
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
