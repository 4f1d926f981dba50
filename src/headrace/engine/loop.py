"""The scheduler's loop: messages in, one step, results out. Knows no processes and no models."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn, Protocol

from headrace.core.messages import ControlReply, Inbound, Outbound
from headrace.core.serve_options import ServeOptions
from headrace.engine.snapshots import Snapshots
from headrace.frontend.flight import key_of
from headrace.frontend.router import Outlet, to_detokenizers, to_frontends
from headrace.ipc.address import Addresses
from headrace.ipc.channels import Receiver
from headrace.ipc.pulse import Pulse
from headrace.scheduler.request import Request
from headrace.scheduler.trace import Trace

# When requests wait but none can run: how long until the next look.
_BLOCKED_MS = 2


class Roll:
    """Writes down who is being computed, for the case that it is the last thing we do."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._key = lru_cache(maxsize=1 << 14)(key_of)

    def call(self, requests: Sequence[Request]) -> bool:
        """Remember these; are any of them under suspicion, so that their progress counts?"""
        entries = [(self._key(one.rid, one.spec.origin), one.strikes) for one in requests]
        self._pulse.batch(entries)
        return any(strikes for _, strikes in entries)


class Steps(Protocol):
    """What the loop needs of a scheduler."""

    @property
    def idle(self) -> bool: ...
    @property
    def trace(self) -> Trace: ...
    @property
    def arrivals(self) -> int: ...
    def overview(self) -> dict[str, Any]: ...
    def submit(self, message: Inbound) -> None: ...
    def step(self) -> bool: ...
    def take(self) -> list[Outbound]: ...


class Ports(NamedTuple):
    """The scheduler's ends of the channels."""

    inbox: Receiver[Inbound]
    deltas: Outlet
    replies: Outlet
    snapshots: Snapshots


def open_ports(addresses: Addresses, serve: ServeOptions) -> Ports:
    """Bind the scheduler's address and connect to the others."""
    return Ports(
        inbox=Receiver[Inbound](addresses.scheduler, Inbound),
        deltas=to_detokenizers(addresses, serve.detokenizer_worker_num),
        replies=to_frontends(addresses, serve.tokenizer_worker_num),
        snapshots=Snapshots(addresses.folder),
    )


def run(scheduler: Steps, ports: Ports, pulse: Pulse) -> NoReturn:
    """Serve for ever. Sleeps while the scheduler is idle."""
    progressed = True
    while True:
        progressed = turn(scheduler, ports, pulse, progressed)
        ports.snapshots.update(scheduler)


def turn(scheduler: Steps, ports: Ports, pulse: Pulse, progressed: bool) -> bool:
    """One round; `progressed` is what the round before returned."""
    wait = None if scheduler.idle else 0 if progressed else _BLOCKED_MS
    if wait is None:
        pulse.rest()
    messages = ports.inbox.take(wait)
    pulse.begin()
    for message in messages:
        scheduler.submit(message)
    progressed = scheduler.step()
    if news := scheduler.take():
        began = scheduler.trace.mark()
        for out in news:
            (ports.replies if isinstance(out, ControlReply) else ports.deltas).send(out)
        scheduler.trace.add("send", began)
    return progressed
