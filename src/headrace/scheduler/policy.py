"""In which order waiting requests are looked at: one pure function per policy.

A policy sees the waiting requests, the space (for cached prefixes) and the time; it changes
nothing. Ties keep the order of arrival. Knows no budgets.
"""

import random
from collections.abc import Callable, Sequence

from headrace.scheduler.request import Request
from headrace.scheduler.space import Space

# Matching every waiting prompt against the tree is not worth it beyond this queue length.
_MAX_MATCHED = 128

Order = Callable[[Sequence[Request], Space, float], list[Request]]


def fcfs(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """First come, first served."""
    return list(waiting)


def lpm(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """Longest matched prefix first."""
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, space, now)
    return sorted(waiting, key=lambda request: space.uncached(request) - request.known)


def dfs_weight(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """Depth-first over the prefix tree, the subtree with the most waiting requests first."""
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, space, now)
    paths: dict[int, list[int]] = {}
    weight: dict[int, int] = {}
    for request in waiting:
        limit = max(0, request.known - 1)
        tokens = request.tokens()[:limit]
        node = space.cache.match(space.namespace(request), tokens, use=False).node
        path: list[int] = []
        while node is not None:
            path.append(id(node))
            weight[id(node)] = weight.get(id(node), 0) + 1
            node = node.parent
        paths[request.seq] = path[::-1]
    # Requests below a node come before those that end at it.
    end = (1, 0)
    first = {key: seq for seq in reversed(sorted(paths)) for key in paths[seq]}
    return sorted(
        waiting,
        key=lambda request: [*((-weight[key], first[key]) for key in paths[request.seq]), end],
    )


def shortest_prefill_first(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """Fewest tokens to compute first."""
    if len(waiting) > _MAX_MATCHED:
        return sorted(waiting, key=lambda request: request.known)
    return sorted(waiting, key=space.uncached)


def hrrn(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """Highest response ratio next: waiting time over work, so that nobody starves."""
    if len(waiting) > _MAX_MATCHED:
        return fcfs(waiting, space, now)
    return sorted(
        waiting,
        key=lambda request: -(now - request.arrived) / max(1, space.uncached(request)),
    )


def lof(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """Longest output first."""
    return sorted(waiting, key=lambda request: -request.max_new_tokens)


def shuffled(waiting: Sequence[Request], space: Space, now: float) -> list[Request]:
    """A random order that is the same for the same requests."""
    seed = hash(tuple(request.seq for request in waiting))
    return random.Random(seed).sample(list(waiting), len(waiting))


POLICIES: dict[str, Order] = {
    "fcfs": fcfs,
    "priority": fcfs,
    "lpm": lpm,
    "dfs-weight": dfs_weight,
    "shortest-prefill-first": shortest_prefill_first,
    "hrrn": hrrn,
    "lof": lof,
    "random": shuffled,
}
CACHE_AWARE = {"lpm", "dfs-weight", "hrrn"}


def choose(name: str, *, shares: bool) -> Order:
    """The policy `name`; without a prefix cache the cache-aware ones are fcfs."""
    if not shares and name in CACHE_AWARE:
        return fcfs
    return POLICIES[name]
