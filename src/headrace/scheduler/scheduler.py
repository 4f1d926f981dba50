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
from typing import Any

from headrace.core import faults
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
from headrace.scheduler.commit import DEFAULT_OUTPUT, Committer, OutputRules, abort, failure
from headrace.scheduler.control import answer
from headrace.scheduler.deadlines import Deadlines
from headrace.scheduler.entry import Entry
from headrace.scheduler.feature import Feature, Runner
from headrace.scheduler.overview import overview
from headrace.scheduler.planner import Planner
from headrace.scheduler.report import Reporter
from headrace.scheduler.request import Request, StopMatcher
from headrace.scheduler.sessions import Sessions
from headrace.scheduler.space import Space
from headrace.scheduler.trace import Trace

logger = logging.getLogger(__name__)

# Counters are sent along with deltas at most this often (seconds).
_STATS_INTERVAL = 0.1
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
        self.reporter = Reporter(self.planner, self.committer, output, clock)
        self.entry = Entry(options, limits, self.planner, self.committer, self.reporter)
        self.deadlines = Deadlines(options)
        self.trace = Trace(clock)
        # Seconds to sleep after each step, to make a slow server for tests of clients.
        self.slow_down = 0.0
        # Told who is about to be computed whenever that changes; while it returns True, each time.
        self.on_batch: Callable[[Sequence[Request]], bool] = lambda requests: False
        self._watching = False
        self._stops = output.stops
        self._inflight: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._replies: list[ControlReply] = []
        self._arrivals = 0
        self._stats_sent = 0.0
        self._stats_due = False
        # Idle when it was last asked for news.
        self._rested = True

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

    @property
    def plans(self) -> list[StepPlan]:
        """Those steps, oldest first."""
        return [plan for plan, _ in self._inflight]

    @property
    def arrivals(self) -> int:
        """Requests that have come so far."""
        return self._arrivals

    def overview(self) -> dict[str, Any]:
        """What an operator sees of it."""
        return overview(self)

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
        deltas, idle = self.committer.deltas, self.idle
        # The last word before a rest is true: nobody will correct it.
        due = self._stats_due or (idle and not self._rested)
        if deltas or due:
            now = self.clock()
            stats = None
            if due or now - self._stats_sent >= _STATS_INTERVAL:
                stats, self._stats_sent, self._stats_due = self.reporter.stats(), now, False
            out.append(Deltas(items=deltas, stats=stats))
            self.committer.deltas = []
        self._rested = idle
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
        if spec.attempt:
            self._supersede(spec)
        if spec.session is not None:
            spec, reason = self._go_on(spec)
        request = Request(spec, self._arrivals, self.clock(), None)
        self._arrivals += 1
        try:
            if faults.ON:
                faults.strike("accept", [spec.sampling.seed])
            reason = reason or self.entry.refusal(request)
            if reason is None:
                request.stop = self._resumed_stop(request)
        except HeadraceError as error:
            reason = abort(error.message, error.status, error.kind)
        except Exception as error:  # noqa: BLE001  it fails this request, not the server
            reason = failure("accepting the request", error)
        self.planner.queue.shares.join(request)
        self.planner.queue.add(request)
        if reason is not None:
            self.committer.finish(request, reason)
            return
        self.deadlines.watch(request)

    def _supersede(self, spec: GenerateRequest) -> None:
        """An earlier attempt of the same request may still be here: its answer was lost."""
        for other in [*self.planner.queue.waiting, *self.planner.running]:
            if (other.spec.rid, other.spec.origin) == (spec.rid, spec.origin):
                reason = FinishReason("abort", message="Begun anew.", status=499, kind="Cancelled")
                self.committer.finish(other, reason)

    def _resumed_stop(self, request: Request) -> StopMatcher | None:
        """What watches for its stops, when it has seen the output so far."""
        stop = self._stops(request.spec)
        if stop is not None:
            for token in request.out:
                stop.push(token)
        return stop

    def _go_on(self, spec: GenerateRequest) -> tuple[GenerateRequest, FinishReason | None]:
        """The request with what came before it in its session; what it replaces ends."""
        try:
            for rid in self.sessions.displaced(spec):
                self._abort(AbortRequest(rid, message="Replaced by another of its session."))
            return self.sessions.extend(spec, self.limits.max_request_tokens), None
        except HeadraceError as error:
            return spec, abort(error.message, error.status, error.kind)

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
        while self.planner.questions.broken:
            request, error = self.planner.questions.broken.pop()
            self.committer.finish(request, failure("planning", error))
        if plan is None:
            return False
        self.trace.add("plan", began)
        self.reporter.planned(plan)
        if self._watching or plan.new_rows or plan.freed_rows:
            self._watching = self.on_batch(self.planner.running)
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
