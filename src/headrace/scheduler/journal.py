"""What a scheduler heard, was answered and decided, in a file from which it can be run again.

A scheduler is a function of its messages, the results of its plans, and what it asks outside:
features, stop strings, the model's rule for prefixes, the time. `Recorder` stands around a
scheduler and writes these down, one entry per turn, with digests of its plans and deltas;
`headrace.sim.replay` gives them back. Entries are msgpack with a length in front.
The file holds prompts and is readable by its owner only.
"""

import hashlib
import logging
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.config import Limits
from headrace.core.errors import HeadraceError, LoadError
from headrace.core.messages import Deltas, FinishReason, GenerateRequest, Inbound, Outbound
from headrace.core.plan import StepPlan, StepResult
from headrace.scheduler.feature import Feature, Runner
from headrace.scheduler.request import Request, StopMatcher
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.trace import Trace

logger = logging.getLogger(__name__)

MAGIC = b"headrace journal 1\n"
_LENGTH = struct.Struct("<I")
_LARGEST_ENTRY = 1 << 30
# Questions about a request in one step, in the order in which `Told` answers them.
QUESTIONS = ("check", "ready", "admit", "chain", "draft", "holds")


class Header(msgspec.Struct, frozen=True, tag="h", array_like=True):
    """What a scheduler is made of. `features`: how many stand beside it."""

    schedule: dict[str, Any]
    cache: dict[str, Any]
    limits: Limits
    eos_token_ids: list[int]
    stream_interval: int
    features: int


class Turn(msgspec.Struct, frozen=True, tag="t", array_like=True):
    """One turn of the loop: messages, one step, deltas. `at`: the time in all of it."""

    at: float
    messages: list[Inbound] = []
    answers: list[Any] = []
    results: list[StepResult] = []
    plans: list[bytes] = []
    sent: bytes = b""


class FrozenClock:
    """The same time for everything that happens in a turn."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class JournalFile:
    """Writes entries until `most` bytes are there, and then says so."""

    def __init__(self, path: str, most: int) -> None:
        """Raises LoadError when the file cannot be made; one that is there is not overwritten."""
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise LoadError(f"--record-schedule {path}: {error.strerror}") from None
        self._path, self._left = path, most
        self._file: Any = os.fdopen(handle, "wb")
        self._file.write(MAGIC)

    def write(self, entry: Header | Turn) -> None:
        """Append an entry; a full disk ends the recording, not the server."""
        if self._file is None:
            return
        data = msgspec.msgpack.encode(entry)
        self._left -= len(data) + _LENGTH.size
        try:
            if self._left >= 0:
                self._file.write(_LENGTH.pack(len(data)) + data)
                self._file.flush()
                return
            logger.warning("The recording %s is complete: it has all it may", self._path)
        except OSError as error:
            logger.warning("The recording %s ends: %s", self._path, error)
        self.close()

    def close(self) -> None:
        """Write nothing more. May be called twice."""
        if self._file is not None:
            file, self._file = self._file, None
            file.close()


def read_journal(path: str) -> Iterator[Header | Turn]:
    """The entries of a file. What a killed server had not written whole is left out.

    Raises:
        LoadError: it is no journal, or an entry cannot be read.
    """
    decoder = msgspec.msgpack.Decoder(Header | Turn)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise LoadError(f"{path}: {error.strerror}") from None
    if not data.startswith(MAGIC):
        raise LoadError(f"{path}: this is no recording of a scheduler")
    place = len(MAGIC)
    while place + _LENGTH.size <= len(data):
        (size,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if size > _LARGEST_ENTRY:
            raise LoadError(f"{path}: an entry of {size} bytes at byte {place}")
        if place + size > len(data):
            return
        try:
            yield decoder.decode(data[place : place + size])
        except msgspec.MsgspecError as error:
            raise LoadError(f"{path}: the entry at byte {place} cannot be read: {error}") from None
        place += size


def digest_of(plan: StepPlan) -> bytes:
    """Stands for a plan without the extras of features."""
    return _digest(msgspec.structs.replace(plan, extras=()))


def digest_of_sent(sent: Sequence[Outbound]) -> bytes:
    """Stands for deltas; counters and answers to verbs are not decisions."""
    items = [delta for out in sent if isinstance(out, Deltas) for delta in out.items]
    return _digest(items) if items else b""


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(msgspec.msgpack.encode(value), digest_size=8).digest()


class Recorder:
    """A scheduler that is written down. Make its parts with the methods, then `wrap` it."""

    def __init__(self, file: JournalFile) -> None:
        self.clock = FrozenClock()
        self.answers: list[Any] = []
        self.plans: list[bytes] = []
        self.results: list[StepResult] = []
        self._file = file

    def runner(self, inner: Runner) -> "HeardRunner":
        """The runner, overheard."""
        return HeardRunner(inner, self)

    def feature(self, inner: Feature) -> "HeardFeature":
        """A feature, overheard."""
        return HeardFeature(inner, self)

    def scope(self, inner: Callable[[int], str]) -> Callable[[int], str]:
        """A model's rule for prefixes, overheard."""

        def heard(length: int) -> str:
            self.answers.append(answer := inner(length))
            return answer

        return heard

    def stops(
        self, inner: Callable[[GenerateRequest], StopMatcher | None]
    ) -> Callable[[GenerateRequest], StopMatcher | None]:
        """What makes matchers of stop strings, overheard."""

        def heard(spec: GenerateRequest) -> StopMatcher | None:
            matcher = inner(spec)
            self.answers.append(matcher is not None)
            return None if matcher is None else HeardStops(matcher, self)

        return heard

    def begin(self, header: Header) -> None:
        """The first entry."""
        self._file.write(header)

    def end_turn(self, messages: list[Inbound], sent: Sequence[Outbound]) -> None:
        """Write what happened since the last call."""
        answers, self.answers = self.answers, []
        plans, self.plans = self.plans, []
        results, self.results = self.results, []
        self._file.write(
            Turn(self.clock.now, messages, answers, results, plans, digest_of_sent(sent))
        )


