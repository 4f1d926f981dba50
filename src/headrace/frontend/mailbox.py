"""Where the news of requests waits for the coroutine that asked for them.

Lives on one event loop. News that comes faster than it is taken is merged: a slow consumer costs
memory for its tokens only. Knows no sockets.
"""

import asyncio

from headrace.core.messages import Delta
from headrace.frontend.delta import merge

# Merge what waits when there is this much of it.
_PILE = 64

News = list[tuple[int, Delta]]


class Mailbox:
    """News by the index of its request; one coroutine takes."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._news: News = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, delta: Delta) -> None:
        """Leave news of request `index`; wakes the taker."""
        news = self._news
        news.append((index, delta))
        if self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_result(None)
            self._waiter = None
        elif len(news) > _PILE:
            self._news = merged(news)

    async def take(self) -> News:
        """All news, at least one, and at most one of each request."""
        if not self._news:
            self._waiter = self._loop.create_future()
            await self._waiter
        news, self._news = self._news, []
        return news if len(news) == 1 else merged(news)


def merged(news: News) -> News:
    """One delta for each request, in the order of their first news."""
    found: dict[int, Delta] = {}
    for index, delta in news:
        found[index] = merge(found[index], delta) if index in found else delta
    return list(found.items())
