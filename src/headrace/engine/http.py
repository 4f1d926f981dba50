"""HTTP in front of a launched engine: app, uvicorn, the moment of being ready, the end.

SIGTERM and SIGINT let running requests finish for --drain-timeout; a second signal does not wait.
A child that dies ends the server with an error. /health answers 503 while the children load.
"""

import asyncio
import gc
import logging
import signal
import socket
import sys
from contextlib import aclosing
from types import FrameType
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from headrace.core.config import Config
from headrace.core.errors import HeadraceError, WorkerLost
from headrace.core.messages import SamplingParams
from headrace.core.serve_options import ServeOptions
from headrace.engine.boot import Drain, Fail, Serve
from headrace.engine.door import (
    NotEveryBadRequest,
    guarded_by_host,
    refresh_certificates,
    short_headed,
    tls_options,
)
from headrace.engine.launch import Launched
from headrace.engine.stopwatch import process_age, table
from headrace.frontend.encode import probe
from headrace.frontend.requests import new_rid
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.frontend.validate import error_of
from headrace.metrics.record import RequestMetrics
from headrace.server.app import build_app

logger = logging.getLogger(__name__)

_LOST_SECONDS = 1
_WARM_UP = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)


def favor_the_loop() -> None:
    """Threads that read large bodies give the loop its turn after 1 ms instead of Python's 5."""
    sys.setswitchinterval(0.001)


async def serve(launched: Launched, listeners: list[socket.socket]) -> None:
    """Answer HTTP on every listener while the children load, and then for real."""
    manager, config = launched.manager, launched.config
    favor_the_loop()
    await manager.start()
    app = build_app(manager, config, launched.info)
    server = HttpServer(uvicorn_config(app, config), manager)
    launched.watch.begin("wait for children")
    tasks = [
        asyncio.create_task(open_for_service(launched, server, listeners[0])),
        asyncio.create_task(app.state.work()),
        *certificates(server.config, config.serve),
    ]
    try:
        await server.serve(sockets=listeners)
    finally:
        for task in tasks:
            task.cancel()
        launched.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await manager.close()
    if server.failure is not None:
        raise server.failure


def certificates(config: uvicorn.Config, serve: ServeOptions) -> list["asyncio.Task[None]"]:
    """The task that takes renewed certificates, if there is to be one."""
    if not serve.enable_ssl_refresh or not serve.ssl_certfile:
        return []
    config.load()
    assert config.ssl is not None
    return [asyncio.create_task(refresh_certificates(config.ssl, serve))]


async def serve_by_workers(launched: Launched, listeners: list[socket.socket]) -> None:
    """Let the HTTP workers answer; this process tells them when to begin and end."""
    manager, loop = launched.manager, asyncio.get_running_loop()
    await manager.start()
    ending = Ending()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, ending.ask)
    launched.watch.begin("wait for children")
    opening = asyncio.create_task(open_for_service(launched, ending, listeners[0]))
    try:
        await ending.first.wait()
        for listener in listeners:
            listener.close()  # clients that come now are refused, as the workers close theirs
        if manager.ready.is_set() or isinstance(ending.failure, WorkerLost):
            await end_workers(launched, ending)
    finally:
        opening.cancel()
        launched.close()
        await asyncio.gather(opening, return_exceptions=True)
        await manager.close()
    if ending.failure is not None:
        raise ending.failure


async def end_workers(launched: Launched, ending: "Ending") -> None:
    """Let the HTTP workers finish what runs, or say why it fails; a second signal does not wait."""
    lost = ending.failure
    order = Drain() if lost is None else Fail(lost.message)
    seconds = (launched.config.serve.drain_timeout if lost is None else _LOST_SECONDS) + 1.0
    drained = asyncio.to_thread(launched.supervisor.drain, "http-", order, seconds)
    hurry = asyncio.create_task(ending.second.wait())
    await asyncio.wait((hurry, asyncio.create_task(drained)), return_when=asyncio.FIRST_COMPLETED)
    hurry.cancel()


class Ending:
    """When a server with workers ends, and why."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        self.failure: HeadraceError | None = None

    def ask(self) -> None:
        """A signal came; the second one does not wait."""
        (self.second if self.first.is_set() else self.first).set()

    def fail(self, error: HeadraceError) -> None:
        """End now, and with this error."""
        self.failure = self.failure or error
        self.first.set()


async def open_for_service(
    launched: Launched, server: "HttpServer | Ending", listener: socket.socket
) -> None:
    """Wait for the children, try one generation, and tell the world."""
    manager, watch = launched.manager, launched.watch
    try:
        reports = await asyncio.to_thread(launched.wait_ready)
        await launched.open(reports, server.fail)
        watch.begin("warm-up")
        if not launched.config.serve.skip_server_warmup:
            await warm_up(manager)
        watch.begin("")
    except HeadraceError as error:
        server.fail(error)
        return
    gc.collect()
    gc.freeze()
    manager.startup = {"total": process_age(), **watch.seconds}
    processes = {"main": watch.seconds, **{role: r.seconds for role, r in reports.items()}}
    for line in table(processes, manager.startup["total"]):
        logger.info(line)
    assert manager.limits is not None
    serve = Serve(manager.limits, manager.memory, manager.startup)
    launched.serve_order = serve
    launched.supervisor.tell("http-", serve)
    manager.ready.set()
    logger.info("The server is ready at %s", url_of(listener, launched.config.serve))


async def warm_up(manager: TokenizerManager) -> None:
    """A first generation through all processes, without a trace in cache and metrics.

    Raises:
        HeadraceError: it failed.
    """
    request = probe(manager.info, new_rid(), [0, 1 % manager.info.vocab_size], _WARM_UP)
    async with aclosing(manager.generate(request)) as news:
        async for delta in news:
            if delta.finish is not None and (error := error_of(delta.finish)) is not None:
                raise error
    await manager.control("flush_cache")
    manager.metrics = RequestMetrics()


class Served(Protocol):
    """What stops being ready when the server is asked to end."""

    ready: asyncio.Event


class HttpServer(uvicorn.Server):
    """uvicorn that ends without raising the signal again, and remembers why it failed."""

    def __init__(self, config: uvicorn.Config, manager: Served) -> None:
        super().__init__(config)
        self.failure: HeadraceError | None = None
        self._manager = manager

    def fail(self, error: HeadraceError) -> None:
        """End soon, and with this error."""
        self.failure = self.failure or error
        self.config.timeout_graceful_shutdown = _LOST_SECONDS
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called by the signals that end a server; new requests are refused from here on."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._manager.ready.clear()


def uvicorn_config(app: ASGIApp, config: Config) -> uvicorn.Config:
    """uvicorn with the fast parts, and our logging."""
    level = config.observe.log_level_http
    logging.getLogger("uvicorn.error").addFilter(NotEveryBadRequest())
    return uvicorn.Config(
        guarded_by_host(app, config.serve),
        http=short_headed(config.serve.max_header_bytes),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=level,
        access_log=level in ("debug", "info"),
        server_header=False,
        timeout_keep_alive=config.serve.timeout_keep_alive,
        timeout_graceful_shutdown=config.serve.drain_timeout,
        **tls_options(config.serve),
    )


def url_of(listener: socket.socket, serve: ServeOptions) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    scheme = "https" if serve.ssl_certfile else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
