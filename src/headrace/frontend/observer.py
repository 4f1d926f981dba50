"""Follows requests that somebody wants to see the timeline of: a client, the log, a tracer.

    watching(requests)   marks them, so that the scheduler keeps a timeline
    end(delta)           the last delta has come; the frontend adds its own marks
    close(call)          the answer is out: log line and spans

Belongs to one loop. Invariant: a request that nobody wants to see costs a few comparisons, and
nothing for each token.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import msgspec

from headrace.core.config import Config
from headrace.core.messages import Delta, GenerateRequest
from headrace.core.timeline import Timeline
from headrace.frontend.request_log import RequestLog
from headrace.metrics.spans import Seen, Tracer, open_tracer

logger = logging.getLogger("headrace.timings")


class Call:
    """One call of a client: an HTTP request, or a call of the Engine.

    `wants`: the client asks for timings. `headers` are those that say which trace it belongs to.
    """

    def __init__(
        self, received: float, wants: bool = False, headers: dict[str, str] | None = None
    ) -> None:
        self.received = received
        self.wants = wants
        self.headers = headers or {}
        self.seen: list[Seen] = []
        # The client has its answer; what still runs for it is on its own.
        self.over = False


# The HTTP request that the current task works for, set by `headrace.server.timings`.
CALL: ContextVar[Call | None] = ContextVar("headrace_call", default=None)


class Observer:
    """Owned by a tokenizer manager, whose `log` it also writes to."""

    def __init__(self, config: Config, log: RequestLog) -> None:
        self._log = log
        self._stats = config.observe.enable_request_time_stats_logging
        self._model = config.model.served_model_name or config.model.model_path
        self._tracer: Tracer | None = open_tracer(config.observe)
        self._open: dict[str, tuple[Call, GenerateRequest]] = {}

    @contextmanager
    def watching(
        self, requests: Sequence[GenerateRequest], began: float
    ) -> Iterator[Sequence[GenerateRequest]]:
        """The requests as they are to be sent; on the way out those are forgotten.

        They came `began` (monotonic seconds), unless the HTTP server knows better.
        """
        current = CALL.get()
        everything = self._stats or self._log.on or self._tracer is not None
        if not (everything or (current and current.wants) or any(r.timings for r in requests)):
            yield requests
            return
        call = current if current and not current.over else Call(began)
        marked = [
            msgspec.structs.replace(request, timings=True)
            if everything or call.wants or request.timings
            else request
            for request in requests
        ]
        watched = {
            after.rid: (call, before)
            for before, after in zip(requests, marked, strict=True)
            if after.timings and before.rid not in self._open
        }
        self._open |= watched
        try:
            yield marked
        finally:
            for rid in watched:
                self._open.pop(rid, None)
            if call is not current or call.over:
                self.close(call)

    def end(self, delta: Delta) -> None:
        """The last delta of a request came, with its timeline."""
        found, timeline = self._open.get(delta.rid), delta.timeline
        if found is None or timeline is None:
            return
        call, request = found
        timeline.received, timeline.delivered = call.received, time.monotonic()
        call.seen.append(Seen(timeline, request, delta, self._model))

    def shown(self, delta: Delta) -> Delta:
        """The delta as the client shall see it: without a timeline that it did not ask for."""
        call, request = self._open.get(delta.rid, (None, None))
        if request is not None and call is not None and (request.timings or call.wants):
            return delta
        return msgspec.structs.replace(delta, timeline=None)

    def close(self, call: Call) -> None:
        """The answer of a call is out, or nobody waits for it any more."""
        now, seen, call.seen = time.monotonic(), call.seen, []
        for one in seen:
            one.timeline.closed = now
            if self._stats:
                logger.info(self._line(one))
            if self._tracer is not None:
                self._tracer.trace(one, call.headers)

    def stop(self) -> None:
        """Send the spans that wait. Blocks for a moment."""
        if self._tracer is not None:
            self._tracer.close()

    def _line(self, seen: Seen) -> str:
        """In JSON, or with the wording of SGLang's line."""
        delta, timeline = seen.delta, seen.timeline
        if self._log.form == "json":
            entry = {"event": "timings", "rid": delta.rid, **counts(delta), **logged(timeline)}
            return msgspec.json.encode(entry).decode()
        seconds = timeline.seconds()
        return (
            f"Req Time Stats(rid={delta.rid}, input len={delta.prompt_tokens}, "
            f"output len={delta.completion_tokens}, cached len={delta.cached_tokens}, "
            "type=unified): "
            f"queue_duration={seconds['queue'] * 1e3:.2f}ms, "
            f"forward_duration={(seconds['prefill'] + seconds['decode']) * 1e3:.2f}ms, "
            + ", ".join(f"{name}={value * 1e3:.2f}ms" for name, value in seconds.items())
        )


def counts(delta: Delta) -> dict[str, int]:
    """Tokens of a request, for a line of the log."""
    return {
        "prompt_tokens": delta.prompt_tokens,
        "cached_tokens": delta.cached_tokens,
        "completion_tokens": delta.completion_tokens,
    }


def logged(timeline: Timeline) -> dict[str, object]:
    """A timeline as operators see it: also where its prompt left another one's."""
    wire = timeline.to_wire()
    if timeline.diverged is not None:
        found = timeline.diverged
        wire["diverged"] = {"at": found.at, "of": found.length, "from": found.rid}
    return {"timings": wire}
