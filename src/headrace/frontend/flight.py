"""A request between its departure to the scheduler and its final delta, whatever dies meanwhile.

After a crash it departs again as a new attempt that brings the output its client has, and goes on
there: outputs depend on nothing but the request, so what follows is what would have followed.
Invariant: whoever waits gets every token and every character once. Knows no sockets.
"""

import hashlib

import msgspec

from headrace.core.blame import CLEARED_AFTER
from headrace.core.messages import Delta, GenerateRequest, pack_ids
from headrace.frontend.delta import merge
from headrace.frontend.mailbox import Mailbox


def key_of(rid: str, origin: int) -> int:
    """64 bits that name a request where names are too long."""
    return int.from_bytes(hashlib.blake2b(f"{origin}:{rid}".encode(), digest_size=8).digest())


class Flight:
    """`request` is as it was sent first."""

    __slots__ = (
        "abandoned", "attempt", "chars", "first", "held", "index", "last_at", "mailbox", "out",
        "request", "resumed_at", "sent_at", "skip", "stream", "strikes",
    )  # fmt: skip

    def __init__(
        self, mailbox: Mailbox, index: int, request: GenerateRequest, sent_at: float
    ) -> None:
        self.mailbox = mailbox
        self.index = index
        self.request = request
        self.stream = request.stream
        self.sent_at = sent_at
        # When its last tokens came, 0 before the first.
        self.last_at = 0.0
        self.held: Delta | None = None
        # Its consumer is gone: the rid is taken until the scheduler has let go of it.
        self.abandoned = False
        self.attempt = 0
        # Crashes it was part of, without much progress between them.
        self.strikes = 0
        # What has come so far; cached tokens, queue time and time of the first token as they were
        # told first, since a later attempt has others.
        self.out: list[int] = []
        self.chars = 0
        self.first: tuple[int, float, float] | None = None
        # Where this attempt began, in tokens, and how many characters of it are known already.
        self.resumed_at = 0
        self.skip = 0

    def accept(self, delta: Delta) -> Delta | None:
        """News as the consumer shall see it; None if it is of an attempt that was given up."""
        if delta.attempt != self.attempt:
            return None
        if delta.finish is None:
            self.out += delta.ids
        if self.attempt:
            delta = self._continued(delta)
        self.chars += len(delta.text)
        if self.first is None:
            self.first = delta.cached_tokens, delta.queue_time, delta.first_token_time
        return delta

    def deliver(self, delta: Delta) -> None:
        """Pass news on; without streaming, only when it is complete."""
        if self.abandoned:
            return
        if self.held is not None:
            delta, self.held = merge(self.held, delta), None
        if self.stream or delta.finish is not None:
            self.mailbox.put(self.index, delta)
        else:
            self.held = delta

    def again(self) -> GenerateRequest:
        """The request of the next attempt. It streams, so that a second crash costs less."""
        self.attempt += 1
        self.skip, self.resumed_at = self.chars, len(self.out)
        return msgspec.structs.replace(
            self.request,
            out=pack_ids(self.out),
            attempt=self.attempt,
            strikes=self.strikes,
            stream=True,
        )

    def strike(self) -> None:
        """It was part of a crash."""
        cleared = len(self.out) - self.resumed_at >= CLEARED_AFTER
        self.strikes = 1 if cleared else self.strikes + 1

    def _continued(self, delta: Delta) -> Delta:
        """News of a later attempt without the text that is known, and with the first one's
        numbers."""
        cut = min(self.skip, len(delta.text))
        self.skip -= cut
        delta = msgspec.structs.replace(delta, text=delta.text[cut:])
        if self.first is None:
            return delta
        cached, queued, first_token = self.first
        return msgspec.structs.replace(
            delta, cached_tokens=cached, queue_time=queued, first_token_time=first_token
        )
