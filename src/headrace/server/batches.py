"""Runs batches: each line of a file of requests becomes an ordinary request of low priority.

One batch after the other; a line starts only while no request of a client waits, and never more
than a few at once. What a line does wrong is its own result. Everything needed to go on is in the
store, so a restart repeats only lines that had no result yet.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import msgspec
import orjson

from headrace.core.errors import BadRequest, HeadraceError, Overloaded, Unsupported
from headrace.core.messages import GenerateRequest
from headrace.core.tenant import KeyRing, caller, new_id, tag_of
from headrace.server import openai_chat, openai_completions, openai_responses
from headrace.server.batch_db import BatchDb
from headrace.server.context import Context, Job, Stamp
from headrace.server.errors import error_body, internal_error
from headrace.server.generation import new_stamp
from headrace.server.ignored import warnings
from headrace.server.response_store import ResponseStore
from headrace.server.sse import EventReply, collect, to_json

log = logging.getLogger(__name__)

MAX_LINES = 50_000
_MAX_ERRORS = 100
_PAUSE_SECONDS = 0.05
# A busy server still starts a line now and then, so that a batch ends some day.
_PATIENCE_SECONDS = 5.0
_INT32 = 2**31 - 1
# Lines compete as a tenant of their own that gives way to those who wait for answers.
_BATCH, _BATCH_WEIGHT = "/batch", 0.01
_OFF = ResponseStore(0)

Parse = Callable[[bytes, Context, Stamp], Job]
# Endpoint -> how its bodies are read, and the prefix of its ids.
ENDPOINTS: dict[str, tuple[Parse, str]] = {
    "/v1/chat/completions": (openai_chat.parse, "chatcmpl-"),
    "/v1/completions": (openai_completions.parse, "cmpl-"),
    "/v1/responses": (
        lambda raw, context, stamp: openai_responses.parse(raw, context, _OFF, stamp).job,
        "resp_",
    ),
}


class Line(NamedTuple):
    """One request of a batch."""

    number: int
    custom_id: str
    body: bytes


class Problem(Exception):
    """A line of an input file that is no request."""

    def __init__(self, code: str, message: str, line: int | None) -> None:
        super().__init__(message)
        self.value = {"code": code, "message": message, "line": line, "param": None}


class BatchRunner:
    """The batches of one server. `run` works until it is cancelled."""

    def __init__(self, context: Context, db: BatchDb, keys: KeyRing) -> None:
        self._context = context
        self._keys = keys
        self._db = db
        self._waiting: asyncio.Queue[str] = asyncio.Queue()
        self._stopped: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._current = ""

    def submit(self, id: str) -> None:
        """Run a stored batch when it is its turn."""
        self._waiting.put_nowait(id)

    def stop(self, id: str) -> None:
        """Let the running lines of a batch go, and start no more."""
        self._stopped.add(id)
        if id == self._current:
            for task in self._tasks:
                task.cancel()

    async def run(self) -> None:
        """Take up what a former server left, then serve."""
        for id in await self._db.call(self._db.unfinished):
            self.submit(id)
        while True:
            self._current = await self._waiting.get()
            try:
                await self._process(self._current)
            except Exception:  # isolates one batch: the others must go on
                log.exception("batch %s failed", self._current)
                with suppress(Exception):
                    await self._db.call(self._fail, self._current, [])

    async def _process(self, id: str) -> None:
        db = self._db
        batch = await db.call(db.batch, id)
        if batch["status"] not in ("validating", "in_progress", "finalizing", "cancelling"):
            return
        owner = self._keys.tenant(tag_of(id))
        if owner is None:
            problem = Problem("no_owner", "The API key of its owner is not known any more.", None)
            await db.call(self._fail, id, [problem.value])
            return
        caller.set(owner)
        try:
            content = await db.call(db.content, batch["input_file_id"])
            lines = await asyncio.to_thread(read_lines, content, batch["endpoint"])
        except HeadraceError as error:
            await db.call(self._fail, id, [Problem("file_not_found", error.message, None).value])
            return
        except ExceptionGroup as group:
            found = [error.value for error in group.exceptions if isinstance(error, Problem)]
            await db.call(self._fail, id, found)
            return
        if batch["status"] == "validating":
            counts = {"total": len(lines), "completed": 0, "failed": 0}
            await db.call(self._begin, id, counts)
        elif batch["status"] == "cancelling":
            self._stopped.add(id)
        done = await db.call(db.done_lines, id)
        await self._run_lines(batch, [line for line in lines if line.number not in done])
        await self._finish(batch, lines)

    def _begin(self, id: str, counts: dict[str, int]) -> None:
        """Unless it has been cancelled meanwhile."""
        if self._db.batch(id)["status"] == "validating":
            self._db.update(
                id, status="in_progress", in_progress_at=self._db.now(), request_counts=counts
            )
        else:
            self._stopped.add(id)
            self._db.update(id, request_counts=counts)

    def _fail(self, id: str, problems: list[dict[str, Any]]) -> None:
        errors = {"object": "list", "data": problems[:_MAX_ERRORS]}
        self._db.update(id, status="failed", failed_at=self._db.now(), errors=errors)

    async def _run_lines(self, batch: dict[str, Any], lines: list[Line]) -> None:
        """Results of lines, until all are there or the batch ends early."""
        left = iter(lines)
        workers = min(self._context.config.serve.batch_concurrency, len(lines))
        self._tasks = {asyncio.create_task(self._work(batch, left)) for _ in range(workers)}
        try:
            for result in await asyncio.gather(*self._tasks, return_exceptions=True):
                if isinstance(result, Exception):
                    raise result
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._tasks = set()

    async def _work(self, batch: dict[str, Any], left: Iterator[Line]) -> None:
        for line in left:
            if not await self._turn(batch):
                return
            status, value = await self._answer(batch["endpoint"], line)
            if status >= 500 and not self._context.manager.ready.is_set():
                return  # the server is ending: the next one repeats this line
            response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": value}
            result = to_json(_result(line, response, None))
            await self._db.call(self._db.add_result, batch["id"], line.number, status < 400, result)

    async def _turn(self, batch: dict[str, Any]) -> bool:
        """Wait until no client waits; false when the batch may start nothing more."""
        manager = self._context.manager
        patient = time.monotonic() + _PATIENCE_SECONDS
        while True:
            if batch["id"] in self._stopped or self._db.now() >= batch["expires_at"]:
                return False
            free = manager.stats.waiting == 0 or time.monotonic() > patient
            if free and manager.ready.is_set():
                return True
            await asyncio.sleep(_PAUSE_SECONDS)

    async def _answer(self, endpoint: str, line: Line) -> tuple[int, Any]:
        """(HTTP status, body) of one line."""
        try:
            while True:
                try:
                    return 200, await self._generate(endpoint, line.body)
                except Overloaded:
                    await asyncio.sleep(_PAUSE_SECONDS)
        except HeadraceError as error:
            return 400 if isinstance(error, Unsupported) else error.status, error_body(error)
        except Exception:  # isolates one line
            log.exception("a line of a batch failed")
            return 500, error_body(internal_error())

    async def _generate(self, endpoint: str, body: bytes) -> Any:
        parse, prefix = ENDPOINTS[endpoint]
        context = self._context
        job = await asyncio.to_thread(parse, body, context, new_stamp(prefix))
        warnings(job.ignored, strict=context.config.serve.strict_fields)
        if isinstance(job.reply, EventReply):
            raise BadRequest("stream: the requests of a batch are not streamed", field="stream")
        requests = [self._unhurried(request) for request in job.requests]
        return await collect(context.manager.generate_many(requests), job.reply)

    def _unhurried(self, request: GenerateRequest) -> GenerateRequest:
        """With the least urgent priority, where there are priorities, and next to no share."""
        options, owner = self._context.config.schedule, caller.get()
        priority = None
        if options.enable_priority_scheduling:
            priority = _INT32 if options.schedule_low_priority_values_first else -_INT32
        return msgspec.structs.replace(
            request,
            priority=priority,
            tenant=f"{owner.name}{_BATCH}",
            weight=owner.weight * _BATCH_WEIGHT,
        )

    async def _finish(self, batch: dict[str, Any], lines: list[Line]) -> None:
        """Give the lines that will never run a result that says so, and end the batch."""
        db, id = self._db, batch["id"]
        done = await db.call(db.done_lines, id)
        missing = [line for line in lines if line.number not in done]
        status = "completed"
        if id in self._stopped:
            status = "cancelled"
        elif missing:
            status = "expired"
        for line in missing:
            error = {
                "code": f"batch_{status}",
                "message": f"This request was not executed: the batch was {status}.",
            }
            await db.call(
                db.add_result, id, line.number, False, to_json(_result(line, None, error))
            )
        self._stopped.discard(id)
        after = batch.get("output_expires_after") or {}
        await db.call(db.finish, id, status, after.get("seconds"))


def _result(line: Line, response: Any, error: Any) -> dict[str, Any]:
    id = f"batch_req_{uuid.uuid4().hex}"
    return {"id": id, "custom_id": line.custom_id, "response": response, "error": error}


def read_lines(content: bytes, endpoint: str) -> list[Line]:
    """The requests of an input file.

    Raises:
        ExceptionGroup: of `Problem`, one for each wrong line.
    """
    raw = [(i, line) for i, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    problems: list[Problem] = []
    if not raw:
        problems.append(Problem("empty_file", "The input file has no requests.", None))
    if len(raw) > MAX_LINES:
        text = f"The input file has {len(raw)} requests; the limit is {MAX_LINES}."
        problems.append(Problem("too_many_requests", text, None))
    lines: dict[str, Line] = {}
    for number, data in raw[:MAX_LINES]:
        try:
            line = _read_line(number, data, endpoint)
            if line.custom_id in lines:
                told = f"custom_id {line.custom_id!r} appears twice."
                raise Problem("duplicate_custom_id", told, number)
            lines[line.custom_id] = line
        except Problem as problem:
            problems.append(problem)
    if problems:
        raise ExceptionGroup("wrong lines", problems)
    return list(lines.values())


def _read_line(number: int, text: bytes, endpoint: str) -> Line:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Problem("invalid_json_line", f"This line is not JSON: {error}", number) from None
    if not isinstance(value, dict):
        raise Problem("invalid_json_line", "This line is not a JSON object.", number)
    custom_id, body = value.get("custom_id"), value.get("body")
    if not isinstance(custom_id, str) or not custom_id:
        raise Problem("missing_required_parameter", "custom_id must be a string.", number)
    if value.get("method") != "POST":
        raise Problem("invalid_method", "method must be POST.", number)
    if value.get("url") != endpoint:
        raise Problem("mismatched_endpoint", f"url must be {endpoint}, as the batch's.", number)
    if not isinstance(body, dict):
        raise Problem("missing_required_parameter", "body must be an object.", number)
    return Line(number, custom_id, orjson.dumps(body))


def new_batch(
    input_file_id: str, endpoint: str, window: str, seconds: int, more: dict[str, Any]
) -> dict[str, Any]:
    """A batch object that has just been made and expires after `seconds`."""
    now = int(time.time())
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling")
    return {
        "id": new_id("batch_"),
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": input_file_id,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": now,
        "expires_at": now + seconds,
        **{f"{name}_at": None for name in (*times, "cancelled")},
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        **more,
    }
