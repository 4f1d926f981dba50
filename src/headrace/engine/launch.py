"""Starts everything but the protocols: both children, and the manager that talks to them.

    launch(config)       the children start first and import while this process reads the model's
                         files; returns when everything is loaded here
    wait_ready()         blocks until the children serve
    close()              ends them; nothing is left behind

Used by the Engine and by the server alike. What the children do not need is imported after they
have started: their imports are what a start waits for.
"""

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from headrace.core.config import Config, ServeOptions
from headrace.core.errors import BadRequest, WorkerLost
from headrace.core.model_info import ModelInfo
from headrace.engine.boot import Boot, Ready
from headrace.engine.stopwatch import Stopwatch
from headrace.engine.supervise import Supervisor
from headrace.ipc.address import AddressFolder

logger = logging.getLogger(__name__)


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
        self.watch = watch
        self.watch.begin("processes")
        self._listeners = list(listeners)
        ranks = config.parallel.ranks if config.run.runner == "model" else 1
        children = roles(config.serve, ranks)
        inherited = {role: self._listeners for role in children if role.startswith("http-")}
        self.supervisor = Supervisor(children, config.run.runner, inherited)
        self._folder: AddressFolder | None = None
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
            checks=parts.request_checks(self.config, tokenizer),
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
        """Let the manager take requests, and fail them all if a child dies. On its loop."""
        report = reports["scheduler"]
        assert report.limits is not None
        self.manager.memory = report.memory
        self.manager.open(report.limits)
        import asyncio

        loop = asyncio.get_running_loop()

        def lost(error: WorkerLost) -> None:
            logger.error(error.message)
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self.manager.fail, error)
                if on_lost is not None:
                    loop.call_soon_threadsafe(on_lost, error)

        self.supervisor.when_lost(lost)

    def close(self) -> None:
        """End the children and remove the sockets. May be called twice."""
        self.supervisor.close()
        if self._folder is not None:
            self._folder.remove()


def launch(
    config: Config, watch: Stopwatch | None = None, listeners: Sequence[int] = ()
) -> Launched:
    """Start the children and load what this process needs.

    `listeners` are descriptors of the sockets that HTTP workers accept from, if there are several.

    Raises:
        LoadError: the model cannot be loaded. BadRequest: a wrong option.
    """
    return Launched(config, watch or Stopwatch(), listeners)
