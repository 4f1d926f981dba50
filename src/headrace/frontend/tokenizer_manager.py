"""The main process's end of the request path: tokenize, check, send; then sort what comes back.

    adapter --GenerateRequest--> TokenizerManager --ipc--> scheduler --> detokenizer
    adapter <------Delta-------- TokenizerManager <--------------ipc---------/

Everything runs on one event loop; only long texts are tokenized in threads. Invariants: an accepted
request yields exactly one final delta; a consumer that goes away aborts its requests at once. Knows
no protocols and no processes.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from typing import Any

import msgspec

from headrace.core.config import Config, Limits
from headrace.core.errors import HeadraceError, Overloaded
from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    Delta,
    Deltas,
    GenerateRequest,
    Inbound,
    News,
    PeerAsk,
    PeerMetrics,
    SchedulerStats,
    Verb,
)
from headrace.core.model_info import ModelInfo
from headrace.core.tenant import caller
from headrace.frontend.async_tokenizer import AsyncTokenizer
from headrace.frontend.flight import Flight
from headrace.frontend.mailbox import Mailbox
from headrace.frontend.measure import StepMeasure
from headrace.frontend.observer import Observer
from headrace.frontend.outlook import Outlook
from headrace.frontend.peers import Peers
from headrace.frontend.prepare import Preparation, Refused, RequestCheck
from headrace.frontend.questions import Questions
from headrace.frontend.quota import Quotas
from headrace.frontend.recovery import Recovery
from headrace.frontend.request_log import RequestLog
from headrace.frontend.requests import check_fresh, owned
from headrace.frontend.vitals import Vitals
from headrace.ipc.address import Addresses, numbered
from headrace.ipc.channels import Receiver, Sender
from headrace.metrics.record import RequestMetrics
from headrace.text.chat import TemplateManager
from headrace.text.tokenizer import Tokenizer

# How long counters of the scheduler are believed.
_FRESH_SECONDS = 0.3


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
        self._stats_at = 0.0
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
        self._questions = Questions(origin)
        self._texts = AsyncTokenizer(tokenizer)
        self._preparation = Preparation(config, tokenizer, self._texts, checks)
        self._quotas = Quotas()
        self.recovery = Recovery(self._flights, origin)
        self._failure: HeadraceError | None = None
        self._loop: asyncio.AbstractEventLoop
        self._sender: Sender | None = None
        self._receiver: Receiver[News] | None = None
        self._vitals = Vitals(
            addresses.folder,
            config.serve.detokenizer_worker_num,
            config.recover.watchdog_timeout,
        )

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
        for rid in list(self._flights):
            self.recovery.end(rid, error)
        self._questions.fail(error)

    def trouble(self) -> str:
        """What keeps requests from being answered now, or ""; asks nobody."""
        if self._failure is not None:
            return self._failure.message
        return self.recovery.why or self._vitals.trouble()

    def suspend(self, why: str, *, scheduler: bool, batch: Mapping[int, int]) -> None:
        """A process was lost and will be back; see `Recovery.begin`. Requests wait meanwhile."""
        self.recovery.begin(why, self.metrics, scheduler=scheduler, batch=batch)
        self._questions.fail(Overloaded(why))
        if scheduler and self._sender is not None:
            self._sender.close()
            self._sender = None

    def resume(self) -> None:
        """All processes serve again: what is in flight goes on from where its client is."""
        if not self.recovery.why:
            return
        if self._sender is None:
            self._sender = Sender(self._addresses.scheduler)
        if self.stats.is_paused:
            self._send(Control(0, "pause", {"mode": "in_place"}, self._origin))
        for message in self.recovery.messages(self.metrics):
            self._send(message)
        if self.stats.draining:
            self._send(Control(0, "drain", {}, self._origin))

    async def close(self) -> None:
        """End every request and close the channels. May be called twice."""
        self.fail(Overloaded("The server is shutting down."))
        self.recovery.why = ""
        self._texts.close()
        for channel in (self._receiver, self._sender):
            if channel is not None:
                channel.close()
        self._receiver = self._sender = None
        self.peers.close()
        self.outlook.close()
        self.observer.stop()  # waits for the last spans; nothing else is left to do

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
        self.check_room()
        began, tenant = time.monotonic(), caller.get()
        with self._quotas.admit(tenant, len(requests)) as usage:
            prepared = await self._prepare([owned(request, tenant) for request in requests])
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
                        if usage is not None:
                            usage.spend(delta)
                        yield index, delta

    def abort(self, rid: str = "", prefix: bool = False, all: bool = False) -> None:
        """End a request, those whose rid starts with `rid`, or all; unknown ones are ignored.

        A tenant ends only its own.
        """
        tenant = caller.get()
        message = AbortRequest(rid, prefix, all, tenant="" if tenant.admin else tenant.name)
        if self.recovery.why:
            self.recovery.abort(message)
        self._send(message)

    def abort_of(self, origin: int) -> None:
        """End the requests of another frontend, which is gone."""
        self._send(AbortRequest(all=True, origin=origin))

    async def control(self, verb: Verb, timeout: float = 30.0, **args: Any) -> ControlReply:
        """Ask the scheduler; `args` are those of `headrace.scheduler.control`.

        Raises:
            HeadraceError: no answer within `timeout` seconds, or the scheduler is gone.
        """
        self._check_alive()
        if self.recovery.why:
            raise Overloaded(self.recovery.why)
        return await self._questions.ask(self._send, verb, args, timeout)

    async def tokenize(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Raises BadRequest on a server without a tokenizer."""
        return (await self._texts.encode([text], add_special_tokens))[0]

    async def detokenize(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Raises BadRequest on a server without a tokenizer."""
        return await self._texts.decode(ids, skip_special_tokens)

    async def with_ids(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """The requests with `ids` in place of `text`."""
        return await self._texts.with_ids(requests)

    def check_room(self) -> None:
        """With a queue that was full a moment ago, refuse before any work is done.

        The scheduler decides where urgent requests displace others.
        """
        schedule, stats = self.config.schedule, self.stats
        most = schedule.max_queued_requests
        if most is None or stats.waiting < most or schedule.enable_priority_scheduling:
            return
        if time.monotonic() - self._stats_at < _FRESH_SECONDS:
            error = Overloaded(f"The request queue is full. It may hold {most} requests.")
            error.retry_after = stats.retry_after
            raise error

    # -- the way out --------------------------------------------------------------------------

    async def _prepare(self, requests: Sequence[GenerateRequest]) -> list[GenerateRequest]:
        """Tokenized and checked requests, with seeds."""
        self._check_alive()
        if self.limits is None:
            raise Overloaded("The model is still loading; try again in a moment.")
        try:
            return await self._preparation.prepare(requests, self.info, self.limits)
        except Refused as refusal:
            self.metrics.refused += 1
            raise refusal.error from None

    @contextmanager
    def _send_off(self, requests: Sequence[GenerateRequest]) -> Iterator[Mailbox]:
        """Send requests; on the way out, abort those that have not ended."""
        self._check_alive()
        if (most := self.config.schedule.max_queued_requests) is not None and self.limits:
            self.recovery.check_room(most + self.limits.max_running_requests)
        check_fresh([request.rid for request in requests], self._flights)
        mailbox = Mailbox(self._loop)
        now = time.monotonic()
        requests = [
            msgspec.structs.replace(request, received=now, origin=self._origin)
            for request in requests
        ]
        flights = [Flight(mailbox, i, request, now) for i, request in enumerate(requests)]
        try:
            for request, flight in zip(requests, flights, strict=True):
                self._flights[request.rid] = flight
                if not self.recovery.why:  # else `resume` does
                    self._send(request)
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

    def _send(self, message: Inbound) -> None:
        if self._sender is not None:
            self._sender.send(message)

    # -- the way back -------------------------------------------------------------------------

    def _receive(self, messages: Sequence[News]) -> None:
        for message in messages:
            if isinstance(message, Deltas):
                if message.stats is not None:
                    self.stats, self._stats_at = message.stats, time.monotonic()
                self._deliver(message.items)
            elif isinstance(message, PeerMetrics):
                self.peers.hear(message)
            elif isinstance(message, PeerAsk):
                self._answer_peer(message)
            else:
                self._questions.answer(message)

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
            if flight is None or (news := flight.accept(delta)) is None:
                continue
            delta = news
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
