"""The scheduler: messages in, plans to the runner, results back, deltas out.

One loop serves every mode. `depth` plans may be in flight: 1 is the normal event loop, 2 is
overlap scheduling (the next step is planned while the device works), p a pipeline of p stages.
Time and device are injected. Knows no sockets, processes or tensors.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from headrace.core.config import Limits, ScheduleOptions
from headrace.core.errors import HeadraceError
from headrace.core.messages import (
    AbortRequest,
    ControlReply,
    Deltas,
    FinishReason,
    GenerateRequest,
    Inbound,
    Outbound,
)
from headrace.core.plan import StepPlan, StepResult
from headrace.scheduler.commit import DEFAULT_OUTPUT, Committer, OutputRules, abort
from headrace.scheduler.control import answer
from headrace.scheduler.deadlines import Deadlines
from headrace.scheduler.feature import Feature, Runner
from headrace.scheduler.planner import Planner
from headrace.scheduler.report import Reporter
from headrace.scheduler.request import Request
from headrace.scheduler.sessions import Sessions
from headrace.scheduler.space import Space
from headrace.scheduler.trace import Trace

logger = logging.getLogger(__name__)

# Counters are sent along with deltas at most this often (seconds).
_STATS_INTERVAL = 0.1
# The longest that a refused client is told to wait (seconds).
_LONGEST_RETRY = 300.0
# Verbs that change counters though no delta comes of them.
_CHANGING = ("pause", "continue", "flush_cache", "drain")


class Scheduler:
    """Owns every request from arrival to release."""

    def __init__(
        self,
        options: ScheduleOptions,
        limits: Limits,
        space: Space,
        runner: Runner,
        *,
        output: OutputRules = DEFAULT_OUTPUT,
        features: Sequence[Feature] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.depth = 1 if options.disable_overlap_schedule else max(2, limits.stages)
        self.clock = clock
        self.options = options
        self.limits = limits
        self.runner = runner
        self.features = features
        self.space = space
        self.planner = Planner(options, limits, space, features, self.depth, clock)
        self.sessions = Sessions(options.max_sessions, options.session_timeout, clock)
        watchers = (*features, self.sessions)
        self.committer = Committer(self.planner, space, watchers, output, clock)
        self.reporter = Reporter(self.planner, self.committer, output.decode_log_interval, clock)
        self.deadlines = Deadlines(options)
        self.trace = Trace(clock)
        # Seconds to sleep after each step, to make a slow server for tests of clients.
        self.slow_down = 0.0
        self._stops = output.stops
        self._inflight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._replies: list[ControlReply] = []
        self._arrivals = 0
        self._stats_sent = 0.0
        self._stats_due = False

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is in flight: the loop may sleep until a message comes."""
        return not (self.planner.running or self.planner.queue.waiting or self._inflight)

    def submit(self, message: Inbound) -> None:
        """Take one message; it takes effect at the next step."""
        if isinstance(message, GenerateRequest):
            self._accept(message)
        elif isinstance(message, AbortRequest):
            self._abort(message)
        else:
            self._replies.append(answer(self, message))
            self._stats_due |= message.verb in _CHANGING

    def step(self) -> bool:
        """Plan and launch, or commit, or both. False: nothing could be done."""
        self._poll_features()
        for request, reason in self.deadlines.expired(self.clock()):
            self.committer.finish(request, reason)
        launched = len(self._inflight) < self.depth and self._launch()
        if not self._inflight:
            return launched
        if launched and len(self._inflight) < self.depth:
            return True
        self._commit_oldest()
        return True

    @property
    def inflight(self) -> int:
        """Steps that were launched and not committed."""
        return len(self._inflight)

    def drain(self) -> None:
        """Wait for the plans in flight and commit them."""
        while self._inflight:
            self._commit_oldest()

    def pause(self, mode: str) -> int:
        """Let nobody run; returns how many requests that holds up.

        `abort` ends them all, `retract` takes their pages and lets them wait, `in_place` freezes
        them as they are. Requests that come wait. Nothing is in flight when it returns.
        """
        self.drain()
        self.planner.paused = True
        if mode == "abort":
            self._abort(AbortRequest(all=True, message="Aborted by a pause of the server."))
        elif mode == "retract":
            for request in list(self.planner.running):
                self.planner.retract(request)
        return len(self.planner.running) + len(self.planner.queue)

    def take(self) -> list[Outbound]:
        """Everything to send since the last call."""
        out: list[Outbound] = list(self._replies)
        self._replies = []
        deltas, due = self.committer.deltas, self._stats_due
        if deltas or due:
            now = self.clock()
            stats = None
            if due or self.idle or now - self._stats_sent >= _STATS_INTERVAL:
                stats, self._stats_sent, self._stats_due = self.reporter.stats(), now, False
            out.append(Deltas(items=deltas, stats=stats))
            self.committer.deltas = []
        return out

    def check(self) -> None:
        """Assert that no page, row or lock is lost (tests; the loop when idle)."""
        pool, cache = self.space.pool, self.space.cache
        pool.check()
        if self.idle:
            assert not self.planner.rows, "a row is lost"
            assert pool.free + cache.held == pool.count, "a page is lost"
            assert cache.evictable == cache.held, "a lock is lost"
            assert not self.planner.queue.leaders, "a group is lost"

    # -- messages -----------------------------------------------------------------------------

    def _accept(self, spec: GenerateRequest) -> None:
        reason = None
        if spec.session is not None:
            spec, reason = self._go_on(spec)
        request = Request(spec, self._arrivals, self.clock(), None)
        self._arrivals += 1
        reason = reason or self._refusal(request)
        self.planner.queue.shares.join(request)
        self.planner.queue.add(request)
        if reason is not None:
            self.committer.finish(request, reason)
            return
        request.stop = self._stops(spec)
        self.deadlines.watch(request)

    def _go_on(self, spec: GenerateRequest) -> tuple[GenerateRequest, FinishReason | None]:
        """The request with what came before it in its session; what it replaces ends."""
        try:
            for rid in self.sessions.displaced(spec):
                self._abort(AbortRequest(rid, message="Replaced by another of its session."))
            return self.sessions.extend(spec, self.limits.max_request_tokens), None
        except HeadraceError as error:
            return spec, abort(error.message, error.status, error.kind)

    def _refusal(self, request: Request) -> FinishReason | None:
        """Why the request cannot be taken, if so."""
        longest = self.limits.max_request_tokens
        if request.prompt_len == 0:
            return abort("The prompt is empty.", 400, "BadRequestError")
        if request.limit > longest:
            return abort(
                f"The request needs {request.limit} tokens ({request.prompt_len} of prompt and "
                f"{request.max_new_tokens} of output); the server holds {longest}.",
                400,
                "BadRequestError",
            )
        if self.planner.draining:
            return self._busy("The server takes no more requests: it finishes those it has.")
        options = self.options
        if (
            request.spec.priority is not None
            and options.abort_on_priority_when_disabled
            and not options.enable_priority_scheduling
        ):
            return abort(
                "Using priority is disabled for this server.", 503, "ServiceUnavailableError"
            )
        if request.spec.origin and self._in_use(request.rid):
            return abort(
                f"rid {request.rid!r} is in use by another request", 400, "BadRequestError"
            )
        for feature in self.features:
            error = feature.check(request)
            if error is not None:
                return abort(error, 400, "BadRequestError")
        return self._full(request)

    def _in_use(self, rid: str) -> bool:
        """One frontend knows its own requests; of several only the scheduler knows all."""
        everything = (self.planner.queue.waiting, self.planner.running)
        return any(other.rid == rid for some in everything for other in some)

    def _full(self, request: Request) -> FinishReason | None:
        """With a full queue, refuse this request or, if it is more urgent, evict another."""
        options, queue = self.options, self.planner.queue
        most, tokens = options.max_queued_requests, options.max_queued_tokens
        if most is not None and len(queue) >= most:
            limit = f"{most} requests (--max-queued-requests)"
        elif tokens is not None and len(queue) and queue.tokens + request.prompt_len > tokens:
            limit = f"{tokens} prompt tokens (--max-queued-tokens)"
        else:
            return None
        last = queue.last()
        if queue.urgency(request) <= queue.urgency(last):
            return self._busy(f"The request queue is full. It may hold {limit}.")
        self.committer.finish(
            last, self._busy("The request is aborted by a higher priority request.")
        )
        return None

    def _busy(self, message: str) -> FinishReason:
        """An end that tells when half of the queue will be gone, at the pace of late."""
        seconds = self.committer.pace.seconds_for(len(self.planner.queue) / 2)
        return FinishReason(
            "abort",
            message=message,
            status=503,
            kind="ServiceUnavailableError",
            retry_after=min(max(seconds, 1.0), _LONGEST_RETRY),
        )

    def _abort(self, message: AbortRequest) -> None:
        everything = [*self.planner.queue.waiting, *self.planner.running]
        for request in everything:
            rid = request.rid
            hit = rid.startswith(message.rid) if message.prefix else rid == message.rid
            if message.origin not in (-1, request.spec.origin):
                continue
            if message.tenant and message.tenant != request.spec.tenant:
                continue
            if message.all or (hit and message.rid):
                self.committer.finish(request, FinishReason("abort", message=message.message))

    # -- one step -----------------------------------------------------------------------------

    def _poll_features(self) -> None:
        for feature in self.features:
            for request, reason in feature.poll():
                self.committer.finish(request, reason)

    def _launch(self) -> bool:
        began = self.trace.mark()
        plan = None if self.planner.paused else self.planner.plan()
        if plan is None:
            return False
        self.trace.add("plan", began)
        self.reporter.planned(plan)
        began = self.trace.mark()
        future = self.runner.launch(plan)
        self.trace.add("launch", began)
        self.trace.launched(plan, future, self.planner)
        self._inflight.append((plan, future))
        if self.slow_down:
            time.sleep(self.slow_down)
        return True

    def _commit_oldest(self) -> None:
        plan, future = self._inflight.popleft()
        result = future.result()
        self.reporter.log.ended(len(self._inflight), result.seconds)
        began = self.trace.mark()
        self.committer.commit(plan, result)
        self.trace.add("commit", began)
        self.trace.committed(plan)
        if self.planner.running:
            self.planner.ratio.decay()
        else:
            self.planner.ratio.reset()
