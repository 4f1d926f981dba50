"""/v1/files and /v1/batches, OpenAI's: the routes around the store and the runner of batches."""

import re
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response

from headrace.core.errors import BadRequest, Unsupported
from headrace.core.tenant import caller, is_mine
from headrace.server.admin import json_response
from headrace.server.batch_db import BatchDb, missing
from headrace.server.batches import ENDPOINTS, BatchRunner, new_batch
from headrace.server.context import Context
from headrace.server.generation import read_raw, take
from headrace.server.ignored import warnings
from headrace.server.schemas import body_of, ignored_fields, read

_SECONDS = {"m": 60, "h": 3600, "d": 86400}
MAX_WINDOW = 14 * 86400


class Expiry(BaseModel):
    """When files are forgotten."""

    model_config = ConfigDict(extra="allow")

    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=1, le=2**31 - 1)]


class BatchRequest(BaseModel):
    """POST /v1/batches."""

    model_config = ConfigDict(extra="allow")

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: Expiry | None = None


def routes(context: Context, db: BatchDb | None, runner: BatchRunner | None) -> APIRouter:
    """Both groups; without a store every route says how to get one."""
    router = APIRouter()
    if db is None or runner is None:
        _add_refusals(router)
    else:
        _add_files(router, context, db)
        _add_batches(router, context, db, runner)
    return router


def _add_refusals(router: APIRouter) -> None:
    async def off(rest: str = "") -> Response:
        raise Unsupported("Files and batches are off; start the server with --batch-store FILE.")

    for path in ("/v1/files", "/v1/files/{rest:path}", "/v1/batches", "/v1/batches/{rest:path}"):
        router.add_api_route(path, off, methods=["GET", "POST", "DELETE"], include_in_schema=False)


def _add_files(router: APIRouter, context: Context, db: BatchDb) -> None:
    @router.post("/v1/files")
    async def upload(http: Request) -> Response:
        """Store a file: multipart/form-data with `file` and `purpose`."""
        form = await _read_form(http, context.config.serve.max_request_bytes)
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise BadRequest("file: must be a file", field="file")
        if not isinstance(purpose, str) or not purpose:
            raise BadRequest("purpose: must be given", field="purpose")
        name, content = file.filename or "file", await file.read()
        seconds, tag = _expiry_of(form), caller.get().tag
        return json_response(await db.call(db.add_file, name, purpose, content, seconds, tag))

    @router.get("/v1/files")
    async def files(purpose: str | None = None) -> Response:
        """All files, newest first."""
        return json_response(
            _list(await db.call(db.files, purpose, caller.get().tag), has_more=False)
        )

    @router.get("/v1/files/{id}")
    async def file(id: str) -> Response:
        return json_response(await db.call(db.file, _mine("File", id)))

    @router.get("/v1/files/{id}/content")
    async def content(id: str) -> Response:
        """The bytes of a file."""
        return Response(
            await db.call(db.content, _mine("File", id)), media_type="application/octet-stream"
        )

    @router.delete("/v1/files/{id}")
    async def delete(id: str) -> Response:
        await db.call(db.delete_file, _mine("File", id))
        return json_response({"id": id, "object": "file", "deleted": True})


async def _read_form(http: Request, limit: int) -> FormData:
    if not http.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequest("Content-Type must be multipart/form-data.")
    raw = await read_raw(http, limit)

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield raw

    try:
        return await MultiPartParser(http.headers, pieces(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError) as error:
        raise BadRequest(f"The form cannot be read: {error}") from None


def _expiry_of(form: FormData) -> int | None:
    given = form.get("expires_after[seconds]")
    if given is None:
        return None
    if not isinstance(given, str) or not given.isdecimal() or not 1 <= int(given) < 2**31:
        raise BadRequest("expires_after: seconds must be a positive number", field="expires_after")
    return int(given)


def _add_batches(router: APIRouter, context: Context, db: BatchDb, runner: BatchRunner) -> None:
    @router.post("/v1/batches", openapi_extra=body_of(BatchRequest))
    async def create(http: Request) -> Response:
        """Run the requests of a file when there is time."""
        body = await take(http, context, lambda raw: read(BatchRequest, raw))
        headers = warnings(ignored_fields(body), strict=context.config.serve.strict_fields)
        if body.endpoint not in ENDPOINTS:
            raise BadRequest(f"endpoint: must be one of {', '.join(ENDPOINTS)}", field="endpoint")
        await db.call(db.file, _mine("File", body.input_file_id))
        after = body.output_expires_after
        more = {
            "metadata": body.metadata,
            "output_expires_after": after.model_dump() if after else None,
        }
        seconds = _window(body.completion_window)
        batch = new_batch(body.input_file_id, body.endpoint, body.completion_window, seconds, more)
        await db.call(db.add_batch, batch)
        runner.submit(batch["id"])
        return json_response(batch, headers)

    @router.get("/v1/batches")
    async def batches(after: str | None = None, limit: int = Query(20, ge=1, le=100)) -> Response:
        """All batches, newest first."""
        found, has_more = await db.call(db.batches, after, limit, caller.get().tag)
        return json_response(_list(found, has_more))

    @router.get("/v1/batches/{id}")
    async def batch(id: str) -> Response:
        return json_response(await db.call(db.batch, _mine("Batch", id)))

    @router.post("/v1/batches/{id}/cancel")
    async def cancel(id: str) -> Response:
        """Start no more requests of a batch; what is done stays in its files."""
        found = await db.call(_cancelling, db, _mine("Batch", id))
        runner.stop(id)
        return json_response(found)


def _mine(kind: str, id: str) -> str:
    """The id, if the caller made what has it. Raises NotFound, as if there were nothing."""
    if not is_mine(id):
        missing(kind, id)
    return id


def _cancelling(db: BatchDb, id: str) -> dict[str, Any]:
    status = db.batch(id)["status"]
    if status not in ("validating", "in_progress", "finalizing"):
        raise BadRequest(f"A batch that is {status} cannot be cancelled.", field="id")
    return db.update(id, status="cancelling", cancelling_at=db.now())


def _window(text: str) -> int:
    """Seconds of a completion window like 24h or 30m."""
    match = re.fullmatch(r"(\d{1,6})([mhd])", text)
    seconds = int(match[1]) * _SECONDS[match[2]] if match else 0
    if not 1 <= seconds <= MAX_WINDOW:
        raise BadRequest(
            "completion_window: must be a time like 24h, 30m or 2d, 14d at most",
            field="completion_window",
        )
    return seconds


def _list(items: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {}
    none = {"first_id": None, "last_id": None}
    return {"object": "list", "data": items, "has_more": has_more, **none, **ends}
