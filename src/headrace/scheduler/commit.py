"""What a result means for its requests: tokens, stops, ends.

Appends sampled tokens up to the first stop, gathers logprobs, stores finished prompts as prefixes.
Every end of a request goes through `Committer.finish`, which answers once and frees everything
once, as soon as no plan in flight contains the request. What goes wrong with one request ends that
one. Knows no sockets and no
plans to come.
"""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from headrace.core import faults
from headrace.core.blame import culprit, exhausted
from headrace.core.errors import HeadraceError
from headrace.core.messages import Delta, FinishReason, GenerateRequest, StreamStart, pack_ids
from headrace.core.plan import Chunk, ChunkResult, StepPlan, StepResult
from headrace.scheduler.feature import Feature
from headrace.scheduler.planner import Planner
from headrace.scheduler.request import Request, StopMatcher, input_logprobs, output_logprobs
from headrace.scheduler.space import Space

logger = logging.getLogger(__name__)

# Prompt tokens the detokenizer needs to continue the text (spaces, split characters).
_TAIL = 8


def no_stops(spec: GenerateRequest) -> StopMatcher | None:
    """Stop factory for servers without a tokenizer."""
    return None


@dataclass(frozen=True)
class OutputRules:
    """When output ends and when it is sent.

    `stops` makes the matcher of a request's stop strings, or None if it has none.
    """

    eos_token_ids: Sequence[int] = ()
    stops: Callable[[GenerateRequest], StopMatcher | None] = no_stops
    stream_interval: int = 1
    decode_log_interval: int = 40
    log_cache_divergence: int = 0


DEFAULT_OUTPUT = OutputRules()


