"""One-way typed channels over ZMQ PUSH and PULL.

    Sender(address) --------\
    Sender(address) ---------> Receiver(address, type)      binds; decodes and checks `type`

A message is one msgpack frame; a wrong one raises `msgspec.ValidationError` and can never run code.
Over a network both ends have a `Key`: messages are encrypted (CurveZMQ, rfc.zeromq.org/spec/26),
who does not have it is not heard, and a message has a largest size.
Queues have no limit (the scheduler limits what is in flight), nothing is kept after close. A
channel belongs to one thread. Knows nothing of what the messages mean.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import msgspec
import zmq
import zmq.utils.z85

if TYPE_CHECKING:
    import asyncio

T = TypeVar("T")

_RECONNECT_MS = 10
_MOST_BYTES = 64 << 20  # of a message over a network


class Key(NamedTuple):
    """The two halves that every end of a network's channels has."""

    public: bytes
    secret: bytes


def key_of(secret: str) -> Key:
    """The same key wherever the text is the same."""
    half = zmq.utils.z85.encode(sha256(b"headrace channels " + secret.encode()).digest())
    return Key(zmq.curve_public(half), half)


class Sender:
    """The writing end; connects, in any order with the receiver's bind."""

    def __init__(self, address: str, key: Key | None = None) -> None:
        self._context, self._socket = _open(zmq.PUSH, address, key)
        if key is not None:
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, key.public)
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

    def __init__(self, address: str, kind: Any, key: Key | None = None) -> None:
        self._context, self._socket = _open(zmq.PULL, address, key)
        if key is not None:
            self._socket.setsockopt(zmq.CURVE_SERVER, 1)
            self._socket.setsockopt(zmq.MAXMSGSIZE, _MOST_BYTES)
        self._socket.bind(address)
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
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


def _open(
    kind: int, address: str, key: Key | None
) -> "tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes]]":
    """A socket in a context of its own, so that closing it waits for nobody else."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RECONNECT_IVL, _RECONNECT_MS)
    if key is not None:
        socket.setsockopt(zmq.IPV6, "[" in address)
        socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)
    return context, socket
