"""Random schedules against an oracle: right tokens, nothing lost, one answer for each request."""

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from headrace.cache.pages import PagePool
from headrace.cache.prefix import ChunkCache
from headrace.cache.radix import POLICIES as EVICTION
from headrace.cache.radix import RadixCache
from headrace.core.config import Limits, ScheduleOptions
from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    Deltas,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    pack_ids,
)
from headrace.scheduler.commit import OutputRules
from headrace.scheduler.control import PAUSE_MODES
from headrace.scheduler.policy import POLICIES
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.space import Space
from tests.support.oracle_runner import OracleRunner, next_token

VOCAB = 50
EOS = 7


def make_scheduler(*, pages=24, page_size=4, rows=6, radix=True, evict="lru", stages=1, **options):
    pool = PagePool(pages, page_size)
    cache = RadixCache(page_size, evict) if radix else ChunkCache()
    limits = Limits(
        max_total_tokens=pages * page_size,
        max_running_requests=rows,
        context_length=pages * page_size,
        page_size=page_size,
        stages=stages,
    )
    ticks = iter(range(1 << 60))
    return Scheduler(
        ScheduleOptions(**{"chunked_prefill_size": 16, **options}),
        limits,
        Space(pool, cache),
        OracleRunner(pages, page_size, VOCAB),
        output=OutputRules(eos_token_ids=(EOS,)),
        clock=lambda: next(ticks) * 1e-3,
    )


def expected(spec: GenerateRequest) -> list[int]:
    tokens = list(np.frombuffer(spec.ids, np.int32))
    out: list[int] = []
    while len(out) < spec.sampling.max_new_tokens:
        token = next_token(
            np.array(tokens + out, np.int32), spec.sampling.seed, spec.sample_index, VOCAB
        )
        out.append(token)
        if token == EOS and not spec.sampling.ignore_eos:
            break
    return out


