"""Makes plans for a runner, as a scheduler would, with pages given out in a scrambled order."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from headrace.core.messages import LogprobSpec, SamplingParams, pack_ids
from headrace.core.plan import Chunk, NewRow, Pages, ScoredToken, StepPlan, StepResult

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Sequence:
    """One request of a test."""

    prompt: list[int]
    sampling: SamplingParams = GREEDY
    seed: int = 0
    logprobs: LogprobSpec | None = None
    row: int = -1
    pages: list[int] = field(default_factory=list)
    out: list[int] = field(default_factory=list)
    scores: list[ScoredToken] = field(default_factory=list)
    computed: int = 0

    def new_row(self, row: int) -> NewRow:
        self.row = row
        return NewRow(
            row=row,
            tokens=pack_ids(self.prompt + self.out),
            prompt_len=len(self.prompt),
            sampling=self.sampling,
            seed=self.seed,
            logprobs=self.logprobs,
        )


class Driver:
    """Makes plans: gives pages out in a scrambled order and moves sequences along."""

    def __init__(
        self,
        execute: Callable[[StepPlan], StepResult],
        pages: int,
        page_size: int,
        seed: int = 0,
    ) -> None:
        self.execute = execute
        self.page_size = page_size
        self.random = np.random.default_rng(seed)
        self.free: list[int] = self.random.permutation(pages).tolist()
        self.step = 0

    def chunk(self, sequence: Sequence, count: int, **fields) -> tuple[Chunk, list[Pages]]:
        """The next `count` tokens of a sequence, and the pages they need."""
        start = sequence.computed
        sequence.computed += count
        end = sequence.computed + len(fields.get("draft", ()))
        missing = -(-end // self.page_size) - len(sequence.pages)
        pages = [self.free.pop() for _ in range(missing)]
        update = [Pages(sequence.row, len(sequence.pages), pages)] if pages else []
        sequence.pages += pages
        known = len(sequence.prompt) + len(sequence.out)
        samples = fields.pop("samples", sequence.computed >= known)
        return Chunk(sequence.row, start, count, samples=samples, **fields), update

    def run(self, work: list[tuple[Sequence, int]], **fields) -> StepResult:
        """One plan with chunks (sequence, count); appends what was sampled."""
        made = [self.chunk(sequence, count) for sequence, count in work]
        self.step += 1
        plan = StepPlan(
            step=self.step,
            chunks=[chunk for chunk, _ in made],
            pages=[update for _, updates in made for update in updates],
            **fields,
        )
        result = self.execute(plan)
        for (sequence, _), outcome in zip(work, result.chunks, strict=True):
            assert not outcome.error, outcome.error
            sequence.out += outcome.tokens
            sequence.scores += outcome.scores
        return result


def generate(driver: Driver, sequences: list[Sequence], tokens: int) -> None:
    """Prefill in random chunks mixed with decodes of others, until all have `tokens` outputs."""
    while any(len(sequence.out) < tokens for sequence in sequences):
        work = []
        for sequence in sequences:
            left = len(sequence.prompt) + len(sequence.out) - sequence.computed
            if len(sequence.out) < tokens and driver.random.random() < 0.8:
                work.append((sequence, int(driver.random.integers(1, left + 1))))
        if work:
            driver.run(work)
