"""What the scheduler has before it, as plain data: who runs, who waits, pages, the steps in flight.

For operators who ask what a server is doing that does not answer. Reads the scheduler's parts,
changes nothing; holds no text and no token ids. Its cost is bounded (`MOST`), whatever waits.
"""

import time
from typing import TYPE_CHECKING, Any

from headrace.cache.radix import RadixCache
from headrace.scheduler.request import Request
from headrace.scheduler.watch import page_use

if TYPE_CHECKING:
    from headrace.scheduler.scheduler import Scheduler

# Requests of a kind that are shown; the others are counted.
MOST = 256
# What is shown of a request. Ages in seconds, the rest in tokens and pages.
FIELDS = (
    "rid", "age", "queued", "prompt", "output", "computed", "cached", "pages", "shared_pages",
    "inflight", "held", "retractions", "priority",
)  # fmt: skip


def overview(scheduler: "Scheduler") -> dict[str, Any]:
    """Everything, at this moment. `at` is CLOCK_MONOTONIC, `fields` names the columns of rows."""
    planner, now = scheduler.planner, scheduler.clock()
    waiting = planner.queue.waiting
    return {
        "at": time.monotonic(),
        "steps": scheduler.reporter.steps,
        "last_step": scheduler.reporter.log.last(scheduler.inflight),
        "inflight": [
            {
                "step": plan.step,
                "rows": len(plan.chunks),
                "tokens": sum(c.count for c in plan.chunks),
            }
            for plan in scheduler.plans
        ],
        "paused": planner.paused,
        "fields": FIELDS,
        "running_total": len(planner.running),
        "running": [_row(request, now) for request in planner.running[:MOST]],
        "waiting_total": len(waiting),
        "waiting": [_row(request, now) for request in waiting[:MOST]],
        "pages": page_use(scheduler.space),
        "radix": _radix(scheduler),
        "new_token_ratio": planner.ratio.value,
        "generated_tokens": scheduler.committer.generated_total,
        "retracted": planner.retracted_total,
        "aborted": scheduler.committer.aborted_total,
    }


def _row(request: Request, now: float) -> tuple[Any, ...]:
    admitted = request.admitted_at
    return (
        request.spec.rid,
        round(now - request.arrived, 3),
        round((admitted or now) - request.arrived, 3),
        request.prompt_len,
        len(request.out),
        request.computed,
        max(0, request.cached),
        len(request.pages),
        request.shared,
        request.inflight,
        request.held,
        request.retractions,
        request.spec.priority,
    )


def _radix(scheduler: "Scheduler") -> dict[str, float] | None:
    """Of the prefix tree, or None where prefixes are not kept."""
    planner, space = scheduler.planner, scheduler.space
    if not isinstance(space.cache, RadixCache):
        return None
    return {
        "namespaces": space.cache.namespaces,
        "pages": space.cache.held,
        "prompt_tokens": planner.prompt_tokens_total,
        "cached_tokens": planner.cached_tokens_total,
        "evicted_tokens": space.evicted_tokens,
    }
