"""The interface of prefix caches, and the trivial one that shares nothing.

A prefix cache owns pages that were given to it by `insert` until `evict` or `clear` hands them
back. Pages of a locked node are never evicted. Knows nothing of requests or devices.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np


class Prefix(NamedTuple):
    """A prefix found or stored: its pages in order, and the node to lock while they are used."""

    pages: list[int]
    node: Any


class PrefixCache(Protocol):
    """What the scheduler asks of a prefix cache. Token arrays are int32, shape [n]."""

    shares: bool
    """Whether prefixes are shared between requests at all."""

    @property
    def evictable(self) -> int:
        """Pages that `evict` could hand back now."""
        ...

    @property
    def held(self) -> int:
        """All pages owned by the cache, locked or not."""
        ...

    def match(self, namespace: str, tokens: np.ndarray, *, use: bool = True) -> Prefix:
        """The longest stored prefix of `tokens` in whole pages. Locks nothing.

        `use=False` only looks: it does not count as a use for eviction.
        """
        ...

    def insert(
        self,
        namespace: str,
        tokens: np.ndarray,
        pages: list[int],
        priority: int,
        owner: str = "",
    ) -> Prefix:
        """Store the whole pages of `tokens` for the request `owner`; returns the cache's pages.

        Where the returned page equals the given one, the cache now owns it; where it differs, the
        prefix was already stored and the caller keeps (and should release) its own page.
        """
        ...

    def lock(self, node: Any) -> None:
        """Protect a node and its ancestors from eviction."""
        ...

    def unlock(self, node: Any) -> None:
        """Undo one `lock`."""
        ...

    def evict(self, count: int) -> list[int]:
        """Give up unlocked pages, at least `count` if there are so many; returns them."""
        ...

    def clear(self) -> list[int]:
        """Forget everything that is not locked; returns the pages."""
        ...


class ChunkCache:
    """No sharing between requests (--disable-radix-cache): every method does nothing."""

    shares = False
    evictable = 0
    held = 0

    def match(self, namespace: str, tokens: np.ndarray, *, use: bool = True) -> Prefix:
        return Prefix([], None)

    def insert(
        self,
        namespace: str,
        tokens: np.ndarray,
        pages: list[int],
        priority: int,
        owner: str = "",
    ) -> Prefix:
        return Prefix([], None)

    def lock(self, node: Any) -> None:
        return

    def unlock(self, node: Any) -> None:
        return

    def evict(self, count: int) -> list[int]:
        return []

    def clear(self) -> list[int]:
        return []
