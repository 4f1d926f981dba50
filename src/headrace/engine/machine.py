"""`headrace serve --node-rank 1` and higher: a machine that holds ranks and takes no requests.

Its children are follower ranks, whose scheduler is on machine 0. /health tells whether they are
loaded; nothing else is served. When one of them ends, or machine 0 is gone, so does this server.
"""

import asyncio
import logging
import socket

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from headrace.core.config import Config
from headrace.core.errors import HeadraceError, WorkerLost
from headrace.engine import parts
from headrace.engine.boot import Boot
from headrace.engine.http import HttpServer, url_of, uvicorn_config
from headrace.engine.launch import without_restarts
from headrace.engine.restart import Down, Up
from headrace.engine.supervise import Supervisor
from headrace.ipc.address import AddressFolder

logger = logging.getLogger(__name__)


class Machine:
    """The ranks of this machine. `ready` is set while they can be used."""

    def __init__(self, config: Config) -> None:
        """Raises HeadraceError: the model cannot be found, or an option contradicts it."""
        config = without_restarts(config)
        self.ready = asyncio.Event()
        self.config, info, notes = parts.settle(parts.locate(config))
        for note in notes:
            logger.info(note)
        info = parts.with_tokenizer_ends(info, parts.load_tokenizer_of(self.config))
        roles = [f"rank-{rank}" for rank in self.config.parallel.ranks_here]
        self._folder = AddressFolder()
        self.supervisor = Supervisor(roles, config.run.runner, {}, config.recover)
        self.supervisor.boot(Boot(self.config.revealed(), info, self._folder.addresses))

    async def wait_ready(self, server: HttpServer, where: str) -> None:
        """Let /health tell when all ranks are loaded, and the server end when one is lost."""
        loop = asyncio.get_running_loop()

        def heard(event: Down | Up | WorkerLost) -> None:
            if isinstance(event, WorkerLost):
                loop.call_soon_threadsafe(server.fail, event)

        try:
            await asyncio.to_thread(self.supervisor.wait_ready)
        except HeadraceError as error:
            server.fail(error)
            return
        self.supervisor.watch(heard)
        self.ready.set()
        logger.info("The ranks of machine %d are ready; health at %s", self._number, where)

    @property
    def _number(self) -> int:
        return self.config.parallel.node_rank

    async def health(self, request: Request) -> Response:
        """200 when all ranks are loaded, else 503."""
        return PlainTextResponse("", 200 if self.ready.is_set() else 503)

    def close(self) -> None:
        self.supervisor.close()
        self._folder.remove()


async def serve_ranks(machine: Machine, listeners: list[socket.socket]) -> None:
    """Until asked to end, or a rank is lost; raises HeadraceError for the latter."""
    config = machine.config
    app = Starlette(routes=[Route("/health", machine.health, methods=["GET"])])
    server = HttpServer(uvicorn_config(app, config), machine)
    waiting = asyncio.create_task(machine.wait_ready(server, url_of(listeners[0], config.serve)))
    try:
        await server.serve(sockets=listeners)
    finally:
        machine.close()
        await asyncio.gather(waiting, return_exceptions=True)
    if server.failure is not None:
        raise server.failure
