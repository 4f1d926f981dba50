"""The scheduler's half of structured output: compiles, keeps each output's state, sends masks.

A request waits (`ready`) while its grammar is compiled, and runs in one plan at a time (`chain`),
since the next mask depends on the token before. The mask is computed in a thread as soon as the
token is known; a plan waits a moment for masks and then goes without the rows whose mask is late.
Everything that goes wrong with a grammar ends its own request, through `poll`.

Invariant: between plans a matcher has accepted exactly the request's output (after the reasoning),
so a retracted request resumes with it. No torch.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from headrace.core.blame import exhausted
from headrace.core.messages import FinishReason
from headrace.core.plan import Chunk, TokenMasks
from headrace.grammar.compiler import Compiler
from headrace.grammar.engine import Broken, Matcher
from headrace.grammar.refusal import Refused
from headrace.grammar.vocabulary import Vocabulary
from headrace.metrics.record import MASK_SECONDS, SECONDS, Histogram
from headrace.scheduler.feature import Feature
from headrace.scheduler.request import Request

logger = logging.getLogger(__name__)

# Seconds a grammar may take to compile, and a plan waits for masks.
COMPILE_SECONDS = 20.0
PLAN_WAITS = 0.005
_MOST_THREADS = 8


class NoGrammars(Feature):
    """Refuses every grammar; `why` says what is missing."""

    def __init__(self, why: str) -> None:
        self._why = why

    def check(self, request: Request) -> str | None:
        asked = request.spec.sampling.grammars
        return f"{asked[0][0]}: {self._why}" if asked else None


class GrammarGate(Feature):
    """Answers for requests with a grammar; all others pass untouched."""

    def __init__(
        self,
        compiler: Compiler,
        *,
        compile_seconds: float = COMPILE_SECONDS,
        plan_waits: float = PLAN_WAITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._compiler = compiler
        self._compile_seconds = compile_seconds
        self._plan_waits = plan_waits
        self._clock = clock
        self._counts = Counts()
        compiler.on_compiled = self._counts.compiled
        self._outputs: dict[int, Output] = {}
        self._compiling: dict[int, tuple[Request, Future[Matcher], float]] = {}
        # Filled by threads, too.
        self._ended: deque[tuple[Request, FinishReason]] = deque()
        self._fatal: BaseException | None = None
        cores = len(os.sched_getaffinity(0))
        self._threads = ThreadPoolExecutor(min(_MOST_THREADS, cores), "grammar-mask")
        # Until when the plan that is being made waits for masks; None before its first question.
        self._plan_until: float | None = None

    # -- questions of the scheduler -----------------------------------------------------------

    def check(self, request: Request) -> str | None:
        for field, text in request.spec.sampling.grammars:
            self._counts.requests += 1
            made = self._compiler.compile(field, text)
            self._compiling[request.seq] = (request, made, self._clock() + self._compile_seconds)
        return None

    def ready(self, request: Request) -> bool:
        return request.seq not in self._compiling

    def chain(self, request: Request, depth: int) -> int:
        return 1 if request.seq in self._outputs else depth

    def holds(self, request: Request) -> bool:
        output = self._outputs.get(request.seq)
        if output is None or output.ready:
            return False
        now = self._clock()
        if self._plan_until is None:
            self._plan_until = now + self._plan_waits
        wait([output.mask], timeout=max(0.0, self._plan_until - now))
        self._counts.late += not output.ready
        return not output.ready

    def attach(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> TokenMasks | None:
        rows: list[int] = []
        positions: list[int] = []
        words: list[bytes] = []
        for chunk, request in zip(chunks, requests, strict=True):
            output = self._outputs.get(request.seq)
            if output is None or not chunk.samples:
                continue
            for offset, mask in enumerate(output.masks(chunk.draft)):
                rows.append(chunk.row)
                positions.append(chunk.start + chunk.count + offset)
                words.append(mask)
        return TokenMasks(rows, positions, b"".join(words)) if rows else None

    def on_tokens(self, request: Request, tokens: Sequence[int], extras: Sequence[Any]) -> None:
        output = self._outputs.get(request.seq)
        if output is not None:
            self._advance(request, output, tokens)

    def on_finish(self, request: Request) -> None:
        self._outputs.pop(request.seq, None)
        self._compiling.pop(request.seq, None)

    def poll(self) -> Sequence[tuple[Request, FinishReason]]:
        if self._fatal is not None:
            raise self._fatal
        if self._compiling:
            self._look_at_compilers()
        self._plan_until = None
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def stats(self) -> dict[str, Any]:
        compiler = self._compiler
        return self._counts.stats() | {
            "grammar_waiting": len(self._compiling),
            "grammar_cache_hits_total": compiler.hits,
            "grammar_cache_misses_total": compiler.misses,
            "grammar_cache_evictions_total": compiler.evictions,
        }

    # -- parts --------------------------------------------------------------------------------

    def _look_at_compilers(self) -> None:
        now = self._clock()
        for seq, (request, made, deadline) in list(self._compiling.items()):
            if made.done():
                self._begin(request, made)
            elif now > deadline:
                field = request.spec.sampling.grammars[0][0]
                why = f"{field}: compiling took longer than {self._compile_seconds:g} s"
                self._counts.timeouts += 1
                self._end(request, why, 400)
            else:
                continue
            # A request that ends stays known until `on_finish`, but is not looked at again.
            self._compiling.pop(seq, None)

    def _begin(self, request: Request, made: "Future[Matcher]") -> None:
        error = made.exception()
        if isinstance(error, Refused):
            self._end(request, error.message, 400)
        elif error is not None:
            self._failed(request, "compiling its grammar", error)
        else:
            output = Output(
                made.result().copy(), self._compiler.vocabulary, request.spec.reasoning_end
            )
            self._outputs[request.seq] = output
            self._advance(request, output, request.out)

    def _advance(self, request: Request, output: "Output", tokens: Sequence[int]) -> None:
        """Take committed tokens in; then end the request, or prepare its next mask."""
        try:
            for token in tokens:
                output.accept(token)
        except Broken as error:
            self._end(request, f"the grammar cannot go on: {error}", 500)
            return
        if tokens and output.finished(request):
            last = request.out[-1]
            matched = last if last in self._compiler.vocabulary.eos else None
            self._ended.append((request, FinishReason("stop", matched=matched)))
        else:
            self._prepare(request, output)

    def _prepare(self, request: Request, output: "Output") -> None:
        """Compute the next mask in the background."""
        output.mask = self._threads.submit(lambda: self._timed(output))
        output.mask.add_done_callback(lambda done: self._late_error(request, done))

    def _timed(self, output: "Output") -> bytes:
        """In a thread."""
        began = time.perf_counter()
        found = output.next_mask()
        self._counts.masked(time.perf_counter() - began)
        return found

    def _late_error(self, request: Request, done: "Future[bytes]") -> None:
        """In a thread: a mask that cannot be computed ends its request. Appending is atomic."""
        error = None if done.cancelled() else done.exception()
        if isinstance(error, Broken):
            field = request.spec.sampling.grammars[0][0]
            self._end(request, f"{field}: {error}", 400)
        elif error is not None:
            self._failed(request, "computing a mask", error)

    def _failed(self, request: Request, doing: str, error: BaseException) -> None:
        """One of our own bugs, of which the client learns no more than that; or there is no memory,
        which `poll` tells the scheduler."""
        if exhausted(error):
            self._fatal = error
        logger.error("%s failed, request %s", doing, request.rid, exc_info=error)
        self._end(request, f"{doing} failed ({type(error).__name__})", 500)

    def _end(self, request: Request, message: str, status: int) -> None:
        self._counts.aborted += 1
        kind = "BadRequestError" if status == 400 else "InternalServerError"
        self._ended.append(
            (request, FinishReason("abort", message=message, status=status, kind=kind))
        )


class Counts:
    """What the metrics tell of grammars; times come from threads."""

    def __init__(self) -> None:
        self.requests = self.aborted = self.timeouts = self.late = 0
        self._compile, self._mask = Histogram(SECONDS), Histogram(MASK_SECONDS)
        self._lock = threading.Lock()

    def compiled(self, seconds: float) -> None:
        with self._lock:
            self._compile.observe(seconds)

    def masked(self, seconds: float) -> None:
        with self._lock:
            self._mask.observe(seconds)

    def stats(self) -> dict[str, Any]:
        """Fields of `SchedulerStats`."""
        return {
            "grammar_requests_total": self.requests,
            "grammar_aborted_total": self.aborted,
            "grammar_timeouts_total": self.timeouts,
            "grammar_late_masks_total": self.late,
            "grammar_compile_counts": list(self._compile.counts),
            "grammar_compile_seconds_total": self._compile.sum,
            "grammar_mask_counts": list(self._mask.counts),
            "grammar_mask_seconds_total": self._mask.sum,
        }


class Output:
    """One output: its matcher, the next mask, and before the grammar begins its reasoning."""

    def __init__(self, matcher: Matcher, vocabulary: Vocabulary, reasoning_end: str) -> None:
        self.matcher = matcher
        self.mask: Future[bytes] = Future()
        self._vocabulary = vocabulary
        self._marker = reasoning_end.encode()
        self._tail = b""

    @property
    def reasoning(self) -> bool:
        """The marker has not come yet."""
        return bool(self._marker)

    @property
    def ready(self) -> bool:
        """The mask is there. One that failed never is: its request is about to end."""
        return self.mask.done() and self.mask.exception() is None

    def next_mask(self) -> bytes:
        """For the token after those accepted. Raises `Broken`."""
        return self._vocabulary.no_end() if self.reasoning else self.matcher.mask()

    def accept(self, token: int) -> None:
        """A token was committed. Raises `Broken`."""
        if not self.reasoning:
            self.matcher.accept(token)
            return
        self._tail += self._vocabulary.text_of(token)
        before, found, after = self._tail.partition(self._marker)
        if not found:
            self._tail = before[-len(self._marker) :]
            return
        self._marker = b""
        rest = after.decode("utf-8", "replace").lstrip()
        self.matcher.write(rest)

    def masks(self, draft: Sequence[int]) -> list[bytes]:
        """The mask of the next token, and of the one after each drafted token.

        After a draft that the grammar forbids it does not matter: that draft is rejected.
        """
        found = [self.mask.result()]
        if draft and self.reasoning:
            return self._ahead(found, draft)
        try:
            for token in draft:
                if self.reasoning or not self.matcher.fits(token):
                    break
                found.append(self.matcher.mask())
            self.matcher.rollback(len(found) - 1)
        except Broken:
            # It stays broken: the next token ends the request.
            logger.warning("a drafted token exceeds the limits of a grammar")
        return found + found[:1] * (len(draft) + 1 - len(found))

    def _ahead(self, found: list[bytes], draft: Sequence[int]) -> list[bytes]:
        """`masks` while the marker may come with a drafted token; on a copy."""
        other = Output(self.matcher.copy(), self._vocabulary, "")
        other._marker, other._tail = self._marker, self._tail
        try:
            for token in draft:
                if other.reasoning and token in self._vocabulary.eos:
                    break
                other.accept(token)
                found.append(other.next_mask())
        except Broken:
            pass  # It is rejected, or ends the request when it comes.
        return found + found[:1] * (len(draft) + 1 - len(found))

    def finished(self, request: Request) -> bool:
        """The grammar has ended and no end of sequence would end the request."""
        if self.reasoning or not self.matcher.ended:
            return False
        sampling = request.spec.sampling
        return (
            not self._vocabulary.eos
            or request.out[-1] in self._vocabulary.eos
            or len(request.out) < sampling.min_new_tokens
        )
