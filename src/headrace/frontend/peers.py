"""What the frontends of one server tell each other: metrics of all, and how to log.

Each has its own counters; whoever is asked for metrics asks the others and adds up. Belongs to the
loop of its manager. A frontend alone has no peers, and all of this is local.
"""

import asyncio
import itertools
from collections.abc import Sequence
from typing import Any

from headrace.core.messages import PeerAsk, PeerMetrics
from headrace.ipc.channels import Sender
from headrace.metrics.record import Histogram, RequestMetrics

_PATIENCE = 2.0


class Peers:
    """The other frontends, by the addresses they listen at."""

    def __init__(self, origin: int, addresses: dict[int, str]) -> None:
        self._origin = origin
        self._addresses = addresses
        self._senders: dict[int, Sender] = {}
        self._ids = itertools.count(1)
        # By id of the question: who has not answered yet.
        self._waiting: dict[int, tuple[set[int], asyncio.Event]] = {}
        # What each has said last.
        self._known: dict[int, dict[str, Any]] = {}

    def start(self) -> None:
        """Connect; on the loop of the manager."""
        self._senders = {number: Sender(address) for number, address in self._addresses.items()}

    def close(self) -> None:
        """May be called twice."""
        for sender in self._senders.values():
            sender.close()
        self._senders = {}

    async def metrics(self, own: RequestMetrics) -> RequestMetrics:
        """The sum of all frontends. One that does not answer in time counts as it was before."""
        if not self._senders:
            return own
        id, complete = next(self._ids), asyncio.Event()
        self._waiting[id] = set(self._senders), complete
        try:
            for sender in self._senders.values():
                sender.send(PeerAsk(self._origin, id))
            async with asyncio.timeout(_PATIENCE):
                await complete.wait()
        except TimeoutError:
            pass
        finally:
            del self._waiting[id]
        return total([to_values(own), *self._known.values()])

    def tell_logging(self, settings: dict[str, Any]) -> None:
        """Let the others log in the same way."""
        for sender in self._senders.values():
            sender.send(PeerAsk(self._origin, logging=settings))

    def answer(self, ask: PeerAsk, own: RequestMetrics) -> None:
        """Send our metrics to who asked."""
        if (sender := self._senders.get(ask.origin)) is not None:
            sender.send(PeerMetrics(self._origin, ask.id, to_values(own)))

    def hear(self, answer: PeerMetrics) -> None:
        """An answer came."""
        self._known[answer.origin] = answer.values
        if (found := self._waiting.get(answer.id)) is not None:
            missing, complete = found
            missing.discard(answer.origin)
            if not missing:
                complete.set()


def to_values(metrics: RequestMetrics) -> dict[str, Any]:
    """Plain data: a number, or [counts, sum] of a histogram."""
    return {
        name: [list(value.counts), value.sum] if isinstance(value, Histogram) else value
        for name, value in vars(metrics).items()
    }


def total(parts: Sequence[dict[str, Any]]) -> RequestMetrics:
    """The sum of `to_values` of several frontends."""
    found = RequestMetrics()
    for name, value in vars(found).items():
        values = [part[name] for part in parts if name in part]
        if isinstance(value, Histogram):
            value.counts = [sum(counts) for counts in zip(*(v[0] for v in values), strict=True)]
            value.sum = sum(v[1] for v in values)
        else:
            setattr(found, name, sum(values))
    return found
