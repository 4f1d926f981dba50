"""Requests that wait, in order of urgency and arrival, and the groups they belong to.

A group is the samples of one prompt (n > 1); its leader computes the prompt for all. Knows no
budgets and no pages.
"""

from headrace.core.config import ScheduleOptions
from headrace.scheduler.fairness import Shares
from headrace.scheduler.policy import choose
from headrace.scheduler.request import Request
from headrace.scheduler.space import Space

# How far down the queue to look for a request that can start.
_LOOK_AHEAD = 256
# Urgency of requests without a priority: below every priority.
_LEAST = -(1 << 62)


class Queue:
    """Owns the waiting requests and the leaders of groups."""

    def __init__(self, options: ScheduleOptions, space: Space) -> None:
        self.waiting: list[Request] = []
        self.leaders: dict[str, Request] = {}
        self._options = options
        self._space = space
        self._order = choose(options.schedule_policy, shares=space.cache.shares)
        self.shares = Shares()
        # Prompt tokens of the waiting requests.
        self.tokens = 0

    def __len__(self) -> int:
        return len(self.waiting)

    def add(self, request: Request) -> None:
        """Put a request where its urgency and arrival say."""
        if request.spec.group:
            self.leaders.setdefault(request.spec.group, request)
        self.waiting.append(request)
        self.tokens += request.prompt_len
        if len(self.waiting) > 1 and self._rank(self.waiting[-2]) > self._rank(request):
            self.waiting.sort(key=self._rank)

    def remove(self, request: Request) -> None:
        """It does not wait any more."""
        self.waiting.remove(request)
        self.tokens -= request.prompt_len

    def forget(self, request: Request) -> None:
        """The request is over; it leads no group and has no share any more."""
        self.shares.leave(request)
        if self.leaders.get(request.spec.group) is request:
            del self.leaders[request.spec.group]

    def leader_of(self, request: Request) -> Request | None:
        """Another request that computes (or has computed) the same prompt for the group."""
        leader = self.leaders.get(request.spec.group)
        return None if leader is request else leader

    def last(self) -> Request:
        """The least urgent one that waits."""
        return max(self.waiting, key=self._rank)

    def candidates(self, now: float) -> list[Request]:
        """In the order in which they may start: by urgency, shares, then by the policy."""
        if not self.waiting:
            return []
        order = self.shares.order(self._order(self.waiting, self._space, now))
        if self._options.enable_priority_scheduling:
            order.sort(key=lambda request: -self.urgency(request))
        return order[:_LOOK_AHEAD]

    def urgency(self, request: Request) -> int:
        """Larger is more urgent; the same for all when priorities are off."""
        options = self._options
        if not options.enable_priority_scheduling:
            return 0
        sign = -1 if options.schedule_low_priority_values_first else 1
        if request.spec.priority is not None:
            return sign * request.spec.priority
        default = options.default_priority_value
        return _LEAST if default is None else sign * default

    def _rank(self, request: Request) -> tuple[int, int]:
        return (-self.urgency(request), request.seq)
