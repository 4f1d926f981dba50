"""What the frontend measures of requests: plain counters and histograms, cheap on every token.

Written by one thread; a reader in another may see a histogram half a microsecond old. Knows no
names and no formats of metrics.
"""

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
STEP_SECONDS = (0.0002, 0.0005, *SECONDS[:14])
MASK_SECONDS = (0.00001, 0.00002, 0.00005, 0.0001, *STEP_SECONDS[:10])
TOKENS = tuple(float(1 << power) for power in range(18))


class Histogram:
    """Counts of values by bucket. `counts[i]` is of values in (bounds[i-1], bounds[i]]."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float], counts: Sequence[int], total: float) -> "Histogram":
        """One that was counted elsewhere; no counts at all stand for zeros."""
        found = cls(bounds)
        found.counts = list(counts) or found.counts
        found.sum = total
        return found

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value` as often as `times`."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class RequestMetrics:
    """Totals and distributions over all requests of one frontend. Times in seconds."""

    def __init__(self) -> None:
        self.requests = 0
        self.aborted = 0
        self.refused = 0
        self.resumed = 0
        self.poisonous = 0
        self.crashes = 0
        self.stopped = 0
        self.cut_short = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generation_tokens = 0
        self.time_to_first_token = Histogram(SECONDS)
        self.inter_token_latency = Histogram(STEP_SECONDS)
        self.time_per_output_token = Histogram(STEP_SECONDS)
        self.e2e_latency = Histogram(SECONDS)
        self.queue_time = Histogram(SECONDS)
        self.recovery = Histogram(SECONDS)
        self.prefill_time = Histogram(SECONDS)
        self.decode_time = Histogram(SECONDS)
        self.inference_time = Histogram(SECONDS)
        self.prompt_length = Histogram(TOKENS)
        self.generation_length = Histogram(TOKENS)
