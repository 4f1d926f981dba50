"""A request as the scheduler sees it: counters, not modes.

    computed  tokens whose state is written by the plans launched so far
    pending   tokens sampled by launched plans and not seen yet
    total     prompt + out + pending

A request needs work when computed < total. Prefill, chunked prefill, a prefix hit and decode
differ only in the values. Owned and changed by the scheduler alone.
"""

from typing import Any, Protocol

import numpy as np

from headrace.core.blame import CLEARED_AFTER
from headrace.core.messages import (
    FinishReason,
    GenerateRequest,
    TokenLogprobs,
    unpack_ids,
)
from headrace.core.plan import ScoredToken
from headrace.core.timeline import Timeline


class StopMatcher(Protocol):
    """Watches the text of one request for its stop strings and patterns."""

    def push(self, token: int) -> str | None:
        """The stop string (or pattern) completed by this token, if any."""
        ...


class Payer(Protocol):
    """Whoever the computed tokens of a request are charged to."""

    def charge(self, tokens: int) -> None: ...


class Nobody:
    """Pays for requests that no queue knows."""

    def charge(self, tokens: int) -> None:
        """It costs nothing."""


NOBODY = Nobody()


class Request:
    """One sequence from arrival to release."""

    def __init__(
        self, spec: GenerateRequest, seq: int, now: float, stop: StopMatcher | None
    ) -> None:
        self.spec = spec
        self.seq = seq
        self.prompt: np.ndarray = unpack_ids(spec.ids)
        self.prompt_len = len(self.prompt)
        # Not empty from the start if the request goes on after a crash.
        self.out: list[int] = unpack_ids(spec.out).tolist()
        # Length of prompt + out: the tokens whose value is known.
        self.known = self.prompt_len + len(self.out)
        max_new_tokens = spec.sampling.max_new_tokens
        assert max_new_tokens is not None, "the tokenizer manager fills it in"
        self.max_new_tokens = max_new_tokens
        # Length at which the request ends.
        self.limit = self.prompt_len + max_new_tokens
        self.computed = 0
        self.pending = 0
        self.inflight = 0
        self.row = -1
        self.pages: list[int] = []
        # The first `shared` pages belong to the prefix cache and are protected by `node`.
        self.shared = 0
        self.node: Any = None
        self.finish: FinishReason | None = None
        self.stop = stop
        # Not grown, so that it leaves the device and can be retracted.
        self.held = False
        # A step failed: what is in flight for it, or was computed, means nothing.
        self.void = False
        # Crashes and failed steps it was part of, and its length at the last one.
        self._strikes, self._struck_at = spec.strikes, len(self.out)
        self.prompt_kept = False
        self.retractions = 0
        self.cached = -1
        self.arrived = now
        self.admitted_at = 0.0
        self.first_token_at = 0.0
        # Kept only if it is asked for.
        self.timeline = Timeline(sent=spec.received, arrived=now) if spec.timings else None
        # Next prompt position whose logits score its successor; `prompt_len` when none is wanted.
        self._score_start = spec.logprobs.start if spec.logprobs and not spec.out else -1
        self.score_from = self.prompt_len if self._score_start < 0 else self._score_start
        self.unsent = Unsent()
        self.account: Payer = NOBODY
        # May use and leave cached prefixes; may be computed in several chunks.
        self.reuse = spec.pool is None or spec.pool.reuse
        self.pieces = spec.pool is None or spec.pool.pieces

    @property
    def rid(self) -> str:
        return self.spec.rid

    @property
    def strikes(self) -> int:
        """Crashes and failed steps it may have caused; none once it has gone on for a while."""
        return self._strikes if len(self.out) - self._struck_at < CLEARED_AFTER else 0

    @property
    def total(self) -> int:
        return self.known + self.pending

    @property
    def wants_work(self) -> bool:
        """More tokens to compute, and more to sample or the prompt to finish."""
        if self.computed < self.prompt_len:
            return True
        return self.computed < self.known + self.pending < self.limit

    @property
    def priority(self) -> int:
        return self.spec.priority or 0

    def strike(self) -> None:
        """A step that computed it failed: it goes on from what is known, once retracted."""
        self._strikes, self._struck_at = self.strikes + 1, len(self.out)
        self.held = self.void = True
        if self._score_start >= 0:
            self.score_from = self._score_start + len(self.unsent.prompt_scores)

    def retract(self, now: float) -> None:
        """Row and pages are gone; what was computed has to be computed again."""
        self.computed = 0
        self.held = self.void = False
        self.prompt_kept = False
        self.retractions += 1
        if self.timeline is not None:
            self.timeline.retract(now)

    def append(self, token: int) -> None:
        """A sampled token has become known."""
        self.out.append(token)
        self.known += 1
        self.unsent.ids.append(token)

    def tokens(self) -> np.ndarray:
        """All known tokens, int32 [known]."""
        if not self.out:
            return self.prompt
        return np.concatenate([self.prompt, np.asarray(self.out, dtype=np.int32)])


class Unsent:
    """What the client has not heard yet."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.scores: list[ScoredToken] = []
        self.prompt_scores: list[ScoredToken] = []
        self.pooled = b""
        self.started = False


def output_logprobs(ids: list[int], scores: list[ScoredToken]) -> TokenLogprobs:
    """Scores of sampled tokens in wire form."""
    return TokenLogprobs(
        tokens=ids,
        values=[score.logprob for score in scores],
        top=[score.top or None for score in scores] if any(s.top for s in scores) else [],
        ids=[score.ids or None for score in scores] if any(s.ids for s in scores) else [],
    )


def input_logprobs(request: Request, scores: list[ScoredToken]) -> TokenLogprobs:
    """Scores of prompt tokens from `logprobs.start` on; nothing precedes the first one."""
    assert request.spec.logprobs is not None
    start = request.spec.logprobs.start
    tail = output_logprobs([], scores)
    return TokenLogprobs(
        tokens=request.prompt[start : start + 1 + len(scores)].tolist(),
        values=[None, *tail.values],
        top=[None, *tail.top] if tail.top else [],
        ids=[None, *tail.ids] if tail.ids else [],
    )