class RecordedScheduler:
    """What the loop needs of a scheduler, written down turn by turn."""

    def __init__(self, inner: Scheduler, recorder: Recorder, clock: Callable[[], float]) -> None:
        self.inner = inner
        self._recorder = recorder
        self._clock = clock
        self._messages: list[Inbound] = []
        self._begun = False

    @property
    def idle(self) -> bool:
        return self.inner.idle

    @property
    def trace(self) -> Trace:
        return self.inner.trace

    @property
    def runner(self) -> Runner:
        return self.inner.runner

    @property
    def arrivals(self) -> int:
        return self.inner.arrivals

    def overview(self) -> dict[str, Any]:
        """See `Scheduler.overview`."""
        return self.inner.overview()

    @property
    def on_batch(self) -> Callable[[Sequence[Request]], bool]:
        return self.inner.on_batch

    @on_batch.setter
    def on_batch(self, call: Callable[[Sequence[Request]], bool]) -> None:
        self.inner.on_batch = call

    def submit(self, message: Inbound) -> None:
        """See `Scheduler.submit`."""
        self._begin()
        self._messages.append(message)
        self.inner.submit(message)

    def step(self) -> bool:
        """See `Scheduler.step`."""
        self._begin()
        return self.inner.step()

    def take(self) -> list[Outbound]:
        """See `Scheduler.take`; the end of a turn."""
        sent = self.inner.take()
        messages, self._messages = self._messages, []
        self._recorder.end_turn(messages, sent)
        self._begun = False
        return sent

    def _begin(self) -> None:
        if not self._begun:
            self._recorder.clock.now = self._clock()
            self._begun = True


class HeardRunner:
    """Writes down plans and results."""

    def __init__(self, inner: Runner, recorder: Recorder) -> None:
        self.runner = getattr(inner, "runner", None)
        self._inner = inner
        self._recorder = recorder

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """See `Runner.launch`."""
        self._recorder.plans.append(digest_of(plan))
        outer: Future[StepResult] = Future()

        def done(inner: "Future[StepResult]") -> None:
            # Noted before anybody can have it: a turn never lacks a result it uses.
            error = inner.exception()
            if error is not None:
                outer.set_exception(error)
                return
            result = inner.result()
            self._recorder.results.append(msgspec.structs.replace(result, extras=()))
            outer.set_result(result)

        self._inner.launch(plan).add_done_callback(done)
        return outer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class HeardFeature(Feature):
    """Writes down the answers of a feature."""

    def __init__(self, inner: Feature, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self.attach = inner.attach  # type: ignore[method-assign]
        self.on_tokens = inner.on_tokens  # type: ignore[method-assign]
        self.on_finish = inner.on_finish  # type: ignore[method-assign]
        self.stats = inner.stats  # type: ignore[method-assign]
        for name in QUESTIONS:
            setattr(self, name, self._heard(getattr(inner, name)))

    def poll(self) -> Sequence[tuple[Request, FinishReason]]:
        """See `Feature.poll`."""
        # Who ended meanwhile for a reason of its own is no news, here as for the scheduler.
        found = [news for news in self._inner.poll() if news[0].finish is None]
        self._recorder.answers.append([(request.seq, reason) for request, reason in found])
        return found

    def _heard(self, question: Callable[..., Any]) -> Callable[..., Any]:
        def ask(*arguments: Any) -> Any:
            answer = question(*arguments)
            self._recorder.answers.append(answer)
            return answer

        return ask


class HeardStops:
    """Writes down when a stop string was there, or what went wrong with a pattern."""

    def __init__(self, inner: StopMatcher, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder

    def push(self, token: int) -> str | None:
        """See `StopMatcher.push`."""
        try:
            found = self._inner.push(token)
        except HeadraceError as error:
            self._recorder.answers.append([error.message, error.status, error.kind])
            raise
        self._recorder.answers.append(found)
        return found
