"""`headrace serve`: from a configuration to a served port, and to the end of everything.

The port is bound first, so that a second server fails at once and clients can wait for /health;
then the children start, and only then this process imports what is heavy.
"""

import dataclasses
import faulthandler
import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.serve_options import ObserveOptions, ServeOptions
from headrace.engine.launch import launch
from headrace.engine.stopwatch import Stopwatch

logger = logging.getLogger(__name__)

MAX_QUEUED = 2048


def launch_server(config: Config) -> int:
    """Serve until asked to end; returns the exit code.

    Raises:
        HeadraceError: the server could not start, or one of its processes died.
    """
    watch = Stopwatch()
    faulthandler.enable()
    log_to_stderr(config.observe)
    check_exposure(config.serve)
    config = bounded(config)
    with ExitStack() as stack:
        ports = [config.serve.port, *filter(None, [config.serve.admin_port])]
        listeners = [stack.enter_context(listening(config.serve.host, port)) for port in ports]
        if config.parallel.node_rank:
            return _serve_ranks(config, listeners)
        launched = launch(config, watch, [listener.fileno() for listener in listeners])
        try:
            watch.begin("http")
            import asyncio

            import uvloop

            from headrace.engine.http import serve, serve_by_workers

            several = config.serve.tokenizer_worker_num > 1
            work = serve_by_workers if several else serve

            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(work(launched, listeners))
        finally:
            launched.close()
    return 0


def _serve_ranks(config: Config, listeners: list[socket.socket]) -> int:
    import asyncio

    import uvloop

    from headrace.engine.machine import Machine, serve_ranks

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve_ranks(Machine(config), listeners))
    return 0


def bounded(config: Config) -> Config:
    """With an end to the queue: whoever comes later is told so at once."""
    if config.schedule.max_queued_requests is not None:
        return config
    schedule = dataclasses.replace(config.schedule, max_queued_requests=MAX_QUEUED)
    return dataclasses.replace(config, schedule=schedule)


def check_exposure(serve: ServeOptions) -> None:
    """Say what others can reach, and what they can read.

    Raises:
        LoadError: a file of keys or certificates is wrong. Told before anything starts.
    """
    from headrace.core.tenant import read_keys, readable_by_others
    from headrace.engine.door import is_local, tls_options

    tls_options(serve)
    if serve.api_key_file:
        read_keys(serve.api_key_file)
    if not is_local(serve.host) and not (serve.api_key or serve.api_key_file):
        logger.warning("Everybody who reaches %s may use this server: set --api-key", serve.host)
    if serve.api_key_file and readable_by_others(serve.api_key_file):
        logger.warning("--api-key-file %s can be read by other users", serve.api_key_file)


@contextmanager
def listening(host: str, port: int) -> Iterator[socket.socket]:
    """A socket on which clients may already wait.

    Raises:
        LoadError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = error.strerror or error
        raise LoadError(f"cannot listen on {host}:{port}: {reason}") from None
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
