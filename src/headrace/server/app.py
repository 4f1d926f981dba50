"""The HTTP server's application: routes of every protocol around one TokenizerManager.

Order of the layers, outermost first: timings, CORS, access, deadlines, routes. Errors of all routes
have one shape (`errors`). Starts no processes and opens no sockets.
"""

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware

from headrace import __version__
from headrace.core.config import Config
from headrace.core.model_info import ModelInfo
from headrace.core.tenant import KeyRing
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.server import (
    admin,
    anthropic_messages,
    batch_routes,
    control,
    embeddings,
    errors,
    generation,
    instances,
    ollama,
    openai_responses,
    parsing,
    ranking,
    tokens,
    ui,
)
from headrace.server.access import Guard, allowed_origins, check_roles, key_ring
from headrace.server.anthropic_input import CountRequest, MessagesRequest
from headrace.server.batch_db import BatchDb
from headrace.server.batch_routes import BatchRequest
from headrace.server.batches import BatchRunner
from headrace.server.context import Context
from headrace.server.deadlines import ReadDeadlines
from headrace.server.ollama_input import ChatBody, GenerateBody, NameBody
from headrace.server.responses_input import ResponsesRequest
from headrace.server.schemas import SCHEMA_PATH, all_schemas
from headrace.server.timings import HEADER, Timings

# Every folder of routes. Files and batches are added apart: they have work to do beside.
PARTS = (
    generation,
    openai_responses,
    anthropic_messages,
    ollama,
    embeddings,
    ranking,
    tokens,
    parsing,
    admin,
    control,
    instances,
    ui,
)

# Bodies that `schemas` does not know, for the OpenAPI document.
BODIES = (
    ResponsesRequest,
    MessagesRequest,
    CountRequest,
    ChatBody,
    GenerateBody,
    NameBody,
    BatchRequest,
    *control.BODIES,
    *embeddings.BODIES,
    *instances.BODIES,
    *ranking.BODIES,
)


def build_app(manager: TokenizerManager, config: Config, info: ModelInfo) -> FastAPI:
    """The application. `config` is resolved; `manager` may still be loading (503 until ready).

    `app.state.work()` is to run as a task for as long as it serves.

    Raises:
        BadRequest: --preferred-sampling-params or --allow-origins is wrong.
        LoadError: --api-key-file or --batch-store cannot be read.
    """
    keys = key_ring(config.serve)
    context = Context.create(manager, config, info, started=int(time.time()))
    app = FastAPI(
        title="headrace",
        version=__version__,
        redirect_slashes=False,
        # FastAPI would open a span for every request if a tracer is installed.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    errors.install(app)
    batches, app.state.work = _batches(context, keys)
    routers = [part.routes(context) for part in PARTS] + [batches]
    for router in routers:
        app.include_router(router)
    paths = [getattr(route, "path", "") for r in (app.router, *routers) for route in r.routes]
    check_roles(filter(None, paths))
    app.add_middleware(ReadDeadlines)
    app.add_middleware(Guard, keys=keys, admin_port=config.serve.admin_port)
    app.add_middleware(
        CORSMiddleware,
        **allowed_origins(config.serve.allow_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["x-headrace-ignored", "x-request-id", "retry-after", HEADER],
    )
    app.add_middleware(Timings, observer=manager.observer)
    _describe_bodies(app)
    return app


def _batches(context: Context, keys: KeyRing) -> tuple[APIRouter, Callable[[], Awaitable[None]]]:
    """The routes of files and batches, and what the server has to run beside its routes.

    Raises:
        LoadError: --batch-store cannot be opened.
    """
    path = context.config.serve.batch_store
    db = BatchDb(path) if path else None
    runner = BatchRunner(context, db, keys) if db else None

    async def work() -> None:
        if db is None or runner is None:
            return
        try:
            await context.manager.ready.wait()
            await runner.run()
        finally:
            db.close()

    return batch_routes.routes(context, db, runner), work


def schemas_of(bodies: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """The definitions of bodies, for the OpenAPI document."""
    _, found = models_json_schema(
        [(body, "validation") for body in bodies], ref_template=SCHEMA_PATH
    )
    return dict(found["$defs"])


def _describe_bodies(app: FastAPI) -> None:
    """Add the bodies that routes read themselves to the OpenAPI document."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(all_schemas() | schemas_of(BODIES))
        return document

    app.openapi = described  # type: ignore[method-assign]
