"""KV pages of requests: where they come from, who owns them, where they go.

    pages of a request:  [ 0 ........ shared )[ shared ........ len )
                           owned by the cache,   owned by the request,
                           protected by `node`   released at the end

Every page a request uses passes through here, so that none is lost. Knows no plans or policies.
"""

from collections.abc import Callable

import numpy as np

from headrace.cache.divergence import divergence
from headrace.cache.pages import PagePool
from headrace.cache.prefix import PrefixCache
from headrace.cache.radix import Node
from headrace.core.timeline import Divergence
from headrace.scheduler.request import Request


class Space:
    """The page pool and the prefix cache seen as one."""

    def __init__(
        self, pool: PagePool, cache: PrefixCache, scope: Callable[[int], str] = lambda length: ""
    ) -> None:
        """`scope(prompt_len)`: prompts of different scope share no prefixes (a model's rule)."""
        self.pool = pool
        self.cache = cache
        self._scope = scope
        self.evicted_tokens = 0

    @property
    def page_size(self) -> int:
        return self.pool.page_size

    @property
    def room(self) -> int:
        """Tokens that could be stored now, evicting if needed."""
        return (self.pool.free + self.cache.evictable) * self.page_size

    @property
    def used_tokens(self) -> int:
        """Tokens of pages in use by requests (evictable prefixes not counted)."""
        return (self.pool.count - self.pool.free - self.cache.evictable) * self.page_size

    def enter(self, request: Request) -> None:
        """Give a request the stored prefix of its tokens, locked.

        At least one token is left to compute (its logits are needed), and all positions whose
        logits must score the prompt.
        """
        limit = min(request.known - 1, request.score_from) if request.reuse else 0
        prefix = self.cache.match(self.namespace(request), request.tokens()[: max(0, limit)])
        if prefix.node is not None:
            self.cache.lock(prefix.node)
        request.pages = list(prefix.pages)
        request.shared = len(prefix.pages)
        request.node = prefix.node
        request.computed = len(prefix.pages) * self.page_size

    def fork(self, request: Request, leader: Request) -> list[tuple[int, int]]:
        """Let a sample use the prompt that its group's leader has computed.

        Whole pages are shared; a page that the prompt fills in part is copied. Returns the copies
        (source page, destination page). The leader's prompt must have been committed: copies are
        made before the chunks of a plan write.
        """
        size = self.page_size
        usable = min(request.prompt_len - 1, request.score_from, leader.computed)
        whole, rest = divmod(usable, size)
        more = leader.pages[len(request.pages) : whole]
        self.pool.share(more)
        request.pages += more
        request.computed = max(request.computed, len(request.pages) * size)
        if rest == 0 or len(request.pages) != whole:
            return []
        copy = self.take(1)
        if copy is None:
            return []
        request.pages += copy
        request.computed = usable
        return [(leader.pages[whole], copy[0])]

    def take(self, count: int) -> list[int] | None:
        """Pages for a request, evicting prefixes if needed; None when there are not enough."""
        missing = count - self.pool.free
        if missing > self.cache.evictable:
            return None
        if missing > 0:
            freed = self.cache.evict(missing)
            self.evicted_tokens += len(freed) * self.page_size
            self.pool.release(freed)
        return self.pool.take(count)

    def keep(self, request: Request, length: int) -> bool:
        """Store the first `length` tokens of a request as a prefix, and go on using it.

        Pages that the cache already had replace the request's own, which hold the same values;
        returns whether that happened (the runner must then be told).
        """
        size = self.page_size
        whole = length // size
        tokens = request.tokens()[: whole * size]
        prefix = self.cache.insert(
            self.namespace(request), tokens, request.pages[:whole], request.priority, request.rid
        )
        if prefix.node is None:
            return False
        self.cache.lock(prefix.node)
        if request.node is not None:
            self.cache.unlock(request.node)
        own = request.pages[request.shared : whole]
        kept = prefix.pages[request.shared :]
        duplicates = [mine for mine, theirs in zip(own, kept, strict=True) if mine != theirs]
        self.pool.release(duplicates)
        request.pages[: len(prefix.pages)] = prefix.pages
        request.shared = len(prefix.pages)
        request.node = prefix.node
        return bool(duplicates)

    def leave(self, request: Request, keep: int) -> None:
        """Take all pages from a request; the first `keep` tokens stay as a prefix."""
        if keep > 0 and request.reuse:
            self.keep(request, keep)
        self.pool.release(request.pages[request.shared :])
        if request.node is not None:
            self.cache.unlock(request.node)
        request.pages = []
        request.shared = 0
        request.node = None

    def clear(self) -> None:
        """Forget all prefixes that nobody uses."""
        self.pool.release(self.cache.clear())

    def namespace(self, request: Request) -> str:
        """Requests of different namespaces share no prefixes."""
        return self._scope(request.prompt_len) + request.spec.namespace

    def uncached(self, request: Request) -> int:
        """Tokens a waiting request would have to compute (for policies)."""
        if not request.reuse:
            return request.known
        limit = max(0, min(request.known - 1, request.score_from))
        prefix = self.cache.match(self.namespace(request), request.tokens()[:limit], use=False)
        return request.known - len(prefix.pages) * self.page_size


def diverged(request: Request, page_size: int) -> Divergence | None:
    """Where the prompt of a request that was just admitted left a stored one, of which it shares at
    least a page."""
    node, cached = request.node, request.shared * page_size
    if not isinstance(node, Node) or not cached:
        return None
    found = divergence(node, request.prompt[cached:])
    if found is None:
        return None
    shared, owner = found
    return Divergence(cached + shared, request.prompt_len, owner)


def shares_prefix(request: Request, other: Request, at_least: int) -> bool:
    """Do two requests of one namespace agree on the next `at_least` tokens after `computed`?"""
    if request.spec.namespace != other.spec.namespace:
        return False
    start, stop = request.computed, request.computed + at_least
    mine, theirs = request.prompt[start:stop], other.prompt[start:stop]
    return (
        len(mine) == at_least == len(theirs)
        and bool(np.array_equal(mine, theirs))
        and bool(np.array_equal(request.prompt[:start], other.prompt[:start]))
    )
