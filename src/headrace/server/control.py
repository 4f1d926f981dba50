"""Routes for operators: pause, sessions, profiles, logging, a slow server for tests of clients.

Bodies are optional where every field has a default. Everything is asked of the scheduler through
`headrace.frontend.control`; only the log of requests belongs to this process.
"""

import gc
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse, Response

from headrace.core.errors import BadRequest, Unsupported
from headrace.frontend import control
from headrace.server.admin import json_response
from headrace.server.context import Context
from headrace.server.generation import read_body
from headrace.server.ignored import warnings
from headrace.server.schemas import Count, body_of, ignored_fields, read

Body = TypeVar("Body", bound=BaseModel)
Step = Annotated[int, Field(ge=1, le=2**31)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class PauseBody(BaseModel):
    """POST /pause_generation."""

    model_config = ConfigDict(extra="allow")

    mode: Literal["abort", "retract", "in_place"] = "abort"


class ContinueBody(BaseModel):
    """POST /continue_generation."""

    model_config = ConfigDict(extra="allow")


class DrainBody(BaseModel):
    """POST /drain: `on: false` takes requests again; `timeout` in seconds."""

    model_config = ConfigDict(extra="allow")

    on: bool = True
    timeout: Annotated[float, Field(ge=0.0, le=3600.0, allow_inf_nan=False)] | None = None


class OpenSessionBody(BaseModel):
    """POST /open_session. The capacity bounds the tokens of a prompt with what came before it."""

    model_config = ConfigDict(extra="allow")

    capacity_of_str_len: Count | None = None
    session_id: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    timeout: Annotated[float, Field(gt=0.0, le=1e9, allow_inf_nan=False)] | None = None
    streaming: bool | None = None


class CloseSessionBody(BaseModel):
    """POST /close_session."""

    model_config = ConfigDict(extra="allow")

    session_id: Annotated[str, Field(min_length=1, max_length=256)]


class ProfileBody(BaseModel):
    """POST /start_profile. The trace has scheduler steps whatever `activities` says."""

    model_config = ConfigDict(extra="allow")

    start_step: Step | None = None
    num_steps: Step | None = None
    profile_id: Annotated[str, Field(max_length=64)] | None = None
    profile_prefix: Annotated[str, Field(max_length=64)] | None = None
    output_dir: str | None = None


class SlowDownBody(BaseModel):
    """POST /slow_down: seconds to sleep after each step; null or 0 ends it."""

    model_config = ConfigDict(extra="allow")

    forward_sleep_time: Seconds | None = None


class LoggingBody(BaseModel):
    """POST /configure_logging; what is left out stays as it is."""

    model_config = ConfigDict(extra="allow")

    log_requests: bool | None = None
    log_requests_level: Annotated[int, Field(ge=0, le=3)] | None = None
    log_requests_format: Literal["text", "json"] | None = None
    log_level: Literal["debug", "info", "warning", "error"] | None = None
    dump_requests_folder: str | None = None
    crash_dump_folder: str | None = None


SETTINGS = ("log_requests", "log_requests_level", "log_requests_format", "log_level")
BODIES = (
    PauseBody,
    ContinueBody,
    DrainBody,
    OpenSessionBody,
    CloseSessionBody,
    ProfileBody,
    SlowDownBody,
    LoggingBody,
)


def routes(context: Context) -> APIRouter:
    """All of them."""
    router = APIRouter()
    for add in (_add_pause, _add_sessions, _add_profile, _add_logging, _add_tests):
        add(router, context)
    return router


async def _read(http: Request, context: Context, kind: type[Body]) -> tuple[Body, dict[str, str]]:
    """The body, checked, and the headers that name fields without effect."""
    context.check_ready()
    raw = await read_body(http, context.config.serve, any_type=True)
    body = read(kind, raw or b"{}")
    return body, warnings(ignored_fields(body), strict=context.config.serve.strict_fields)


def _add_pause(router: APIRouter, context: Context) -> None:
    @router.post("/pause_generation", openapi_extra=body_of(PauseBody))
    async def pause_generation(http: Request) -> Response:
        """Let nobody run until /continue_generation; requests that come wait."""
        body, headers = await _read(http, context, PauseBody)
        reply = await control.pause(context.manager, body.mode)
        return json_response({"status": "ok", "message": reply.message, **reply.data}, headers)

    @router.post("/continue_generation", openapi_extra=body_of(ContinueBody))
    async def continue_generation(http: Request) -> Response:
        """The end of a pause."""
        _, headers = await _read(http, context, ContinueBody)
        reply = await control.go_on(context.manager)
        return json_response({"status": "ok", "message": reply.message}, headers)

    @router.post("/drain", openapi_extra=body_of(DrainBody))
    async def drain(http: Request) -> Response:
        """Take no more requests; answers when the last one has ended, or the time is over."""
        body, headers = await _read(http, context, DrainBody)
        if not body.on:
            await control.take_again(context.manager)
            return json_response({"status": "ok", "draining": False, "left": 0}, headers)
        limit = context.config.serve.drain_timeout if body.timeout is None else body.timeout
        left = await control.drain(context.manager, limit)
        return json_response({"status": "ok", "draining": True, "left": left}, headers)


def _add_sessions(router: APIRouter, context: Context) -> None:
    @router.get("/open_session", include_in_schema=False)
    @router.post("/open_session", openapi_extra=body_of(OpenSessionBody))
    async def open_session(http: Request) -> Response:
        """A new session; answers with its id."""
        body, headers = await _read(http, context, OpenSessionBody)
        if body.streaming:
            raise Unsupported("streaming: streaming sessions are not supported", field="streaming")
        capacity = body.capacity_of_str_len or 0
        id = await control.open_session(context.manager, capacity, body.session_id, body.timeout)
        return json_response(id, headers)

    @router.get("/close_session", include_in_schema=False)
    @router.post("/close_session", openapi_extra=body_of(CloseSessionBody))
    async def close_session(http: Request) -> Response:
        """Forget a session."""
        body, headers = await _read(http, context, CloseSessionBody)
        await control.close_session(context.manager, body.session_id)
        return Response(status_code=200, headers=headers)


def _add_profile(router: APIRouter, context: Context) -> None:
    @router.get("/start_profile", include_in_schema=False)
    @router.post("/start_profile", openapi_extra=body_of(ProfileBody))
    async def start_profile(http: Request) -> Response:
        """Record the scheduler's steps into a file of --profile-dir, for Perfetto."""
        body, headers = await _read(http, context, ProfileBody)
        if body.output_dir not in (None, context.config.observe.profile_dir):
            raise BadRequest(
                "output_dir: a client does not choose where files go; leave it out and start the "
                "server with --profile-dir",
                field="output_dir",
            )
        name = "-".join(filter(None, (body.profile_prefix, body.profile_id)))
        reply = await control.start_profile(context.manager, name, body.start_step, body.num_steps)
        return PlainTextResponse(reply.message + "\n", headers=headers)

    @router.get("/stop_profile", include_in_schema=False)
    @router.post("/stop_profile")
    async def stop_profile() -> Response:
        """End the recording; answers when the trace is written."""
        context.check_ready()
        reply = await control.stop_profile(context.manager)
        return PlainTextResponse(reply.message + "\n")


def _add_logging(router: APIRouter, context: Context) -> None:
    @router.get("/configure_logging", include_in_schema=False)
    @router.post("/configure_logging", openapi_extra=body_of(LoggingBody))
    async def configure_logging(http: Request) -> Response:
        """Change the log of requests, and the log level."""
        body, headers = await _read(http, context, LoggingBody)
        for name in ("dump_requests_folder", "crash_dump_folder"):
            if getattr(body, name):
                raise Unsupported(f"{name}: requests are not written to files", field=name)
        if body.log_level is not None:
            control.expect(await context.manager.control("log_level", level=body.log_level))
        settings = body.model_dump(include=set(SETTINGS))
        context.manager.log.configure(**settings)
        context.manager.peers.tell_logging(settings)
        return Response(status_code=200, headers=headers)


def _add_tests(router: APIRouter, context: Context) -> None:
    @router.get("/slow_down", include_in_schema=False)
    @router.post("/slow_down", openapi_extra=body_of(SlowDownBody))
    async def slow_down(http: Request) -> Response:
        """Sleep after each step, to test clients with a slow server."""
        body, headers = await _read(http, context, SlowDownBody)
        reply = await context.manager.control("slow_down", seconds=body.forward_sleep_time)
        return PlainTextResponse(control.expect(reply).message + "\n", headers=headers)

    @router.get("/freeze_gc", include_in_schema=False)
    @router.post("/freeze_gc")
    async def freeze_gc() -> Response:
        """Let garbage collections skip what exists now, here and in the scheduler."""
        context.check_ready()
        reply = control.expect(await context.manager.control("freeze_gc"))
        gc.collect()
        gc.freeze()
        return PlainTextResponse(reply.message + "\n")
