"""What a watching person sees of the scheduler: its last steps, its pages, its prefix tree.

Costs one short list per step while nobody watches; the rest is worked out when asked, about once a
second. Reads the scheduler's parts, changes nothing, knows no sockets.
"""

from collections import deque
from typing import Any

from headrace.cache.outline import outline, shared_pages
from headrace.cache.radix import RadixCache
from headrace.scheduler.space import Space

# Steps that are remembered, and the most that one answer holds.
REMEMBERED = 1024
TREE_NODES = 80
STEP_FIELDS = ("step", "at", "seconds", "prefill", "decode", "cached")


class StepLog:
    """A ring of the last steps: number, time of launch (s), device time (s), and of what they were
    made: prompt tokens computed, rows that decode, prompt tokens found in the cache."""

    def __init__(self) -> None:
        self._steps: deque[list[float]] = deque(maxlen=REMEMBERED)

    def launched(self, step: int, at: float, prefill: int, decode: int, cached: int) -> None:
        """A step begins; its device time is not known yet."""
        self._steps.append([step, at, 0.0, prefill, decode, cached])

    def ended(self, behind: int, seconds: float) -> None:
        """The step before the last `behind` ones has ended; steps end in order."""
        self._steps[-1 - behind][2] = seconds

    def last(self, inflight: int) -> dict[str, float]:
        """The newest ended step by `STEP_FIELDS`; empty before the first."""
        number = len(self._steps) - 1 - inflight
        return dict(zip(STEP_FIELDS, self._steps[number], strict=True)) if number >= 0 else {}

    def since(self, step: int, inflight: int) -> list[list[float]]:
        """Ended steps with a number above `step`, in order of `STEP_FIELDS`."""
        ended = list(self._steps)[: len(self._steps) - inflight]
        return [record for record in ended if record[0] > step]


def page_use(space: Space) -> dict[str, int]:
    """KV pages by use; all kinds add up to `total`. Costs nothing."""
    pool, cache = space.pool, space.cache
    return {
        "total": pool.count,
        "free": pool.free,
        "unused": cache.evictable,
        "locked": cache.held - cache.evictable,
        "private": pool.count - pool.free - cache.held,
        "size": pool.page_size,
    }


def pages_of(space: Space) -> dict[str, int]:
    """`page_use`, and `shared`: a part of `locked` and `private`. Walks the prefix tree."""
    cache = space.cache
    shared = shared_pages(cache) if isinstance(cache, RadixCache) else 0
    return {**page_use(space), "shared": shared + space.pool.shared}


def tree_of(space: Space) -> list[list[Any]]:
    """The prefix tree as rows of `OutlineNode`, or nothing where prefixes are not kept."""
    cache = space.cache
    return list(map(list, outline(cache, TREE_NODES))) if isinstance(cache, RadixCache) else []
