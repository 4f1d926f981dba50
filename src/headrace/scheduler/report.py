"""What the scheduler tells people: log lines and counters.

The lines keep the wording that dashboards and scripts of SGLang users parse. Reads the scheduler's
parts, changes nothing.
"""

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from headrace.core.messages import SchedulerStats
from headrace.core.plan import StepPlan
from headrace.scheduler.commit import Committer, OutputRules
from headrace.scheduler.planner import Planner
from headrace.scheduler.request import Request
from headrace.scheduler.space import diverged
from headrace.scheduler.watch import STEP_FIELDS, StepLog, pages_of, tree_of

logger = logging.getLogger(__name__)

# The longest that a refused client is told to wait (seconds).
_LONGEST_RETRY = 300.0


class Reporter:
    """Counts steps and prints a line for prefills and for every n-th decode step."""

    def __init__(
        self,
        planner: Planner,
        committer: Committer,
        output: OutputRules,
        clock: Callable[[], float],
    ) -> None:
        self._planner = planner
        self._committer = committer
        self._interval = output.decode_log_interval
        self._divergence = output.log_cache_divergence
        self._clock = clock
        self._started = self._window_start = clock()
        self._window_tokens = 0
        self._decode_steps = 0
        self.steps = 0
        self.throughput = 0.0
        self.log = StepLog()

    def planned(self, plan: StepPlan) -> None:
        """Account a launched plan and maybe log it."""
        self.steps += 1
        prompts = [chunk.count for chunk in plan.chunks if chunk.count > 1]
        prefill, cached = sum(prompts), 0
        if plan.new_rows:
            cached = self._prefilled(plan, prefill)
            for new in plan.new_rows:
                # One that failed in planning has left its row.
                if (request := self._planner.rows.get(new.row)) is not None:
                    self._diverged(request)
        age = self._clock() - self._started
        self.log.launched(self.steps, age, prefill, len(plan.chunks) - len(prompts), cached)
        if not prefill:
            self._decode_steps += 1
            if self._decode_steps % self._interval == 0:
                self._decoded()

    def stats(self) -> SchedulerStats:
        planner, space = self._planner, self._planner.space
        return SchedulerStats(
            running=len(planner.running),
            waiting=len(planner.queue),
            used_tokens=space.used_tokens,
            evictable_tokens=space.cache.evictable * space.page_size,
            max_total_tokens=planner.limits.max_total_tokens,
            prompt_tokens_total=planner.prompt_tokens_total,
            cached_tokens_total=planner.cached_tokens_total,
            generated_tokens_total=self._committer.generated_total,
            requests_total=planner.requests_total,
            aborted_total=self._committer.aborted_total,
            retracted_total=planner.retracted_total,
            failed_steps_total=self._committer.failed_steps_total,
            evicted_tokens_total=space.evicted_tokens,
            steps_total=self.steps,
            gen_throughput=self.throughput if planner.running else 0.0,
            new_token_ratio=planner.ratio.value,
            uptime=self._clock() - self._started,
            max_running_requests=planner.limits.max_running_requests,
            paused=len(planner.running) if planner.paused else 0,
            draining=int(planner.draining),
            retry_after=self.retry_after,
            is_paused=planner.paused,
            **{key: value for one in planner.features for key, value in one.stats().items()},
        )

    @property
    def retry_after(self) -> float:
        """Seconds until half of the queue is gone, at the pace of late; 1 s to 5 min."""
        seconds = self._committer.pace.seconds_for(len(self._planner.queue) / 2)
        return min(max(seconds, 1.0), _LONGEST_RETRY)

    def watched(self, since: int, inflight: int) -> dict[str, Any]:
        """What a dashboard shows: counters, pages, tree, and the steps after number `since`."""
        space = self._planner.space
        return {
            "stats": msgspec.structs.asdict(self.stats()),
            "pages": pages_of(space),
            "tree": tree_of(space),
            "fields": STEP_FIELDS,
            "steps": self.log.since(since, inflight),
        }

    def _prefilled(self, plan: StepPlan, tokens: int) -> int:
        """Log a step that admits requests; returns how many of their tokens were cached."""
        starts = {chunk.row: chunk.start for chunk in plan.chunks}
        cached = sum(starts.get(row.row, 0) for row in plan.new_rows)
        logger.info(
            "Prefill batch, #new-seq: %d, #new-token: %d, #cached-token: %d, "
            "token usage: %.2f, #running-req: %d, #queue-req: %d",
            len(plan.new_rows),
            tokens,
            cached,
            self._usage(),
            len(self._planner.running),
            len(self._planner.queue),
        )
        return cached

    def _diverged(self, request: Request) -> None:
        """Tell where the prompt left one that is in the cache, if that is asked for."""
        if request.retractions or not (self._divergence or request.timeline):
            return
        found = diverged(request, self._planner.space.page_size)
        if found is None:
            return
        if request.timeline is not None:
            request.timeline.diverged = found
        if self._divergence and found.at >= self._divergence:
            logger.info(
                "Cache: the prompt of request %s diverged at token %d of %d from request %s",
                request.rid,
                found.at,
                found.length,
                found.rid,
            )

    def _decoded(self) -> None:
        now = self._clock()
        done = self._committer.generated_total
        seconds = max(1e-9, now - self._window_start)
        self.throughput = (done - self._window_tokens) / seconds
        self._window_start, self._window_tokens = now, done
        logger.info(
            "Decode batch, #running-req: %d, #token: %d, token usage: %.2f, "
            "gen throughput (token/s): %.2f, #queue-req: %d",
            len(self._planner.running),
            self._planner.space.used_tokens,
            self._usage(),
            self.throughput,
            len(self._planner.queue),
        )

    def _usage(self) -> float:
        return self._planner.space.used_tokens / max(1, self._planner.limits.max_total_tokens)
