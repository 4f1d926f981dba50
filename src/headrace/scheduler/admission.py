"""How much of the KV space a new request may count on: the new-token ratio.

Running requests rarely use all the output they may. The ratio is the share that is reserved for
them; it starts careful, falls while nothing goes wrong, and rises when requests had to give way.
Pure arithmetic; knows no pages.
"""

from collections.abc import Iterable

from headrace.scheduler.request import Request

# No request reserves more output than this, however much it may generate.
_RESERVE_AT_MOST = 4096
_START = 0.7
_LOWEST = 0.14
_DECAY_STEPS = 600


class NewTokenRatio:
    """The share of their remaining output that running requests reserve."""

    def __init__(self, conservativeness: float) -> None:
        self._start = min(1.0, _START * conservativeness)
        self._lowest = self._start * _LOWEST
        self._decay = (self._start - self._lowest) / _DECAY_STEPS
        self.value = self._start

    def decay(self) -> None:
        """A step went well."""
        self.value = max(self._lowest, self.value - self._decay)

    def raise_after_retraction(self, running: Iterable[Request]) -> None:
        """Pages ran out: reserve at least the share of output that was really produced."""
        done = wanted = 0
        for request in running:
            done += len(request.out)
            wanted += min(request.max_new_tokens, _RESERVE_AT_MOST)
        self.value = max(self.value, min(1.0, done / wanted if wanted else 1.0), self._start)

    def reset(self) -> None:
        """Nothing runs: start again."""
        self.value = self._start


def remaining_output(request: Request) -> int:
    return min(request.limit - request.known, _RESERVE_AT_MOST)


def reserved(running: Iterable[Request], ratio: float) -> int:
    """Tokens that running requests will still need."""
    total = 0.0
    for request in running:
        total += max(0, request.known - request.computed) + remaining_output(request) * ratio
    return int(total)


def needed(request: Request) -> int:
    """Tokens a new request will need beyond the prefix it has."""
    return request.known - request.computed + remaining_output(request)
