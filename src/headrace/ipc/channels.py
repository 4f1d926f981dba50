"""One-way typed channels over ZMQ PUSH and PULL.

    Sender(address) --------\
    Sender(address) ---------> Receiver(address, type)      binds; decodes and checks `type`

A message is one msgpack frame; a wrong one raises `msgspec.ValidationError` and can never run code.
Queues have no limit (the scheduler limits what is in flight), nothing is kept after close. A
channel belongs to one thread. Knows nothing of what the messages mean.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec
import zmq

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_RECONNECT_MS = 10


class Sender:
    """The writing end; connects, in any order with the receiver's bind."""

    def __init__(self, address: str) -> None:
        self._context, self._socket = _open(zmq.PUSH)
        self._socket.connect(address)
        self._encode = msgspec.msgpack.Encoder().encode

    def send(self, message: Any) -> None:
        """Queue a message; never waits."""
        self._socket.send(self._encode(message), zmq.NOBLOCK)

    def close(self) -> None:
        """What was not delivered yet is dropped."""
        self._socket.close()
        self._context.term()


class Receiver(Generic[T]):
    """The reading end; binds. `kind` is a message type or a union of them."""

    def __init__(self, address: str, kind: Any) -> None:
        self._context, self._socket = _open(zmq.PULL)
        self._socket.bind(address)
        self._polled = [(self._socket, zmq.POLLIN)]
        self._decode: Callable[[bytes], T] = msgspec.msgpack.Decoder(kind).decode
        self._loop: asyncio.AbstractEventLoop | None = None

    def take(self, timeout_ms: int | None) -> list[T]:
        """All messages that wait; if none does, wait for one (None: without limit)."""
        return self._drain(-1 if timeout_ms is None else timeout_ms)

    def listen(self, loop: "asyncio.AbstractEventLoop", handle: Callable[[list[T]], None]) -> None:
        """Call `handle` on the loop with all waiting messages whenever some arrive."""

        def readable() -> None:
            # The descriptor tells only of new arrivals: the queue must be emptied each time.
            if messages := self._drain(0):
                handle(messages)

        self._loop = loop
        loop.add_reader(self._socket.fileno(), readable)
        loop.call_soon(readable)

    def close(self) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._socket.fileno())
        self._socket.close()
        self._context.term()

    def _drain(self, timeout_ms: int) -> list[T]:
        # Polling costs half of a receive that fails.
        messages: list[T] = []
        while zmq.zmq_poll(self._polled, timeout_ms):
            messages.append(self._decode(self._socket.recv(zmq.NOBLOCK)))
            timeout_ms = 0
        return messages


def _open(kind: int) -> "tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]":
    """A socket in a context of its own, so that closing it waits for nobody else."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    return context, socket