class Pace:
    """How fast requests end, measured over the last few."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=64)

    def ended(self, now: float) -> None:
        """A request ended."""
        self._ends.append(now)

    def seconds_for(self, requests: float) -> float:
        """How long so many take; 0 before anything is known."""
        if len(self._ends) < 2:
            return 0.0
        return requests * (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)


class Committer:
    """Applies results; owns the deltas that wait to be sent."""

    def __init__(
        self,
        planner: Planner,
        space: Space,
        features: Sequence[Feature],
        output: OutputRules,
        clock: Callable[[], float],
    ) -> None:
        self.planner = planner
        self.space = space
        self.features = features
        self.clock = clock
        self.deltas: list[Delta] = []
        self.generated_total = 0
        self.aborted_total = 0
        self.failed_steps_total = 0
        self.pace = Pace()
        self._eos = frozenset(output.eos_token_ids)
        self._stream_interval = output.stream_interval

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        """Apply the result of the oldest plan in flight."""
        if result.error:
            self._fail(plan, result.error)
            return
        for chunk, outcome in zip(plan.chunks, result.chunks, strict=True):
            request = self.planner.rows[chunk.row]
            self._land(request, chunk)
            if request.timeline is not None and request.finish is None:
                request.timeline.ran(
                    self.clock(), result.seconds, chunk.start, chunk.count, request.prompt_len
                )
            if request.finish is None:
                if request.void:
                    continue
                try:
                    self._apply(request, chunk, outcome, result.extras)
                except Exception as error:  # noqa: BLE001  it fails this request, not the server
                    self.finish(request, failure("taking in its tokens", error))
            elif request.inflight == 0:
                self._release(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The one exit of every request: answer once, free everything once."""
        if request.finish is not None:
            return
        request.finish = reason
        self.aborted_total += reason.type == "abort"
        if request.cached >= 0:  # it had started
            self.pace.ended(self.clock())
        if (timeline := request.timeline) is not None:
            timeline.admitted, timeline.first_token = request.admitted_at, request.first_token_at
            timeline.finished = self.clock()
        try:
            self._send(request)
        except Exception as error:  # noqa: BLE001  there is an answer in any case
            request.finish, spec = failure("writing the answer", error), request.spec
            self.deltas.append(
                Delta(spec.rid, finish=request.finish, origin=spec.origin, attempt=spec.attempt)
            )
        for feature in self.features:
            try:
                feature.on_finish(request)
            except Exception as error:  # noqa: BLE001  pages and row are freed in any case
                failure("forgetting a request", error)
        self.planner.queue.forget(request)
        if request.row < 0:
            self.planner.queue.remove(request)
            return
        self.planner.running.remove(request)
        if request.inflight == 0:
            self._release(request)

    def _land(self, request: Request, chunk: Chunk) -> None:
        request.inflight -= 1
        request.pending -= chunk.samples

    def _apply(
        self, request: Request, chunk: Chunk, outcome: ChunkResult, extras: Sequence[Any]
    ) -> None:
        if faults.ON:
            faults.strike("commit", [request.spec.sampling.seed])
        if outcome.error:
            self.finish(request, abort(outcome.error, 500, "InternalServerError"))
            return
        request.unsent.prompt_scores += outcome.prompt_scores
        request.unsent.pooled = outcome.pooled
        if not request.prompt_kept and chunk.start + chunk.count >= request.prompt_len:
            self._keep_prompt(request)
        reason = self._append(request, outcome, extras)
        if reason is None and request.max_new_tokens == 0 and request.prompt_kept:
            reason = FinishReason("length", length=0)
        if reason is not None:
            self.finish(request, reason)
        elif request.spec.stream and self._due(request):
            self._send(request)

    def _append(
        self, request: Request, outcome: ChunkResult, extras: Sequence[Any]
    ) -> FinishReason | None:
        """Take sampled tokens up to the first stop."""
        reason = None
        if outcome.tokens and not request.out:
            request.first_token_at = self.clock()
        for index, token in enumerate(outcome.tokens):
            request.append(token)
            if outcome.scores:
                request.unsent.scores.append(outcome.scores[index])
            self.generated_total += 1
            request.account.charge(1)
            reason = self._stop_reason(request, token)
            if reason is not None:
                break
        if outcome.tokens:
            for feature in self.features:
                feature.on_tokens(request, outcome.tokens, extras)
        return reason

    def _stop_reason(self, request: Request, token: int) -> FinishReason | None:
        sampling = request.spec.sampling
        try:
            matched = request.stop.push(token) if request.stop is not None else None
        except HeadraceError as error:
            return abort(error.message, error.status, error.kind)
        if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
            return FinishReason("stop", matched=token)
        if matched is not None:
            return FinishReason("stop", matched=matched)
        if len(request.out) >= request.max_new_tokens:
            return FinishReason("length", length=len(request.out))
        return None

    def _keep_prompt(self, request: Request) -> None:
        """The prompt is computed: others may use it from now on."""
        request.prompt_kept = True
        if request.reuse and self.space.keep(request, request.prompt_len):
            self.planner.rewrite_pages(request)

    def _fail(self, plan: StepPlan, error: str) -> None:
        """Nothing of a step that failed is kept: whom it touched is computed again, one alone ends.

        That one was in a failed step before; see `core.blame`.
        """
        touched = [one.row for part in (plan.chunks, plan.new_rows, plan.pages) for one in part]
        requests = [self.planner.rows[row] for row in set(touched) & self.planner.rows.keys()]
        struck = {one: one.strikes for one in requests if one.finish is None and not one.void}
        guilty = culprit(struck)
        for chunk in plan.chunks:
            self._land(self.planner.rows[chunk.row], chunk)
        for request in requests:
            if request is guilty:
                self.finish(request, abort(error, 500, "InternalServerError"))
            elif request in struck:
                request.strike()
            elif request.finish is not None and request.inflight == 0:
                self._release(request)
        self.failed_steps_total += 1
        logger.warning("step %d: %d requests are computed again", plan.step, len(struck))

    def _release(self, request: Request) -> None:
        """Row and pages go back; what was computed stays as a prefix, unless it went wrong."""
        assert request.finish is not None
        failed = request.void or request.finish.status >= 500
        keep = 0 if failed else min(request.computed, request.known)
        self.space.leave(request, keep=keep)
        self.planner.release_row(request)

    def _due(self, request: Request) -> bool:
        interval = request.spec.sampling.stream_interval or self._stream_interval
        return len(request.unsent.ids) >= interval or len(request.out) == 1

    def _send(self, request: Request) -> None:
        """Queue a delta with everything the client has not heard."""
        unsent, spec = request.unsent, request.spec
        scores = None
        if spec.logprobs is not None:
            scores = output_logprobs(unsent.ids, unsent.scores)
        prompt_scores = None
        first = not unsent.started and not spec.out
        if spec.logprobs is not None and spec.logprobs.start >= 0 and first:
            prompt_scores = input_logprobs(request, unsent.prompt_scores)
        self.deltas.append(
            Delta(
                rid=spec.rid,
                origin=spec.origin,
                ids=unsent.ids,
                finish=request.finish,
                prompt_tokens=request.prompt_len,
                completion_tokens=len(request.out),
                cached_tokens=max(0, request.cached),
                retractions=request.retractions,
                logprobs=scores,
                input_logprobs=prompt_scores,
                start=None if unsent.started else stream_start(request),
                queue_time=max(0.0, request.admitted_at - request.arrived),
                first_token_time=max(0.0, request.first_token_at - request.arrived),
                pooled=unsent.pooled,
                attempt=spec.attempt,
                timeline=None if request.finish is None else request.timeline,
            )
        )
        unsent.ids = []
        unsent.scores = []
        unsent.started = True


def stream_start(request: Request) -> StreamStart:
    """What the detokenizer must know before the first text."""
    sampling = request.spec.sampling
    return StreamStart(
        prompt_tail=pack_ids(request.prompt[-_TAIL:]),
        stop=sampling.stop,
        stop_regex=sampling.stop_regex,
        skip_special_tokens=sampling.skip_special_tokens,
        spaces_between_special_tokens=sampling.spaces_between_special_tokens,
        no_stop_trim=sampling.no_stop_trim,
        out=request.spec.out,
    )


def failure(doing: str, error: Exception) -> FinishReason:
    """The reason of a request that one of our own bugs ended; the log has the traceback.

    Raises the error itself if the whole process cannot go on.
    """
    if exhausted(error):
        raise error
    logger.error("%s failed", doing, exc_info=error)
    return abort(f"{doing} failed ({type(error).__name__})", 500, "InternalServerError")


def abort(message: str, status: int, kind: str) -> FinishReason:
    """The reason of a request that ends without its answer."""
    return FinishReason("abort", message=message, status=status, kind=kind)
