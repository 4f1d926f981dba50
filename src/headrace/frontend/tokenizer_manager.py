"""The main process's end of the request path: tokenize, check, send; then sort what comes back.

    adapter --GenerateRequest--> TokenizerManager --ipc--> scheduler --> detokenizer
    adapter <------Delta-------- TokenizerManager <--------------ipc---------/

Everything runs on one event loop; only long texts are tokenized in threads. Invariants: an accepted
request yields exactly one final delta; a consumer that goes away aborts its requests at once. Knows
no protocols and no processes.
"""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec

from headrace.core.config import Config, Limits
from headrace.core.errors import BadRequest, HeadraceError, Overloaded
from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    Delta,
    Deltas,
    FinishReason,
    GenerateRequest,
    Inbound,
    News,
    PeerAsk,
    PeerMetrics,
    SchedulerStats,
    Verb,
)
from headrace.core.model_info import ModelInfo
from headrace.frontend.async_tokenizer import AsyncTokenizer
from headrace.frontend.encode import for_model, shortened
from headrace.frontend.mailbox import Flight, Mailbox
from headrace.frontend.measure import StepMeasure
from headrace.frontend.observer import Observer
from headrace.frontend.outlook import Outlook
from headrace.frontend.peers import Peers
from headrace.frontend.request_log import RequestLog
from headrace.frontend.requests import continued, fan_out
from headrace.frontend.validate import validate
from headrace.ipc.address import Addresses, numbered
from headrace.ipc.channels import Receiver, Sender
from headrace.metrics.record import RequestMetrics
from headrace.text.chat import TemplateManager
from headrace.text.tokenizer import Tokenizer

# Raises BadRequest for a request that a feature cannot serve.
RequestCheck = Callable[[GenerateRequest], None]


