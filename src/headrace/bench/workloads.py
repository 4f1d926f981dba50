"""What `headrace bench compare` asks of every server, and the one number that it takes from it.

All prompts are random token ids to /v1/completions, so that every server computes the same lengths
and no cache knows them. Nothing here starts servers or compares them.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from typing import Literal

from headrace.bench import load
from headrace.bench.client import Target
from headrace.bench.datasets import Prompt, random_prompts, shared_prefix_prompts
from headrace.bench.load import LoadPlan, LoadResult
from headrace.bench.stream import Sample
from headrace.core.errors import HeadraceError

Kind = Literal["decode", "prefill", "load", "prefix"]


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """`requests` prompts of `common` + `own` tokens, `at_once` in flight, `output` tokens each.

    decode: tokens per second while all of them run. prefill: prompt tokens per second until the
    first token. load: output tokens per second from first send to last answer. prefix: seconds for
    all of them.
    """

    kind: Kind
    requests: int
    at_once: int
    own: int
    output: int
    common: int = 0

    @property
    def unit(self) -> str:
        return "s" if self.kind == "prefix" else "tokens/s"

    def prompts(self, seed: int) -> list[Prompt]:
        """The prompts; those of one seed share no beginning with those of another."""
        if self.common:
            return shared_prefix_prompts(
                (1, self.requests), self.common, self.own, self.output, seed, "ids"
            )
        return random_prompts(self.requests, self.own, self.output, 1.0, seed, "ids")


FULL = {
    "decode-1": Workload("decode", 1, 1, 32, 64),
    "decode-8": Workload("decode", 8, 8, 32, 48),
    "decode-16": Workload("decode", 16, 16, 32, 48),
    "decode-32": Workload("decode", 32, 32, 32, 48),
    "prefill-512": Workload("prefill", 3, 1, 512, 1),
    "prefill-2048": Workload("prefill", 1, 1, 2048, 1),
    "load": Workload("load", 32, 16, 256, 128),
    "prefix": Workload("prefix", 32, 32, 32, 32, common=1024),
}
SHORT = {
    "decode-1": Workload("decode", 1, 1, 16, 24),
    "decode-8": Workload("decode", 8, 8, 16, 16),
    "decode-16": Workload("decode", 16, 16, 16, 16),
    "decode-32": Workload("decode", 32, 32, 16, 16),
    "prefill-512": Workload("prefill", 1, 1, 512, 1),
    "prefill-2048": Workload("prefill", 1, 1, 2048, 1),
    "load": Workload("load", 8, 4, 64, 32),
    "prefix": Workload("prefix", 8, 8, 32, 8, common=256),
}
"""The same, small enough to try a setup; its numbers are not to be quoted."""


async def measure(target: Target, workload: Workload, seed: int) -> float:
    """Run the workload once.

    Raises:
        HeadraceError: no server, or a request failed.
    """
    plan = LoadPlan(max_concurrency=workload.at_once, warmup_requests=0, show_progress=False)
    outcome = await load.measure(target, workload.prompts(seed), plan)
    failed = [sample.error for sample in outcome.samples if not sample.ok]
    if failed:
        raise HeadraceError(f"{len(failed)} of {workload.requests} requests failed: {failed[0]}")
    short = [s.output_tokens for s in outcome.samples if s.output_tokens != workload.output]
    if short:
        raise HeadraceError(f"asked for {workload.output} tokens, an answer has {short[0]}")
    return value(workload, outcome)


def value(workload: Workload, outcome: LoadResult) -> float:
    """The number of a finished run."""
    if workload.kind == "decode":
        return steady_rate(outcome.samples)
    if workload.kind == "prefill":
        return workload.own / statistics.median(sample.ttft for sample in outcome.samples)
    if workload.kind == "load":
        return sum(sample.output_tokens for sample in outcome.samples) / outcome.duration
    return outcome.duration


def steady_rate(samples: Sequence[Sample]) -> float:
    """Tokens per second from the moment the last request starts to answer until the first ends.

    Raises:
        HeadraceError: there is no such time, so the requests never ran all at once.
    """
    times = [
        list(itertools.accumulate(sample.itl, initial=sample.start + sample.ttft))
        for sample in samples
    ]
    begin, end = max(line[0] for line in times), min(line[-1] for line in times)
    tokens = sum(
        sum(begin < time <= end for time in line) * sample.output_tokens / len(line)
        for sample, line in zip(samples, times, strict=True)
    )
    if end <= begin or not tokens:
        raise HeadraceError(f"the {len(samples)} requests never ran at the same time")
    return tokens / (end - begin)
