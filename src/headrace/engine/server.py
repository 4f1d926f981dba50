"""`headrace serve`: from a configuration to a served port, and to the end of everything.

The port is bound first, so that a second server fails at once and clients can wait for /health;
then the children start, and only then this process imports what is heavy.
"""

import faulthandler
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from headrace.core.config import Config, ObserveOptions, ServeOptions
from headrace.core.errors import LoadError
from headrace.engine.launch import launch
from headrace.engine.stopwatch import Stopwatch


def launch_server(config: Config) -> int:
    """Serve until asked to end; returns the exit code.

    Raises:
        HeadraceError: the server could not start, or one of its processes died.
    """
    watch = Stopwatch()
    faulthandler.enable()
    log_to_stderr(config.observe)
    with listening(config.serve) as listener:
        launched = launch(config, watch, listener.fileno())
        try:
            watch.begin("http")
            import asyncio

            import uvloop

            from headrace.engine.http import serve, serve_by_workers

            several = config.serve.tokenizer_worker_num > 1
            work = serve_by_workers if several else serve

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(work(launched, listener))
        finally:
            launched.close()
    return 0


@contextmanager
def listening(serve: ServeOptions) -> Iterator[socket.socket]:
    """A socket on which clients may already wait.

    Raises:
        LoadError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
    try:
        listener = socket.create_server((serve.host, serve.port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise LoadError(f"cannot listen on {serve.host}:{serve.port}: {reason}") from None
    with listener:
        yield listener


def log_to_stderr(observe: ObserveOptions) -> None:
    """The log of the main process."""
    logging.basicConfig(
        level=observe.log_level.upper(),
        stream=sys.stderr,
        format="%(asctime)s main %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )
