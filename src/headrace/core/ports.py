"""Ports for servers that bind them later, in a process of their own.

Linux gives ports from 32768 on to every outgoing connection: one of those may be taken between the
look and the bind. So the choice is made below them. Knows nothing of who will listen.
"""

import contextlib
import random
import socket

_FIRST, _END = 20_000, 32_768
_TRIES = 100


def free_port(host: str = "127.0.0.1") -> int:
    """A TCP port that nobody listens on now.

    Raises:
        OSError: `host` is no address of this machine, or everything is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    dice = random.SystemRandom()
    for _ in range(_TRIES):
        port = dice.randrange(_FIRST, _END)
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.bind((host, port))
            return port
    raise OSError(f"no port of {host} can be bound")
