"""Routes about the server itself: is it well, what does it serve, what is it doing; flush, abort.

Only /health_generate generates. Reads the manager's counters, keeps none of its own.
"""

import asyncio
import time
import uuid
from contextlib import aclosing
from typing import Any

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import PlainTextResponse, Response

from headrace import __version__
from headrace.core.errors import BadRequest, HeadraceError, NotFound
from headrace.core.messages import SamplingParams, SchedulerStats
from headrace.frontend.encode import probe
from headrace.frontend.native import WEIGHT_VERSION
from headrace.metrics.catalog import PREFIX, Sources
from headrace.metrics.prometheus import CONTENT_TYPE, Exporter
from headrace.server.context import Context
from headrace.server.errors import RETRY_AFTER_SECONDS
from headrace.server.generation import read_body
from headrace.server.ignored import warnings
from headrace.server.schemas import AbortBody, body_of, ignored_fields, read
from headrace.server.sse import to_json

PROBE_SECONDS = 20.0
MAX_FLUSH_SECONDS = 600.0
FLUSH_RETRY_SECONDS = 0.05
LOAD_SECTIONS = ("core", "memory", "queues", "all")


def routes(context: Context) -> APIRouter:
    """Health, information, load and control."""
    router = APIRouter()
    for add in (_add_health, _add_information, _add_loads, _add_metrics, _add_control):
        add(router, context)
    return router


