"""One of several HTTP processes of a server: all accept from one socket.

Each has a tokenizer manager of its own; news reaches it by its number. It takes requests when the
parent says so, and ends when the parent says so, after what runs. Signals are the parent's matter.
"""

import asyncio
import socket
import threading
from collections.abc import Callable
from types import FrameType

from headrace.core.errors import WorkerLost
from headrace.engine import parts
from headrace.engine.boot import Boot, Fail, Order, Resume, Serve, Suspend
from headrace.engine.http import HttpServer, favor_the_loop, uvicorn_config
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.server.app import build_app


class WorkerServer(HttpServer):
    """uvicorn that ends only when it is told to."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to the whole group of processes; the parent decides what it means."""

    def drain(self) -> None:
        """Finish what runs, refuse the rest."""
        self.should_exit = True
        self._manager.ready.clear()


async def serve(
    boot: Boot, number: int, ready: Callable[[], None], next_order: Callable[[], Order]
) -> None:
    """Answer HTTP until told to end. `next_order` blocks; `ready` reports to the parent."""
    config = boot.config
    favor_the_loop()
    tokenizer = parts.load_tokenizer_of(config)
    manager = TokenizerManager(
        config,
        boot.info,
        tokenizer,
        parts.load_templates_of(config),
        boot.addresses,
        checks=parts.request_checks(config, boot.info, tokenizer),
        origin=number,
    )
    await manager.start()
    app = build_app(manager, config, boot.info)
    server = WorkerServer(uvicorn_config(app, config), manager)
    listeners = [socket.socket(fileno=fd) for fd in boot.listeners]
    for listener in listeners:
        listener.setblocking(False)
    ready()
    loop = asyncio.get_running_loop()

    def listen() -> None:
        while True:
            loop.call_soon_threadsafe(obey, server, manager, next_order())

    threading.Thread(target=listen, name="orders", daemon=True).start()
    try:
        await server.serve(sockets=listeners)
    finally:
        await manager.close()


def obey(server: WorkerServer, manager: TokenizerManager, order: Order) -> None:
    """Follow an order of the parent."""
    if isinstance(order, Serve):
        manager.memory, manager.startup = order.memory, order.startup
        manager.open(order.limits)
        manager.ready.set()
    elif isinstance(order, Suspend):
        manager.suspend(order.why, scheduler=order.scheduler, batch=dict(order.batch))
    elif isinstance(order, Resume):
        manager.resume()
    elif isinstance(order, Fail):
        error = WorkerLost(order.error)
        manager.fail(error)
        server.fail(error)
    else:
        server.drain()
