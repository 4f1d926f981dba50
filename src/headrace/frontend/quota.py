"""What each tenant may use: requests at once, requests and tokens per minute. One event loop's.

A limit per minute is a bucket that refills evenly. Tokens are counted when they are made, so a
tenant may go below zero and then waits until its bucket is above it again. Knows no keys.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from headrace.core.errors import RateLimited
from headrace.core.messages import Delta
from headrace.core.tenant import Tenant

_MINUTE = 60.0


class Bucket:
    """Holds at most `limit`, and gets that much per minute. A limit of 0 holds all."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self._limit = limit
        self._clock = clock
        self._level = float(limit)
        self._seen = clock()

    def take(self, amount: float) -> None:
        """Use `amount`, whatever is there."""
        self._refill()
        self._level -= amount

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there, or all it can hold; 0 if it is."""
        self._refill()
        missing = min(amount, self._limit) - self._level
        return missing * _MINUTE / self._limit if self._limit and missing > 0.0 else 0.0

    def _refill(self) -> None:
        now = self._clock()
        gained = (now - self._seen) * self._limit / _MINUTE
        self._level, self._seen = min(float(self._limit), self._level + gained), now


class Usage:
    """What one tenant uses."""

    def __init__(self, tenant: Tenant, clock: Callable[[], float]) -> None:
        self.running = 0
        self.requests = Bucket(tenant.requests_per_minute, clock)
        self.tokens = Bucket(tenant.tokens_per_minute, clock)

    def spend(self, news: Delta) -> None:
        """News of a request: prompt tokens that were not cached count once, and output."""
        first = news.completion_tokens <= len(news.ids)
        prompt = news.prompt_tokens - news.cached_tokens if first else 0
        self.tokens.take(prompt + len(news.ids))


class Quotas:
    """The usage of all tenants; tenants without limits cost nothing."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usage: dict[str, Usage] = {}

    @contextmanager
    def admit(self, tenant: Tenant, count: int) -> Iterator[Usage | None]:
        """Count `count` requests as running; None for a tenant without limits.

        Raises:
            RateLimited: names the limit, and when to come back.
        """
        if not (tenant.max_concurrent or tenant.requests_per_minute or tenant.tokens_per_minute):
            yield None
            return
        usage = self._usage.get(tenant.name)
        if usage is None:
            usage = self._usage[tenant.name] = Usage(tenant, self._clock)
        self._check(tenant, usage, count)
        usage.requests.take(count)
        usage.running += count
        try:
            yield usage
        finally:
            usage.running -= count

    def _check(self, tenant: Tenant, usage: Usage, count: int) -> None:
        if tenant.max_concurrent and usage.running + count > tenant.max_concurrent:
            raise _refusal(f"{tenant.max_concurrent} requests at once", 1.0)
        if wait := usage.requests.wait(count):
            raise _refusal(f"{tenant.requests_per_minute} requests per minute", wait)
        if wait := usage.tokens.wait(1):
            raise _refusal(f"{tenant.tokens_per_minute} tokens per minute", wait)


def _refusal(limit: str, wait: float) -> RateLimited:
    error = RateLimited(f"This API key may use {limit}; try again in {wait:.1f} s.")
    error.retry_after = wait
    return error