def _add_health(router: APIRouter, context: Context) -> None:
    @router.head("/", include_in_schema=False)
    @router.get("/")
    async def root() -> Response:
        return PlainTextResponse("headrace is running")

    @router.get("/livez")
    async def livez() -> Response:
        """503 when only a restart can help: for the probe that ends a container. A server that
        loads, drains, is busy or brings a lost process back is alive."""
        manager = context.manager
        return _well("" if manager.recovery.why else manager.trouble())

    @router.get("/ready", include_in_schema=False)
    @router.get("/readyz")
    async def readyz() -> Response:
        """503 when requests should go elsewhere, with the reason; asks nobody."""
        stats = context.manager.stats
        paused = "Generation is paused." if stats.is_paused else ""
        draining = "The server finishes what it has." if stats.draining else ""
        return _well(_unready(context) or paused or draining)

    @router.get("/ping", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """200 when requests are answered, also while generation is paused; asks nobody."""
        return _well(_unready(context))

    @router.get("/health_generate")
    async def health_generate() -> Response:
        """200 when a token comes back through scheduler, model and detokenizer."""
        if reason := _unready(context):
            return _well(reason)
        try:
            async with asyncio.timeout(PROBE_SECONDS):
                await _one_token(context)
        except TimeoutError:
            return _well(f"No token came back within {PROBE_SECONDS:g} s.")
        except HeadraceError as error:
            return _well(error.message)
        return _well("")


def _unready(context: Context) -> str:
    """Why no requests are answered, or ""."""
    if reason := context.manager.trouble():
        return reason
    return "" if context.manager.ready.is_set() else "The server is starting or ending."


def _well(reason: str) -> Response:
    """200, or 503 with the reason."""
    if not reason:
        return Response(status_code=200)
    retry = {"retry-after": str(RETRY_AFTER_SECONDS)}
    return PlainTextResponse(reason + "\n", status_code=503, headers=retry)


async def _one_token(context: Context) -> None:
    """Any answer will do: a full queue is busy, not ill; a paused server is as it should be."""
    if (await context.manager.control("ping", timeout=PROBE_SECONDS)).data.get("paused"):
        return
    sampling = SamplingParams(max_new_tokens=1, temperature=0.0)
    request = probe(context.info, f"HEALTH_CHECK_{uuid.uuid4().hex}", [0], sampling)
    async with aclosing(context.manager.generate(request)) as deltas:
        await anext(deltas)


def _add_information(router: APIRouter, context: Context) -> None:
    @router.get("/v1/models")
    async def models() -> Response:
        """OpenAI's list of models: the one that is served."""
        return json_response({"object": "list", "data": [_model_card(context)]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model != context.model_name:
            raise context.unknown_model(model)
        return json_response(_model_card(context))

    @router.get("/model_info")
    @router.get("/get_model_info", include_in_schema=False)
    async def model_info() -> Response:
        """What is served, with SGLang's keys."""
        return json_response(_model_info(context))

    @router.get("/server_info")
    @router.get("/get_server_info", include_in_schema=False)
    async def server_info() -> Response:
        """Every resolved option without secrets, sizes, counters and the start-up times."""
        return json_response(_server_info(context))


def _model_card(context: Context) -> dict[str, Any]:
    return {
        "id": context.model_name,
        "object": "model",
        "created": context.started,
        "owned_by": "headrace",
        "root": context.model_name,
        "parent": None,
        "max_model_len": context.context_length,
    }


def _model_info(context: Context) -> dict[str, Any]:
    options, info = context.config.model, context.info
    return {
        "model_path": options.model_path,
        "served_model_name": context.model_name,
        "tokenizer_path": options.tokenizer_path or options.model_path,
        "is_generation": context.info.pooling is None,
        "preferred_sampling_params": msgspec.json.decode(
            context.config.serve.preferred_sampling_params
        ),
        "weight_version": WEIGHT_VERSION,
        "load_format": options.load_format,
        "reasoning_parser": None,
        "tool_call_parser": None,
        "disaggregation_mode": "null",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": info.model_type,
        "architectures": [info.architecture],
        "max_model_len": context.context_length,
        "vocab_size": info.vocab_size,
        "eos_token_ids": info.eos_token_ids,
    }


def _server_info(context: Context) -> dict[str, Any]:
    manager, stats = context.manager, context.manager.stats
    sizes: dict[str, Any] = {}
    if (limits := manager.limits) is not None:
        sizes = {
            "max_total_num_tokens": limits.max_total_tokens,
            "max_req_input_len": limits.max_request_tokens - 1,
        }
    state = {
        "effective_max_running_requests_per_dp": limits.max_running_requests if limits else None,
        "last_gen_throughput": stats.gen_throughput,
        "memory_usage": manager.memory,
        **stats_dict(stats),
    }
    return {
        **context.config.public(),
        **sizes,
        "status": _status(context),
        "startup": manager.startup,
        "internal_states": [state],
        "version": __version__,
        "frontend": "python",
    }


def _status(context: Context) -> str:
    if context.manager.recovery.why:
        return "recovering"
    return "ready" if context.manager.ready.is_set() else "starting"


def _add_loads(router: APIRouter, context: Context) -> None:
    @router.get("/v1/loads")
    async def loads(
        include: str = "all", dp_rank: int | None = None, format: str = "json"
    ) -> Response:
        """How busy the server is: for load balancers. `include`: core, memory, queues or all."""
        wanted = [name.strip() for name in include.split(",")]
        if unknown := [name for name in wanted if name not in LOAD_SECTIONS]:
            raise BadRequest(
                f"include: {unknown[0]!r} is not one of {', '.join(LOAD_SECTIONS)}", field="include"
            )
        if dp_rank not in (None, 0):
            raise NotFound(f"dp_rank {dp_rank}: this server has one replica, 0", field="dp_rank")
        load = _load(context.manager.stats, wanted)
        if format == "prometheus":
            return Response(_load_lines(load), media_type=CONTENT_TYPE)
        if format != "json":
            raise BadRequest(f"format: must be json or prometheus, not {format!r}", field="format")
        return json_response(
            {
                "timestamp": time.time(),
                "version": __version__,
                "accelerator": context.config.run.device,
                "num_accelerators": 1,
                "loads": [load],
            }
        )

    @router.get("/get_load")
    async def load() -> Response:
        """The older, shorter form of /v1/loads."""
        stats = context.manager.stats
        return json_response(
            [
                {
                    "dp_rank": 0,
                    "num_reqs": stats.running + stats.waiting,
                    "num_waiting_reqs": stats.waiting,
                    "num_tokens": stats.used_tokens,
                }
            ]
        )


def _add_metrics(router: APIRouter, context: Context) -> None:
    manager = context.manager

    @router.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms in Prometheus' text format."""
        if not context.config.observe.enable_metrics:
            raise NotFound("Metrics are off; start the server with --enable-metrics.")
        requests = await manager.peers.metrics(manager.metrics)
        sources = Sources(manager.stats, requests, manager.limits)
        names = context.config.observe.metrics_compat
        exporter = Exporter(lambda: sources, {"model_name": context.model_name}, names)
        return Response(exporter.render(), media_type=CONTENT_TYPE)

    @router.get("/debug/scheduler")
    async def debug_scheduler() -> Response:
        """What the scheduler runs and what waits, with the age of that picture in seconds. Asks
        nobody: it answers while the scheduler hangs."""
        return json_response(manager.outlook.look())


def _load(stats: SchedulerStats, wanted: list[str]) -> dict[str, Any]:
    """One entry of `loads`. Shares are 0 to 1."""
    token_usage = stats.used_tokens / max(1, stats.max_total_tokens)
    busy_rows = stats.running / max(1, stats.max_running_requests)
    load: dict[str, Any] = {
        "timestamp": time.time(),
        "dp_rank": 0,
        "num_running_reqs": stats.running,
        "num_waiting_reqs": stats.waiting,
        "num_used_tokens": stats.used_tokens,
        "max_total_num_tokens": stats.max_total_tokens,
        "max_running_requests": stats.max_running_requests,
        "token_usage": round(token_usage, 4),
        "gen_throughput": round(stats.gen_throughput, 2),
        "cache_hit_rate": round(stats.cached_tokens_total / max(1, stats.prompt_tokens_total), 4),
        "utilization": round(max(token_usage, busy_rows), 4),
    }
    if "memory" in wanted or "all" in wanted:
        load["memory"] = {"token_capacity": stats.max_total_tokens}
    if "queues" in wanted or "all" in wanted:
        load["queues"] = {"waiting": stats.waiting}
    return load


def _load_lines(load: dict[str, Any]) -> str:
    """The numbers of a load as Prometheus gauges."""
    return "".join(
        f'{PREFIX}{name}{{dp_rank="0"}} {value}\n'
        for name, value in load.items()
        if isinstance(value, int | float) and name not in ("dp_rank", "timestamp")
    )


def _add_control(router: APIRouter, context: Context) -> None:
    @router.get("/flush_cache", include_in_schema=False)
    @router.post("/flush_cache")
    async def flush_cache(
        timeout: float = Query(0.0, ge=0.0, le=MAX_FLUSH_SECONDS, allow_inf_nan=False),
    ) -> Response:
        """Forget all cached prefixes; 400 while requests run, after waiting `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            reply = await context.manager.control("flush_cache")
            if reply.ok or time.monotonic() >= deadline:
                break
            await asyncio.sleep(FLUSH_RETRY_SECONDS)
        return PlainTextResponse(reply.message + "\n", status_code=200 if reply.ok else 400)

    @router.post("/abort_request", openapi_extra=body_of(AbortBody))
    async def abort_request(http: Request) -> Response:
        """End every request whose id starts with `rid`, or all. No such request is no error."""
        body = read(AbortBody, await read_body(http, context.config.serve))
        headers = warnings(ignored_fields(body), strict=context.config.serve.strict_fields)
        if body.rid or body.abort_all:
            context.manager.abort(body.rid or "", prefix=True, all=bool(body.abort_all))
        return Response(status_code=200, headers=headers)


def json_response(value: Any, headers: dict[str, str] | None = None) -> Response:
    """A complete JSON answer."""
    return Response(to_json(value), headers=headers, media_type="application/json")


def stats_dict(stats: SchedulerStats) -> dict[str, Any]:
    """The scheduler's counters by name."""
    return {name: getattr(stats, name) for name in stats.__struct_fields__}
