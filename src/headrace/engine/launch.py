"""Starts everything but the protocols: both children, and the manager that talks to them.

    launch(config)       the children start first and import while this process reads the model's
                         files; returns when everything is loaded here
    wait_ready()         blocks until the children serve
    close()              ends them; nothing is left behind

Used by the Engine and by the server alike. What the children do not need is imported after they
have started: their imports are what a start waits for.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

from headrace.core.config import Config
from headrace.core.errors import BadRequest, WorkerLost
from headrace.core.model_info import ModelInfo
from headrace.core.serve_options import ServeOptions
from headrace.engine.boot import Boot, Ready, Resume, Serve, Suspend
from headrace.engine.restart import HTTP, SCHEDULER, Down, Up
from headrace.engine.stopwatch import Stopwatch
from headrace.engine.supervise import Event, Supervisor
from headrace.ipc.address import AddressFolder

logger = logging.getLogger(__name__)


def without_restarts(config: Config) -> Config:
    """A model on several machines ends when one of its processes does: nobody could start those of
    the others again."""
    if config.parallel.nnodes == 1:
        return config
    recover = dataclasses.replace(config.recover, on_crash="exit", standby=False)
    return dataclasses.replace(config, recover=recover)


def roles(serve: ServeOptions, ranks: int = 1) -> list[str]:
    """The children of a server, by the names they get; the scheduler is rank 0 of the model."""
    found = ["scheduler", "detokenizer"]
    found += [f"rank-{number}" for number in range(1, ranks)]
    found += [f"detokenizer-{number}" for number in range(1, serve.detokenizer_worker_num)]
    if serve.tokenizer_worker_num > 1:
        found += [f"http-{number}" for number in range(1, serve.tokenizer_worker_num + 1)]
    return found


class Launched:
    """A server without protocols. `config` is resolved; `watch` times this process's start."""

    def __init__(self, config: Config, watch: Stopwatch, listeners: Sequence[int] = ()) -> None:
        if not listeners and config.serve.tokenizer_worker_num > 1:
            raise BadRequest(
                "--tokenizer-worker-num is for servers; there is no HTTP here",
                field="tokenizer_worker_num",
            )
        config = without_restarts(config)
        self.watch = watch
        self.watch.begin("processes")
        self._listeners = list(listeners)
        ranks = len(config.parallel.ranks_here) if config.run.runner == "model" else 1
        children = roles(config.serve, ranks)
        inherited = {role: self._listeners for role in children if role.startswith(HTTP)}
        self.supervisor = Supervisor(children, config.run.runner, inherited, config.recover)
        self._folder: AddressFolder | None = None
        # What HTTP workers were told when they could begin, and what they wait for now.
        self.serve_order: Serve | None = None
        self._held: Suspend | None = None
        try:
            self._load(config)
        except BaseException:
            self.close()
            raise

    def _load(self, config: Config) -> None:
        self.watch.begin("model files")
        from headrace.engine import parts

        located = parts.locate(config)
        self.config, info, notes = parts.settle(located)
        for note in notes:
            logger.info(note)
        self._folder = AddressFolder()
        tokenizer = parts.load_tokenizer_of(self.config)
        self.info: ModelInfo = parts.with_tokenizer_ends(info, tokenizer)
        addresses = self._folder.addresses
        self.supervisor.boot(Boot(self.config.revealed(), self.info, addresses, self._listeners))
        self.watch.begin("manager")
        from headrace.frontend.tokenizer_manager import TokenizerManager

        templates = parts.load_templates_of(self.config)
        self.manager = TokenizerManager(
            self.config,
            self.info,
            tokenizer,
            templates,
            addresses,
            checks=parts.request_checks(self.config, self.info, tokenizer),
        )

    def wait_ready(self) -> dict[str, Ready]:
        """The reports of the children by role, once all of them serve. Blocks.

        Raises:
            LoadError: one of them cannot serve; the message says why.
        """
        return self.supervisor.wait_ready()

    async def open(
        self, reports: Mapping[str, Ready], on_lost: Callable[[WorkerLost], None] | None = None
    ) -> None:
        """Let the manager take requests; from now on it hears of lost children. On its loop.

        `on_lost` is called when one is lost for good and all requests have failed.
        """
        report = reports[SCHEDULER]
        assert report.limits is not None
        self.manager.memory = report.memory
        self.manager.open(report.limits)
        self.supervisor.pin(report.limits)
        import asyncio

        loop = asyncio.get_running_loop()

        def heard(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._hear, event, on_lost)

        self.supervisor.watch(heard)

    def _hear(self, event: Event, on_lost: Callable[[WorkerLost], None] | None) -> None:
        """A child was lost, or is back. Lost HTTP workers hold up nobody but their clients."""
        if isinstance(event, WorkerLost):
            logger.error(event.message)
            self.manager.fail(event)
            if on_lost is not None:
                on_lost(event)
        elif isinstance(event, Down):
            logger.error(event.why)
            for role in event.roles:
                if role.startswith(HTTP):
                    self.manager.abort_of(int(role.removeprefix(HTTP)))
            if (order := hold(event)) is not None:
                self._held = order
                self.manager.suspend(order.why, scheduler=order.scheduler, batch=event.batch)
                self.supervisor.tell(HTTP, order)
        else:
            self._up(event)

    def _up(self, event: Up) -> None:
        """All children serve again."""
        logger.warning("%s back after %.2f s", " and ".join(event.reports), event.seconds)
        for role in event.reports:
            if role.startswith(HTTP) and self.serve_order is not None:
                self.supervisor.tell(role, self.serve_order)
        if self._held is not None:
            self._held = None
            self.manager.resume()
            self.supervisor.tell(HTTP, Resume())

    def close(self) -> None:
        """End the children and remove the sockets. May be called twice."""
        self.supervisor.close()
        if self._folder is not None:
            self._folder.remove()


def hold(event: Down) -> Suspend | None:
    """What frontends do meanwhile; nothing if only other frontends were lost."""
    roles = [role for role in event.roles if not role.startswith(HTTP)]
    if not roles:
        return None
    return Suspend(event.why, SCHEDULER in roles, list(event.batch.items()))


def launch(
    config: Config, watch: Stopwatch | None = None, listeners: Sequence[int] = ()
) -> Launched:
    """Start the children and load what this process needs.

    `listeners` are descriptors of the sockets that HTTP workers accept from, if there are several.

    Raises:
        LoadError: the model cannot be loaded. BadRequest: a wrong option.
    """
    return Launched(config, watch or Stopwatch(), listeners)
