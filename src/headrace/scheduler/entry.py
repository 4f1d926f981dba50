"""Who may come in: what a scheduler refuses, and when to come back.

Changes nothing, but that a more urgent request takes the place of one that waits.
"""

from headrace.core.config import Limits, ScheduleOptions
from headrace.core.messages import FinishReason
from headrace.scheduler.commit import Committer, abort
from headrace.scheduler.planner import Planner
from headrace.scheduler.report import Reporter
from headrace.scheduler.request import Request


class Entry:
    """Looks at every request before it waits."""

    def __init__(
        self,
        options: ScheduleOptions,
        limits: Limits,
        planner: Planner,
        committer: Committer,
        reporter: Reporter,
    ) -> None:
        self._options = options
        self._limits = limits
        self._planner = planner
        self._committer = committer
        self._reporter = reporter

    def refusal(self, request: Request) -> FinishReason | None:
        """Why the request cannot be taken, if so."""
        longest = self._limits.max_request_tokens
        if request.prompt_len == 0:
            return abort("The prompt is empty.", 400, "BadRequestError")
        if request.limit > longest:
            return abort(
                f"The request needs {request.limit} tokens ({request.prompt_len} of prompt and "
                f"{request.max_new_tokens} of output); the server holds {longest}.",
                400,
                "BadRequestError",
            )
        if self._planner.draining and not request.spec.attempt:
            return self._busy("The server takes no more requests: it finishes those it has.")
        if self._priority_is_off(request):
            text = "Using priority is disabled for this server."
            return abort(text, 503, "ServiceUnavailableError")
        if request.spec.origin and self._in_use(request.rid):
            text = f"rid {request.rid!r} is in use by another request"
            return abort(text, 400, "BadRequestError")
        for feature in self._planner.features:
            error = feature.check(request)
            if error is not None:
                return abort(error, 400, "BadRequestError")
        return self._full(request)

    def _priority_is_off(self, request: Request) -> bool:
        options = self._options
        return (
            request.spec.priority is not None
            and options.abort_on_priority_when_disabled
            and not options.enable_priority_scheduling
        )

    def _in_use(self, rid: str) -> bool:
        """One frontend knows its own requests; of several only the scheduler knows all."""
        everything = (self._planner.queue.waiting, self._planner.running)
        return any(other.rid == rid for some in everything for other in some)

    def _full(self, request: Request) -> FinishReason | None:
        """With a full queue, refuse this request or, if it is more urgent, evict another."""
        options, queue = self._options, self._planner.queue
        most, tokens = options.max_queued_requests, options.max_queued_tokens
        if request.spec.attempt:  # it had its place before a crash
            return None
        if most is not None and len(queue) >= most:
            limit = f"{most} requests (--max-queued-requests)"
        elif tokens is not None and len(queue) and queue.tokens + request.prompt_len > tokens:
            limit = f"{tokens} prompt tokens (--max-queued-tokens)"
        else:
            return None
        last = queue.last()
        if queue.urgency(request) <= queue.urgency(last):
            return self._busy(f"The request queue is full. It may hold {limit}.")
        self._committer.finish(
            last, self._busy("The request is aborted by a higher priority request.")
        )
        return None

    def _busy(self, message: str) -> FinishReason:
        """An end that tells when to come back."""
        return FinishReason(
            "abort",
            message=message,
            status=503,
            kind="ServiceUnavailableError",
            retry_after=self._reporter.retry_after,
        )
