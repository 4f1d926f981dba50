"""Turns running and waiting requests into the next plan.

First every running request grows by what it has to compute; then waiting ones are admitted while
the budgets of the step last. When pages run out somebody gives way: at once if no plan in flight
contains it, else it is held back until none does. Never blocks, never talks to a device.
"""

from collections.abc import Callable, Sequence
from typing import Any

from headrace.core.config import Limits, ScheduleOptions
from headrace.core.messages import pack_ids
from headrace.core.plan import Chunk, NewRow, Pages, StepPlan
from headrace.scheduler.admission import NewTokenRatio, needed, reserved
from headrace.scheduler.feature import Feature
from headrace.scheduler.questions import Questions
from headrace.scheduler.queue import Queue
from headrace.scheduler.request import Request
from headrace.scheduler.space import Space, shares_prefix

# A prompt that shares this many uncached tokens with one being computed waits for it.
_WORTH_WAITING = 32


class Draft:
    """A plan in the making, and the prompt tokens it may still take."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.chunks: list[Chunk] = []
        self.requests: list[Request] = []
        self.new_rows: list[NewRow] = []
        self.pages: list[Pages] = []
        self.copies: list[tuple[int, int]] = []


def _for_later(request: Request, draft: Draft, planner: "Planner") -> bool:
    """Whether a request is left to a later plan, so that all stages of a pipeline have work.

    A plan takes its share of the running requests, and none that waits for a sampled token: the
    first stage does not know it before the scheduler does.
    """
    stages = planner.limits.stages
    full = len(draft.requests) * stages >= len(planner.running)
    return stages > 1 and (request.pending > 0 or full)


class Planner:
    """Owns the queue, the running requests and the rows."""

    def __init__(
        self,
        options: ScheduleOptions,
        limits: Limits,
        space: Space,
        features: Sequence[Feature],
        depth: int,
        clock: Callable[[], float],
    ) -> None:
        self.options = options
        self.limits = limits
        self.space = space
        self.features = features
        self.questions = Questions(features, depth)
        self.clock = clock
        self.queue = Queue(options, space)
        self.running: list[Request] = []
        self.ratio = NewTokenRatio(options.schedule_conservativeness)
        self.retracted_total = 0
        self.paused = False  # then nobody runs, and requests that come wait
        self.draining = False  # then those that are here finish, and no others come
        # Requests by row; a finished one keeps its row until no plan in flight contains it.
        self.rows: dict[int, Request] = {}
        self.requests_total = 0
        self.prompt_tokens_total = 0
        self.cached_tokens_total = 0
        self._free_rows = list(range(limits.max_running_requests - 1, -1, -1))
        self._freed_rows: list[int] = []
        self._rewritten: list[Request] = []
        self._steps = 0

    def plan(self) -> StepPlan | None:
        """The next step, or None when nothing can run."""
        draft = Draft(self.options.chunked_prefill_size)
        for request in list(self.running):
            self._grow(request, draft)
        if self._free_rows or self.options.enable_priority_scheduling:
            for request in self.queue.candidates(self.clock()):
                if not self._try_admit(request, draft):
                    break
        return self._finish(draft)

    def retract(self, request: Request) -> None:
        """Take row and pages from a running request and let it wait again."""
        assert request.inflight == 0
        self.running.remove(request)
        self.space.leave(request, keep=0)
        self.release_row(request)
        request.retract(self.clock())
        self.retracted_total += 1
        self.queue.add(request)

    def release_row(self, request: Request) -> None:
        del self.rows[request.row]
        self._free_rows.append(request.row)
        self._freed_rows.append(request.row)
        request.row = -1

    def rewrite_pages(self, request: Request) -> None:
        """The page table of a request changed; the next plan must say so."""
        self._rewritten.append(request)

    # -- running requests ---------------------------------------------------------------------

    def _grow(self, request: Request, draft: Draft) -> None:
        """Add the next chunk of a running request, if it may and can run."""
        if request.row < 0 or not self._may_run(request) or _for_later(request, draft, self):
            return
        count = request.total - request.computed
        if count > 1:
            if count > draft.budget and not request.pieces:
                return
            count = min(count, draft.budget)
        if count > 0 and self._make_room(request, request.computed + count, draft):
            self._append(request, count, draft)

    def _may_run(self, request: Request) -> bool:
        if request.held and request.inflight == 0:
            request.held = False
            self.retract(request)
            return False
        if request.held or request.finish is not None or not request.wants_work:
            return False
        return self.questions.may_run(request)

    def _append(self, request: Request, count: int, draft: Draft) -> None:
        start, end = request.computed, request.computed + count
        samples = end == request.total and end < request.limit
        scores = request.score_from < end and request.score_from < request.prompt_len - 1
        draft.chunks.append(
            Chunk(
                row=request.row,
                start=start,
                count=count,
                samples=samples,
                logprob_start=max(start, request.score_from) if scores else -1,
            )
        )
        draft.requests.append(request)
        if scores:
            request.score_from = end
        if count > 1 or end <= request.prompt_len:
            draft.budget -= count
        request.computed = end
        request.pending += samples
        request.inflight += 1

    def _make_room(self, request: Request, length: int, draft: Draft) -> bool:
        """Give the request pages up to `length` tokens; somebody else may have to give way."""
        missing = -(-length // self.space.page_size) - len(request.pages)
        if missing <= 0:
            return True
        pages = self.space.take(missing)
        while pages is None:
            victim = self._victim(draft)
            if victim is None:
                return False
            self._give_way(victim)
            if victim is request:
                return False
            pages = self.space.take(missing)
            if pages is None and victim.held:
                return False
        draft.pages.append(Pages(row=request.row, first=len(request.pages), ids=pages))
        request.pages += pages
        return True

    def _victim(self, draft: Draft) -> Request | None:
        """Who gives way: not one that already grew in this plan, nor while another leaves.

        The last one never does: what it lacks comes back when plans in flight end.
        """
        if any(request.held for request in self.running):
            return None
        planned = set(map(id, draft.requests))
        free = [
            request
            for request in self.running
            if id(request) not in planned and request.finish is None
        ]
        return min(free, key=self._retraction_rank) if len(free) > 1 else None

    def _retraction_rank(self, request: Request) -> tuple[Any, ...]:
        """Smallest gives way first; ones outside any plan before ones in flight."""
        by_length = (len(request.out), -request.prompt_len, -request.seq)
        if self.options.retraction_policy == "priority":
            return (request.inflight > 0, self.queue.urgency(request), *by_length)
        return (request.inflight > 0, *by_length)

    def _give_way(self, victim: Request) -> None:
        if victim.inflight:
            victim.held = True
            return
        self.retract(victim)
        self.ratio.raise_after_retraction(self.running)

    # -- waiting requests ---------------------------------------------------------------------

    def _try_admit(self, request: Request, draft: Draft) -> bool:
        """Start a waiting request if it fits. False: stop looking in this step."""
        if draft.budget <= 0 or (not request.pieces and request.total > draft.budget):
            return False
        if not self._is_ready(request, draft):
            return True
        if not self._free_rows:
            self._preempt_for(request)
            return False
        self.space.enter(request)
        if self._better_wait(request):
            self.space.leave(request, keep=0)
            request.computed = 0
            return True
        if not self._fits(request):
            self.space.leave(request, keep=0)
            request.computed = 0
            self._preempt_for(request)
            return False
        self._admit(request, draft)
        return True

    def _is_ready(self, request: Request, draft: Draft) -> bool:
        """Nothing in the background is missing, and the group's prompt is computed."""
        if self._leader_computes(request) or self._on_trial(request):
            return False
        return self.questions.may_start(request, draft.requests)

    def _on_trial(self, request: Request) -> bool:
        """Has it, like one that runs, been in several crashes? Then they run one at a time."""
        return request.strikes > 1 and any(other.strikes > 1 for other in self.running)

    def _leader_computes(self, request: Request) -> bool:
        """Is the group's prompt still being computed by another sample?

        A retracted leader is not waited for: it may be this very request that displaced it.
        """
        leader = self.queue.leader_of(request)
        if leader is None:
            return False
        return not leader.prompt_kept and leader.retractions == 0

    def _better_wait(self, request: Request) -> bool:
        """Is somebody computing the very prefix that this request lacks?"""
        if not self.space.cache.shares or not request.reuse:
            return False
        worth = max(_WORTH_WAITING, self.space.page_size)
        return any(
            not other.prompt_kept and other.finish is None and shares_prefix(request, other, worth)
            for other in self.running
        )

    def _fits(self, request: Request) -> bool:
        if not self.running:
            return True
        return needed(request) + reserved(self.running, self.ratio.value) <= self.space.room

    def _preempt_for(self, request: Request) -> None:
        """Let a much less urgent running request give way."""
        options = self.options
        if not options.enable_priority_scheduling or options.disable_priority_preemption:
            return
        if any(running.held for running in self.running):
            return
        victim = min(
            (running for running in self.running if running.finish is None),
            key=lambda running: (self.queue.urgency(running), -running.seq),
            default=None,
        )
        threshold = options.priority_scheduling_preemption_threshold
        if victim is None or self.queue.urgency(request) - self.queue.urgency(victim) < max(
            1, threshold
        ):
            return
        victim.held = True

    def _admit(self, request: Request, draft: Draft) -> None:
        """Give the request a row and let its first chunk run."""
        leader = self.queue.leader_of(request)
        if leader is not None and leader.prompt_kept:
            draft.copies += self.space.fork(request, leader)
        self.queue.remove(request)
        self.running.append(request)
        request.row = self._free_rows.pop()
        self.rows[request.row] = request
        if request.cached < 0:
            self._count_first_admission(request)
        draft.new_rows.append(new_row(request))
        if request.pages:
            draft.pages.append(Pages(row=request.row, first=0, ids=list(request.pages)))
        self._grow(request, draft)

    def _count_first_admission(self, request: Request) -> None:
        request.cached = request.computed
        request.account.charge(request.prompt_len - request.cached)
        request.admitted_at = self.clock()
        self.requests_total += 1
        self.prompt_tokens_total += request.prompt_len
        self.cached_tokens_total += request.cached

    # -- the plan -----------------------------------------------------------------------------

    def _finish(self, draft: Draft) -> StepPlan | None:
        if not draft.chunks and not draft.new_rows:
            return None
        rewritten = [
            Pages(row=request.row, first=0, ids=list(request.pages))
            for request in self._rewritten
            if request.row >= 0
        ]
        extras = self.questions.extras(draft.chunks, draft.requests)
        self._steps += 1
        plan = StepPlan(
            step=self._steps,
            chunks=draft.chunks,
            freed_rows=self._freed_rows,
            new_rows=draft.new_rows,
            pages=rewritten + draft.pages,
            copies=draft.copies,
            extras=extras,
        )
        self._freed_rows = []
        self._rewritten = []
        return plan


def new_row(request: Request) -> NewRow:
    """What the runner must know of a request that starts."""
    return NewRow(
        row=request.row,
        tokens=pack_ids(request.tokens()),
        prompt_len=request.prompt_len,
        sampling=request.spec.sampling,
        seed=request.spec.sampling.seed or 0,
        sample_index=request.spec.sample_index,
        logprobs=request.spec.logprobs,
        pool=request.spec.pool,
    )
