"""When patience ends: the server's for waiting and running, a client's for the first token and the
whole answer.

A request is looked at when its time has come, not before, so limits cost nothing per step. Knows no
queue and no plans.
"""

import heapq
import itertools
import weakref
from collections.abc import Iterator

from headrace.core.config import ScheduleOptions
from headrace.core.messages import FinishReason
from headrace.scheduler.request import Request

Entry = tuple[float, int, str, "weakref.ref[Request]"]


class Deadlines:
    """The limits of requests that have not ended. Times in seconds of the scheduler's clock."""

    def __init__(self, options: ScheduleOptions) -> None:
        self._waiting = options.req_waiting_timeout
        self._running = options.req_running_timeout
        self._heap: list[Entry] = []
        self._numbers = itertools.count()

    def watch(self, request: Request) -> None:
        """A request arrived."""
        spec = request.spec
        limits = {
            "waiting": self._waiting,
            "running": self._running,
            "first": spec.first_token_within,
            "whole": spec.within,
        }
        # Who goes on after a crash has waited before.
        since = spec.received if spec.attempt else request.arrived
        for kind, seconds in limits.items():
            if seconds > 0.0:
                self._push(since + seconds, kind, request)

    def expired(self, now: float) -> Iterator[tuple[Request, FinishReason]]:
        """Requests whose time is over, and what to tell them."""
        while self._heap and self._heap[0][0] <= now:
            _, _, kind, reference = heapq.heappop(self._heap)
            request = reference()
            if request is None or request.finish is not None:
                continue
            if kind == "running" and (later := self._since_start(request, now)) > now:
                self._push(later, kind, request)
            elif text := self._reason(request, kind):
                yield (
                    request,
                    FinishReason("abort", message=text, status=503, kind="ServiceUnavailableError"),
                )

    def _since_start(self, request: Request, now: float) -> float:
        """When the patience with a running request ends; one that has not started has it all."""
        started = request.admitted_at if request.cached >= 0 else now
        return started + self._running

    def _reason(self, request: Request, kind: str) -> str:
        """Why a request ends at a deadline of this kind; "" if it goes on."""
        if kind == "waiting":
            waited = request.cached < 0
            return f"The request waited more than {self._waiting:g} s." if waited else ""
        if kind == "first":
            limit = request.spec.first_token_within
            return "" if request.out else f"There was no token within {limit:g} s (x-ttft-timeout)."
        if kind == "running":
            return f"The request ran more than {self._running:g} s."
        return f"The answer took more than {request.spec.within:g} s (x-request-timeout)."

    def _push(self, when: float, kind: str, request: Request) -> None:
        entry = (when, next(self._numbers), kind, weakref.ref(request))
        heapq.heappush(self._heap, entry)