class TokenizerManager:
    """Owns the requests in flight of one server.

    Requests are taken from the moment `open` gives the limits of a loaded model; `ready` tells the
    world that the server has also answered one. All methods belong to the loop of `start`.
    """

    def __init__(
        self,
        config: Config,
        info: ModelInfo,
        tokenizer: Tokenizer | None,
        templates: TemplateManager | None,
        addresses: Addresses,
        checks: Sequence[RequestCheck] = (),
        origin: int = 0,
    ) -> None:
        self.config = config
        self.info = info
        self.tokenizer = tokenizer
        self.templates = templates
        self.limits: Limits | None = None
        self.ready = asyncio.Event()
        self.stats = SchedulerStats()
        self.metrics = RequestMetrics()
        self.log = RequestLog.create(config.observe)
        self.observer = Observer(config, self.log)
        self.outlook = Outlook(addresses.folder)
        # For people: sizes in GiB and tokens, seconds by step of the start.
        self.memory: dict[str, float] = {}
        self.startup: dict[str, float] = {}
        self._addresses = addresses
        # Our number among the frontends of a server; the main process is 0.
        self._origin = origin
        workers = config.serve.tokenizer_worker_num
        others = set(range(1, workers + 1)) - {origin} if origin else set()
        self.peers = Peers(origin, {n: numbered(addresses.tokenizer, n) for n in others})
        self._flights: dict[str, Flight] = {}
        self._controls: dict[int, asyncio.Future[ControlReply]] = {}
        self._control_ids = itertools.count(1)
        self._seeds = random.Random(config.model.random_seed)
        self._texts = AsyncTokenizer(tokenizer)
        self._checks = checks
        self._failure: HeadraceError | None = None
        self._loop: asyncio.AbstractEventLoop
        self._sender: Sender | None = None
        self._receiver: Receiver[News] | None = None

    # -- life ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the channels; the other processes may come later."""
        self._loop = asyncio.get_running_loop()
        self._receiver = Receiver[News](numbered(self._addresses.tokenizer, self._origin), News)
        self._receiver.listen(self._loop, self._receive)
        self._sender = Sender(self._addresses.scheduler)
        self.peers.start()

    def open(self, limits: Limits) -> None:
        """The scheduler has loaded its model: take requests."""
        self.limits = limits

    def fail(self, error: HeadraceError) -> None:
        """Nothing can be answered any more: end every request with `error`, refuse new ones."""
        self._failure = error
        self.ready.clear()
        finish = FinishReason("abort", message=error.message, status=error.status, kind=error.kind)
        flights, self._flights = self._flights, {}
        for rid, flight in flights.items():
            flight.deliver(Delta(rid, finish=finish))
        for reply in self._controls.values():
            if not reply.done():
                reply.set_exception(error)

    async def close(self) -> None:
        """End every request and close the channels. May be called twice."""
        self.fail(Overloaded("The server is shutting down."))
        self._texts.close()
        for channel in (self._receiver, self._sender):
            if channel is not None:
                channel.close()
        self._receiver = self._sender = None
        self.peers.close()
        self.outlook.close()
        await asyncio.to_thread(self.observer.stop)

    # -- requests -----------------------------------------------------------------------------

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        """The news of one request, ending with the one that has a finish reason.

        News that has piled up comes as one; without `stream` there is one delta in all. Close the
        generator to abort (leaving `async for` early, or cancelling its task, does).

        Raises:
            BadRequest: before anything is sent. An end by error is a delta, see `error_of`.
        """
        async with aclosing(self.generate_many([request])) as news:
            async for _, delta in news:
                yield delta

    async def generate_many(
        self, requests: Sequence[GenerateRequest]
    ) -> AsyncGenerator[tuple[int, Delta], None]:
        """(index, delta) of several requests as it comes, until all have ended; like `generate`.

        When one request is refused, none is sent.
        """
        began = time.monotonic()
        prepared = await self._prepare(requests)
        with (
            self.observer.watching(prepared, began) as marked,
            self._send_off(marked) as mailbox,
        ):
            if self.log.on:
                self.log.received(requests, prepared)
            left = len(prepared)
            while left:
                for index, delta in await mailbox.take():
                    left -= delta.finish is not None
                    yield index, delta

    def fan_out(self, request: GenerateRequest) -> list[GenerateRequest]:
        """The n samples of a request, each a request of its own."""
        return fan_out(request)

    def abort(self, rid: str = "", prefix: bool = False, all: bool = False) -> None:
        """End a request, those whose rid starts with `rid`, or all; unknown ones are ignored."""
        self._send(AbortRequest(rid, prefix, all))

    async def control(self, verb: Verb, timeout: float = 30.0, **args: Any) -> ControlReply:
        """Ask the scheduler; `args` are those of `headrace.scheduler.control`.

        Raises:
            HeadraceError: no answer within `timeout` seconds, or the scheduler is gone.
        """
        self._check_alive()
        message = Control(next(self._control_ids), verb, args, self._origin)
        reply = self._controls[message.id] = self._loop.create_future()
        try:
            self._send(message)
            async with asyncio.timeout(timeout):
                return await reply
        except TimeoutError:
            raise HeadraceError(f"no answer to {verb} within {timeout:g} s") from None
        finally:
            del self._controls[message.id]

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises BadRequest on a server without a tokenizer."""
        return (await self._texts.encode([text], add_special_tokens))[0]

    async def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises BadRequest on a server without a tokenizer."""
        return await self._texts.decode(ids, skip_special_tokens)

    async def with_ids(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """The requests with `ids` in place of `text`."""
        return await self._texts.with_ids(requests)

    # -- the way out --------------------------------------------------------------------------

    async def _prepare(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """Tokenized and checked requests, with seeds. Samples of a group share theirs."""
        self._check_alive()
        if self.limits is None:
            raise Overloaded("The model is still loading; try again in a moment.")
        truncate = self.config.serve.allow_auto_truncate
        seeds: dict[str, int] = {}
        prepared = []
        for request in await self._texts.with_ids(requests):
            assert request.sampling.n == 1, "fan_out first"
            bos = self.tokenizer.bos_token_id if self.tokenizer else None
            special = self.tokenizer.special_ids if self.tokenizer else frozenset[int]()
            fitting = for_model(continued(request, bos), self.info)
            fitting = shortened(fitting, self.limits.max_request_tokens, special, truncate)
            checked = validate(fitting, self.info.vocab_size, self.limits, truncate)
            for check in self._checks:
                try:
                    await self._texts.apply(check, checked)
                except BadRequest:
                    self.metrics.refused += 1
                    raise
            if checked.sampling.seed is None:
                seed = seeds.setdefault(checked.group or checked.rid, self._seeds.getrandbits(63))
                sampling = msgspec.structs.replace(checked.sampling, seed=seed)
                checked = msgspec.structs.replace(checked, sampling=sampling)
            prepared.append(checked)
        return prepared

    @contextmanager
    def _send_off(self, requests: Sequence[GenerateRequest]) -> Iterator[Mailbox]:
        """Send requests; on the way out, abort those that have not ended."""
        self._check_alive()
        self._check_fresh([request.rid for request in requests])
        mailbox = Mailbox(self._loop)
        now = time.monotonic()
        flights = [Flight(mailbox, i, r.stream, now) for i, r in enumerate(requests)]
        try:
            for request, flight in zip(requests, flights, strict=True):
                self._flights[request.rid] = flight
                self._send(msgspec.structs.replace(request, received=now, origin=self._origin))
            self.metrics.requests += len(requests)
            yield mailbox
        finally:
            for request, flight in zip(requests, flights, strict=True):
                if self._flights.get(request.rid) is flight:
                    flight.abandoned = True
                    self._send(AbortRequest(request.rid, origin=self._origin or -1))

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _check_fresh(self, rids: Sequence[str]) -> None:
        taken = [rid for rid in rids if rid in self._flights]
        if not taken and len(set(rids)) < len(rids):
            taken = [rid for rid in rids if rids.count(rid) > 1]
        if taken:
            raise BadRequest(f"rid {taken[0]!r} is in use by another request", field="rid")

    def _send(self, message: Inbound) -> None:
        if self._sender is not None:
            self._sender.send(message)

    # -- the way back -------------------------------------------------------------------------

    def _receive(self, messages: Sequence[News]) -> None:
        for message in messages:
            if isinstance(message, Deltas):
                if message.stats is not None:
                    self.stats = message.stats
                self._deliver(message.items)
            elif isinstance(message, PeerMetrics):
                self.peers.hear(message)
            elif isinstance(message, PeerAsk):
                self._answer_peer(message)
            elif (reply := self._controls.get(message.id)) is not None and not reply.done():
                reply.set_result(message)

    def _answer_peer(self, ask: PeerAsk) -> None:
        if ask.logging is None:
            self.peers.answer(ask, self.metrics)
        else:
            self.log.configure(**ask.logging)

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        flights = self._flights
        measure = StepMeasure(self.metrics, time.monotonic())
        for delta in deltas:
            flight = flights.get(delta.rid)
            if flight is None:
                continue
            if delta.finish is not None:
                del flights[delta.rid]
            measure.add(flight, delta)
            if delta.timeline is not None:
                self.observer.end(delta)
            if self.log.on:
                self.log.add(delta)
            if delta.timeline is not None:
                delta = self.observer.shown(delta)
            flight.deliver(delta)
        measure.close()
