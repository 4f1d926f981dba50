"""The requests of one frontend while a process they need is away and comes back.

    crash ──> begin: those that cannot go on end, the others wait
    ready ──> messages: every one departs again, from where its client is

Of an aborted request nothing is sent again. Belongs to the loop of its manager; knows no sockets.
"""

import time
from collections.abc import Mapping

from headrace.core.blame import culprit
from headrace.core.errors import HeadraceError, Overloaded, WorkerLost
from headrace.core.messages import AbortRequest, Delta, FinishReason, GenerateRequest
from headrace.frontend.flight import Flight, key_of
from headrace.metrics.record import RequestMetrics


class Recovery:
    """`flights` is the manager's, by rid; `why` there are no answers at the moment, or ""."""

    def __init__(self, flights: dict[str, Flight], origin: int) -> None:
        self.why = ""
        self._flights = flights
        self._origin = origin
        self._since = 0.0
        # To repeat when there is a scheduler again: other frontends may have such requests.
        self._aborts: list[AbortRequest] = []

    def begin(
        self, why: str, metrics: RequestMetrics, *, scheduler: bool, batch: Mapping[int, int]
    ) -> None:
        """A process was lost: the `scheduler`, or one that its news goes through.

        `batch` is what the scheduler was computing, as `culprit` reads it.
        """
        self._since = self._since if self.why else time.monotonic()
        self.why = why
        if self._origin <= 1:  # one of several frontends counts
            metrics.crashes += 1
        guilty = culprit(batch)
        for rid, flight in list(self._flights.items()):
            key = key_of(rid, self._origin) if batch else 0
            if key in batch:
                flight.strike()
            if key in batch and key == guilty:
                metrics.poisonous += 1
                self.end(rid, WorkerLost("This request ended the process that served it twice."))
            elif scheduler and flight.request.session is not None:
                self.end(rid, WorkerLost("Its session was lost with the process that held it."))
            elif not scheduler:
                flight.attempt += 1  # news that is still under way has gaps

    def messages(self, metrics: RequestMetrics) -> list[GenerateRequest | AbortRequest]:
        """All processes serve again: what to send."""
        self.why = ""
        if self._origin <= 1:
            metrics.recovery.observe(time.monotonic() - self._since)
        found: list[GenerateRequest | AbortRequest] = []
        # Who is under suspicion is tried before others run.
        for rid, flight in sorted(self._flights.items(), key=lambda item: -item[1].strikes):
            if flight.abandoned:
                del self._flights[rid]
            else:
                found.append(flight.again())
        metrics.resumed += len(found)
        found += self._aborts
        self._aborts = []
        return found

    def abort(self, message: AbortRequest) -> None:
        """End requests that wait here."""
        self._aborts.append(message)
        for rid, flight in list(self._flights.items()):
            hit = rid.startswith(message.rid) if message.prefix else rid == message.rid
            if message.tenant and message.tenant != flight.request.tenant:
                continue
            if message.all or (hit and message.rid):
                del self._flights[rid]
                flight.deliver(Delta(rid, finish=FinishReason("abort", message=message.message)))

    def end(self, rid: str, error: HeadraceError) -> None:
        """End a request without the scheduler."""
        finish = FinishReason("abort", message=error.message, status=error.status, kind=error.kind)
        self._flights.pop(rid).deliver(Delta(rid, finish=finish))

    def check_room(self, most: int) -> None:
        """While no scheduler knows its queue, ours is bounded; raises Overloaded."""
        if self.why and len(self._flights) >= most:
            raise Overloaded(f"The request queue is full. {self.why}")
