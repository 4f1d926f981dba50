"""Which process gets a message, where there are several frontends or detokenizers.

    scheduler --ByRequest--> detokenizers --ByOrigin--> frontends

All news of a request takes one way, so that its order is kept. Without several of a kind a plain
`Sender` does. Knows nothing of what the news says.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Protocol

from headrace.core.messages import Delta, Deltas, Outbound
from headrace.ipc.address import Addresses, numbered
from headrace.ipc.channels import Sender


class Outlet(Protocol):
    """What a process sends its results to."""

    def send(self, message: Outbound) -> None: ...


class MultiTokenizerRouter:
    """News and replies to the frontend that asked; counters to all of them."""

    def __init__(self, senders: Sequence[Outlet]) -> None:
        self._senders = senders

    def send(self, message: Outbound) -> None:
        """Queue a message for whom it concerns."""
        if not isinstance(message, Deltas):
            self._senders[message.origin].send(message)
            return
        parts = _split(message.items, lambda delta: delta.origin)
        for number, sender in enumerate(self._senders):
            if number in parts or message.stats is not None:
                sender.send(Deltas(parts.get(number, []), message.stats))


class ByRequest:
    """News spread over detokenizers by the name of the request."""

    def __init__(self, senders: Sequence[Outlet]) -> None:
        self._senders = senders

    def send(self, message: Outbound) -> None:
        """Queue the parts of a step's news. Counters take the first way, so that the last ones
        come last."""
        assert isinstance(message, Deltas)
        stats, count = message.stats, len(self._senders)
        parts = _split(message.items, lambda delta: zlib.crc32(delta.rid.encode()) % count)
        for number, sender in enumerate(self._senders):
            if number in parts or stats is not None:
                sender.send(Deltas(parts.get(number, []), stats))
            stats = None


def _split(items: Sequence[Delta], key: Callable[[Delta], int]) -> dict[int, list[Delta]]:
    parts: dict[int, list[Delta]] = {}
    for delta in items:
        parts.setdefault(key(delta), []).append(delta)
    return parts


def to_frontends(addresses: Addresses, workers: int) -> Outlet:
    """The way to the frontends: the main process, and `workers` more if there are several."""
    if workers == 1:
        return Sender(addresses.tokenizer)
    return MultiTokenizerRouter(
        [Sender(numbered(addresses.tokenizer, number)) for number in range(workers + 1)]
    )


def to_detokenizers(addresses: Addresses, workers: int) -> Outlet:
    """The way to the detokenizers."""
    if workers == 1:
        return Sender(addresses.detokenizer)
    return ByRequest([Sender(numbered(addresses.detokenizer, n)) for n in range(workers)])
