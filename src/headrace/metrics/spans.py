"""Timelines as OpenTelemetry spans, sent over OTLP. The one place where spans are made.

    llm_request                              the client's span is its parent, by `traceparent`
      tokenize dispatch queue prefill decode detokenize deliver send
                              prefill_chunk

A span begins and ends with marks of the process that its attribute `headrace.process` names; all of
them are built here when the request is over, so that no process but this one knows of traces.
Attribute names are those of the semantic conventions of GenAI and of what vLLM and SGLang add.
Imports the opentelemetry packages (extra `otel`) only when tracing is on.

Source: W3C Trace Context; opentelemetry-proto.
"""

import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from headrace.core.errors import BadRequest
from headrace.core.messages import Delta, GenerateRequest
from headrace.core.serve_options import ObserveOptions
from headrace.core.timeline import Timeline

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

# How long the end of a server waits for its last spans.
_FLUSH_MS = 2000


class Seen(NamedTuple):
    """A request that is over: when it was where, what was asked, and its last news."""

    timeline: Timeline
    request: GenerateRequest
    delta: Delta
    model: str


def open_tracer(options: ObserveOptions) -> "Tracer | None":
    """As the options say; None without --enable-trace.

    Raises:
        BadRequest: the packages are missing, or the endpoint is none.
    """
    if not options.enable_trace:
        return None
    try:
        exporter = exporter_for(options.otlp_traces_endpoint)
    except ImportError:
        raise BadRequest(
            "--enable-trace needs the OpenTelemetry packages: pip install 'headrace[otel]'",
            field="enable_trace",
        ) from None
    return Tracer(exporter, options.otlp_service_name)


def exporter_for(endpoint: str) -> "SpanExporter":
    """OTLP over HTTP for an endpoint with a path (http://host:4318/v1/traces), else over gRPC.

    OTEL_EXPORTER_OTLP_TRACES_PROTOCOL (grpc, http/protobuf) decides where it is set.
    """
    address = endpoint if "://" in endpoint else f"http://{endpoint}"
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadRequest(
            f"--otlp-traces-endpoint must be host:port or a URL, not {endpoint!r}",
            field="otlp_traces_endpoint",
        )
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    over_http = protocol.startswith("http") if protocol else parts.path not in ("", "/")
    if over_http:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter(endpoint=address)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as OverGrpc

    return OverGrpc(endpoint=address, insecure=parts.scheme == "http")


class Tracer:
    """Makes spans of requests that are over; a thread sends them in batches."""

    def __init__(self, exporter: "SpanExporter", service: str, *, batches: bool = True) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor

        # Not the global one: an application that embeds the engine may have its own.
        self._provider = TracerProvider(resource=Resource.create({"service.name": service}))
        kind = BatchSpanProcessor if batches else SimpleSpanProcessor
        self._provider.add_span_processor(kind(exporter))
        self._tracer = self._provider.get_tracer("headrace")

    def trace(self, seen: Seen, headers: dict[str, str]) -> None:
        """Spans of one request, below the one that `headers` (traceparent, tracestate) name."""
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Marks are monotonic; the offset to the time of day is looked up once for all of a request.
        offset = time.time_ns() - time.monotonic_ns()
        stages = seen.timeline.stages()

        def at(mark: float) -> int:
            return int(mark * 1e9) + offset

        root = self._tracer.start_span(
            "llm_request",
            TraceContextTextMapPropagator().extract(headers),
            SpanKind.SERVER,
            attributes=attributes_of(seen),
            start_time=at(stages[0].began),
        )
        inside = set_span_in_context(root)
        for stage in stages:
            if stage.ended <= stage.began:
                continue
            span = self._tracer.start_span(
                stage.name,
                inside,
                attributes={"headrace.process": stage.process},
                start_time=at(stage.began),
            )
            if stage.name == "prefill":
                self._chunks(seen.timeline, set_span_in_context(span), at)
            span.end(at(stage.ended))
        for mark in seen.timeline.retracted:
            root.add_event("retracted", timestamp=at(mark))
        if (found := seen.timeline.diverged) is not None:
            event: dict[str, Any] = {"at": found.at, "of": found.length, "from": found.rid}
            root.add_event("prefix diverged", event, timestamp=at(seen.timeline.admitted))
        finish = seen.delta.finish
        if finish is not None and finish.type == "abort":
            root.set_status(Status(StatusCode.ERROR, finish.message))
        root.end(at(stages[-1].ended))

    def close(self) -> None:
        """Send what waits, for a moment at most."""
        self._provider.force_flush(_FLUSH_MS)
        self._provider.shutdown()

    def _chunks(self, timeline: Timeline, inside: Any, at: Any) -> None:
        for chunk in timeline.chunks:
            span = self._tracer.start_span(
                "prefill_chunk",
                inside,
                attributes={
                    "headrace.process": "scheduler",
                    "headrace.chunk.start": chunk.start,
                    "headrace.chunk.tokens": chunk.count,
                },
                start_time=at(chunk.began),
            )
            span.end(at(chunk.ended))


def attributes_of(seen: Seen) -> dict[str, Any]:
    """What the span of a request says of it: no text, no token ids."""
    timeline, request, delta, model = seen
    sampling, seconds = request.sampling, timeline.seconds()
    finish = delta.finish
    return {
        "gen_ai.request.id": delta.rid,
        "gen_ai.request.model": model,
        "gen_ai.response.model": model,
        "gen_ai.request.max_tokens": sampling.max_new_tokens or 0,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.top_k": sampling.top_k,
        "gen_ai.request.n": sampling.n,
        "gen_ai.response.finish_reasons": [finish.type if finish else "abort"],
        "gen_ai.usage.prompt_tokens": delta.prompt_tokens,
        "gen_ai.usage.completion_tokens": delta.completion_tokens,
        "gen_ai.usage.cached_tokens": delta.cached_tokens,
        "gen_ai.latency.time_in_queue": seconds["queue"],
        "gen_ai.latency.time_to_first_token": max(
            0.0, (timeline.first_token or timeline.finished) - timeline.received
        ),
        "gen_ai.latency.time_in_model_prefill": seconds["prefill"],
        "gen_ai.latency.time_in_model_decode": seconds["decode"],
        "gen_ai.latency.time_in_model_inference": seconds["prefill"] + seconds["decode"],
        "gen_ai.latency.e2e": seconds["total"],
        "headrace.steps": timeline.steps,
        "headrace.model_seconds": timeline.model_seconds,
        "headrace.retractions": delta.retractions,
    }
