"""Runs the scheduler of a recording again and compares every decision.

No model, no clock, no sockets: messages, results, times and the answers of features come from the
journal. The same code makes the same plans; other code shows the first step where it decides
otherwise. Knows nothing of how journals are made.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import msgspec

from headrace.cache.pages import PagePool
from headrace.cache.prefix import ChunkCache, PrefixCache
from headrace.cache.radix import RadixCache
from headrace.core.config import ScheduleOptions
from headrace.core.errors import HeadraceError, LoadError
from headrace.core.messages import Control, FinishReason, GenerateRequest, Inbound
from headrace.core.plan import StepPlan, StepResult
from headrace.scheduler.commit import OutputRules
from headrace.scheduler.feature import Feature
from headrace.scheduler.journal import (
    QUESTIONS,
    FrozenClock,
    Header,
    Turn,
    digest_of,
    digest_of_sent,
    read_journal,
)
from headrace.scheduler.request import Request, StopMatcher
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.space import Space

# Verbs that touch the machine, not the plans.
_LEFT_OUT = ("start_profile", "stop_profile", "slow_down", "log_level", "freeze_gc", "weights")


class Diverged(HeadraceError):
    """The scheduler decided otherwise than in the recording."""


@dataclass
class Outcome:
    """What a replay saw. `steps`: one line per plan, as far as they are wanted."""

    turns: int = 0
    requests: int = 0
    plans: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    retractions: int = 0
    seconds: float = 0.0
    divergence: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)


def replay_file(path: str, wanted: range = range(0)) -> Outcome:
    """`replay` of a file. Raises LoadError when it cannot be read."""
    return replay(read_journal(path), wanted)


def replay(entries: Iterable[Header | Turn], wanted: range = range(0)) -> Outcome:
    """Run a recording; `wanted`: numbers of the steps to describe.

    Raises:
        LoadError: it does not begin with what the scheduler was made of.
    """
    entries = iter(entries)
    header = next(entries, None)
    if not isinstance(header, Header):
        raise LoadError("the recording has no beginning")
    outcome = Outcome()
    stage = Stage(header, outcome, wanted)
    began: float | None = None
    for turn in entries:
        if not isinstance(turn, Turn):
            raise LoadError("the recording begins twice")
        began = turn.at if began is None else began
        outcome.turns += 1
        outcome.seconds = turn.at - began
        try:
            stage.play(turn)
        except Diverged as difference:
            outcome.divergence = f"turn {outcome.turns}: {difference.message}"
            break
    outcome.retractions = stage.scheduler.planner.retracted_total
    return outcome


class Stage:
    """A scheduler whose surroundings are the journal."""

    def __init__(self, header: Header, outcome: Outcome, wanted: range) -> None:
        self.clock = FrozenClock()
        self.answers: deque[Any] = deque()
        self.results: deque[StepResult] = deque()
        self._plans: deque[bytes] = deque()
        self._outcome = outcome
        self._wanted = wanted
        self.scheduler = Scheduler(
            ScheduleOptions(**header.schedule),
            header.limits,
            self._space(header),
            self,
            output=OutputRules(
                eos_token_ids=header.eos_token_ids,
                stops=self._stops,
                stream_interval=header.stream_interval,
            ),
            features=[ToldFeature(self) for _ in range(header.features)],
            clock=self.clock,
        )

    def play(self, turn: Turn) -> None:
        """One turn, compared."""
        self.clock.now = turn.at
        self.answers.extend(turn.answers)
        self.results.extend(turn.results)
        self._plans.extend(turn.plans)
        for message in turn.messages:
            self._submit(message)
        self.scheduler.step()
        sent = digest_of_sent(self.scheduler.take())
        if self._plans:
            raise Diverged(f"{len(self._plans)} plans were made that are not made now")
        if self.answers:
            raise Diverged("something was asked that is not asked now")
        if sent != turn.sent:
            raise Diverged("other deltas are sent")

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """The recorded result, if the plan is the recorded one."""
        self._outcome.plans += 1
        if plan.step in self._wanted:
            self._outcome.steps.append(described(plan))
        if not self._plans:
            raise Diverged(f"step {plan.step} is planned now and was not: {described(plan)}")
        if self._plans.popleft() != digest_of(plan):
            raise Diverged(f"step {plan.step} is another plan now: {described(plan)}")
        self._outcome.prompt_tokens += sum(c.count for c in plan.chunks if c.count > 1)
        self._outcome.tokens += sum(c.samples for c in plan.chunks)
        return Late(self.results)

    def weights(self, action: str, details: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Never asked: see `_LEFT_OUT`."""
        raise Diverged("there are no weights")

    def told(self, what: str) -> Any:
        """The next answer of the recording."""
        if not self.answers:
            raise Diverged(f"{what} is asked now and was not")
        return self.answers.popleft()

    def request(self, seq: int) -> Request:
        """A request by its number."""
        planner = self.scheduler.planner
        for request in (*planner.queue.waiting, *planner.running):
            if request.seq == seq:
                return request
        raise Diverged(f"request {seq} is not there")

    def _submit(self, message: Inbound) -> None:
        if isinstance(message, Control) and message.verb in _LEFT_OUT:
            return
        self._outcome.requests += isinstance(message, GenerateRequest)
        self.scheduler.submit(message)

    def _stops(self, spec: GenerateRequest) -> StopMatcher | None:
        return ToldStops(self) if self.told("whether a request has stop strings") else None

    def _space(self, header: Header) -> Space:
        limits, cache = header.limits, header.cache
        pool = PagePool(limits.max_total_tokens // limits.page_size, limits.page_size)
        prefixes: PrefixCache = ChunkCache()
        if not cache["disable_radix_cache"]:
            prefixes = RadixCache(limits.page_size, cache["radix_eviction_policy"])
        return Space(pool, prefixes, lambda length: str(self.told("the scope of a prompt")))


class Late(Future[StepResult]):
    """A result that is there when it is asked for, as it was."""

    def __init__(self, results: deque[StepResult]) -> None:
        super().__init__()
        self._results = results

    def result(self, timeout: float | None = None) -> StepResult:
        if not self._results:
            raise Diverged("a result is waited for that had not come")
        return self._results.popleft()


class ToldFeature(Feature):
    """Answers as in the recording."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        for name in QUESTIONS:
            setattr(self, name, self._told(name))

    def poll(self) -> Sequence[tuple[Request, FinishReason]]:
        """See `Feature.poll`."""
        found = msgspec.convert(self._stage.told("poll"), list[tuple[int, FinishReason]])
        return [(self._stage.request(seq), reason) for seq, reason in found]

    def _told(self, name: str) -> Callable[..., Any]:
        return lambda *_: self._stage.told(name)


class ToldStops:
    """Finds stop strings where they were found."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def push(self, token: int) -> str | None:
        """See `StopMatcher.push`."""
        answer = self._stage.told("a stop string")
        if isinstance(answer, list):
            error = HeadraceError(str(answer[0]))
            error.status, error.kind = answer[1], answer[2]
            raise error
        return None if answer is None else str(answer)


def described(plan: StepPlan) -> dict[str, Any]:
    """A plan for people: rows, tokens, pages."""
    return {
        "step": plan.step,
        "prefill": [[c.row, c.start, c.count] for c in plan.chunks if c.count > 1],
        "decode": [chunk.row for chunk in plan.chunks if chunk.count == 1],
        "new_rows": [row.row for row in plan.new_rows],
        "freed_rows": plan.freed_rows,
        "pages": sum(len(pages.ids) for pages in plan.pages),
    }