class Client:
    """Collects deltas and checks that each request is answered exactly once."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.out = defaultdict(list)
        self.finish = {}
        self.last = {}
        self.input_logprobs = {}
        self.replies = {}

    def pump(self) -> None:
        for message in self.scheduler.take():
            if isinstance(message, ControlReply):
                self.replies[message.id] = message
                continue
            assert isinstance(message, Deltas)
            for delta in message.items:
                assert delta.rid not in self.finish, "an answer after the last answer"
                assert (delta.start is not None) == (delta.rid not in self.last)
                self.out[delta.rid] += delta.ids
                self.last[delta.rid] = delta
                if delta.input_logprobs is not None:
                    self.input_logprobs[delta.rid] = delta.input_logprobs
                if delta.finish is not None:
                    self.finish[delta.rid] = delta.finish

    def run(self, most: int = 5_000) -> None:
        for _ in range(most):
            self.pump()
            if self.scheduler.idle:
                return
            self.scheduler.step()
            self.scheduler.space.pool.check()
        raise AssertionError("the scheduler does not come to rest")


def pause(scheduler: Scheduler, client: Client, mode: str) -> None:
    """Pause and go on; meanwhile nothing moves, and without running requests a flush succeeds."""
    scheduler.submit(Control(1, "pause", {"mode": mode}))
    client.pump()
    computed = scheduler.runner.chunks
    running = len(scheduler.planner.running)
    assert mode == "in_place" or not running
    assert mode != "abort" or not scheduler.planner.queue.waiting
    for _ in range(3):
        assert not scheduler.step()
    scheduler.submit(Control(2, "flush_cache"))
    client.pump()
    assert client.replies[2].ok == (not running)
    assert scheduler.runner.chunks == computed
    scheduler.submit(Control(3, "continue"))


@st.composite
def specs(draw, longest: int):
    count = draw(st.integers(1, 14))
    shared = draw(st.lists(st.integers(0, 2), min_size=24, max_size=24))
    found = []
    for index in range(count):
        own = draw(st.lists(st.integers(0, 3), min_size=1, max_size=20))
        prompt = (shared[: draw(st.integers(0, 24))] + own)[: longest - 2]
        most = draw(st.integers(0, min(30, longest - len(prompt))))
        samples = draw(st.sampled_from([1, 1, 1, 3]))
        sampling = SamplingParams(
            max_new_tokens=most, seed=draw(st.integers(0, 3)), ignore_eos=draw(st.booleans())
        )
        logprobs = draw(st.sampled_from([None, None, -1, 0, 3]))
        for sample in range(samples):
            found.append(
                GenerateRequest(
                    rid=f"{index}.{sample}",
                    ids=pack_ids(prompt),
                    sampling=sampling,
                    stream=draw(st.booleans()),
                    logprobs=None
                    if logprobs is None
                    else LogprobSpec(start=min(logprobs, len(prompt) - 1)),
                    priority=draw(st.sampled_from([None, 0, 5, 30])),
                    namespace=draw(st.sampled_from(["", "", "other"])) if samples == 1 else "",
                    group=f"{index}" if samples > 1 else "",
                    sample_index=sample,
                )
            )
    return found


@given(data=st.data())
@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.generate],
)
def test_random_schedules(data):
    page_size = data.draw(st.sampled_from([1, 4, 16]), "page size")
    pages = data.draw(st.integers(60, 200), "tokens") // page_size + 1
    scheduler = make_scheduler(
        pages=pages,
        page_size=page_size,
        rows=data.draw(st.integers(1, 6), "rows"),
        radix=data.draw(st.booleans(), "radix"),
        evict=data.draw(st.sampled_from(sorted(EVICTION)), "eviction"),
        stages=data.draw(st.sampled_from([1, 1, 2, 3]), "stages"),
        chunked_prefill_size=data.draw(st.sampled_from([1, 7, 16, 512]), "chunk"),
        schedule_policy=data.draw(st.sampled_from(sorted(POLICIES)), "policy"),
        disable_overlap_schedule=data.draw(st.booleans(), "normal"),
        enable_priority_scheduling=data.draw(st.booleans(), "priorities"),
        retraction_policy=data.draw(st.sampled_from(["length", "priority"]), "retraction"),
        schedule_conservativeness=data.draw(st.sampled_from([0.0, 0.3, 1.0]), "careful"),
    )
    failures = data.draw(st.sets(st.integers(1, 40), max_size=3), "failed steps")
    scheduler.runner.broken = lambda plan: plan.step in failures
    requests = data.draw(specs(min(pages * page_size, 60)), "requests")
    client = Client(scheduler)
    waiting = list(requests)
    while waiting:
        for _ in range(data.draw(st.integers(1, 4), "arrivals")):
            if waiting:
                scheduler.submit(waiting.pop(0))
        for _ in range(data.draw(st.integers(0, 6), "steps")):
            scheduler.step()
            client.pump()
            assert_stages_are_independent(scheduler)
        if data.draw(st.integers(0, 5), "abort") == 0:
            scheduler.submit(AbortRequest(rid=data.draw(st.sampled_from(requests)).rid))
        if data.draw(st.integers(0, 5), "pause") == 0:
            pause(scheduler, client, data.draw(st.sampled_from(PAUSE_MODES), "mode"))
    client.run()
    scheduler.check()
    assert client.finish.keys() == {spec.rid for spec in requests}
    for spec in requests:
        want = expected(spec)
        reason = client.finish[spec.rid]
        got = client.out[spec.rid]
        if reason.type == "abort":
            assert got == want[: len(got)]
            continue
        assert got == want
        delta = client.last[spec.rid]
        assert delta.completion_tokens == len(want)
        assert 0 <= delta.cached_tokens < delta.prompt_tokens
        if spec.logprobs is not None and spec.logprobs.start >= 0:
            prompt = np.frombuffer(spec.ids, np.int32)[spec.logprobs.start :]
            scores = client.input_logprobs[spec.rid]
            assert scores.tokens == prompt.tolist()
            assert scores.values == [None, *(-float(token) for token in prompt[1:])]
    scheduler.space.clear()
    assert scheduler.space.pool.free == scheduler.space.pool.count


def assert_stages_are_independent(scheduler):
    """In a pipeline no plan reads a token that one before it samples: the first stage lacks it."""
    if scheduler.limits.stages == 1:
        return
    plans = [plan for plan, _ in scheduler._inflight]
    assert len(plans) < max(2, scheduler.depth)
    for index, plan in enumerate(plans):
        waiting = {chunk.row for chunk in plan.chunks if chunk.samples}
        for later in plans[index + 1 :]:
            new = {spec.row for spec in later.new_rows}
            assert not waiting & {chunk.row for chunk in later.chunks} - new


def test_a_pipeline_is_kept_full():
    """With requests enough, each plan takes its share, and all stages have one."""
    scheduler = make_scheduler(pages=200, rows=9, stages=3)
    for index in range(9):
        ids = pack_ids(np.arange(4 + index))
        sampling = SamplingParams(max_new_tokens=40, ignore_eos=True)
        scheduler.submit(GenerateRequest(rid=str(index), ids=ids, sampling=sampling))
    sizes = []
    plan = scheduler.planner.plan
    scheduler.planner.plan = lambda: (made := plan()) and (sizes.append(len(made.chunks)), made)[1]
    for _ in range(60):
        scheduler.step()
    assert scheduler.depth == 3
    assert set(sizes[20:60]) == {3}
    scheduler.drain()


@pytest.mark.parametrize("radix", [True, False])
def test_thousand_requests(radix):
    """A schedule of a thousand requests, with retractions, in about a second."""
    random = np.random.default_rng(1)
    scheduler = make_scheduler(
        pages=512, page_size=16, rows=48, radix=radix, chunked_prefill_size=256
    )
    client = Client(scheduler)
    shared = random.integers(0, VOCAB, 200)
    specs = [
        GenerateRequest(
            rid=str(index),
            ids=pack_ids(np.concatenate([shared[: index % 200], random.integers(0, VOCAB, 20)])),
            sampling=SamplingParams(max_new_tokens=40, seed=index, ignore_eos=index % 2 == 0),
        )
        for index in range(1000)
    ]
    for spec in specs:
        scheduler.submit(spec)
    client.run()
    scheduler.check()
    assert all(client.out[spec.rid] == expected(spec) for spec in specs)
