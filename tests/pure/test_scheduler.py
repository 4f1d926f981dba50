"""What the scheduler promises in single situations; random ones are in the property tests."""

import msgspec
import numpy as np
import pytest

from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    pack_ids,
)
from headrace.core.plan import ChunkResult
from headrace.scheduler.policy import POLICIES
from tests.pure.test_scheduler_properties import Client, expected, make_scheduler


def spec(rid, prompt, most=4, **fields):
    sampling = SamplingParams(max_new_tokens=most, seed=1, ignore_eos=True)
    prompt = prompt if isinstance(prompt, list) else list(range(prompt))
    return GenerateRequest(rid=rid, ids=pack_ids(prompt), sampling=sampling, **fields)


def run(scheduler, *specs):
    client = Client(scheduler)
    for item in specs:
        scheduler.submit(item)
    client.run()
    scheduler.check()
    return client


def test_prefix_hit_is_reported_truly():
    scheduler = make_scheduler(page_size=4, pages=40)
    run(scheduler, spec("a", 22))
    client = run(scheduler, spec("b", 22))
    assert client.last["b"].cached_tokens == 20
    client = run(scheduler, spec("c", 22, namespace="salt"))
    assert client.last["c"].cached_tokens == 0


@pytest.mark.parametrize("radix", [True, False])
@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_samples_compute_the_prompt_once(radix, page_size):
    """n samples run the prompt once, then one token each for their own first draw."""
    scheduler = make_scheduler(page_size=page_size, pages=400 // page_size, radix=radix)
    tokens = []
    launch = scheduler.runner.launch
    scheduler.runner.launch = lambda plan: (tokens.extend(plan.chunks), launch(plan))[1]
    samples = [spec(f"g.{i}", 29, most=2, group="g", sample_index=i) for i in range(4)]
    client = run(scheduler, *samples)
    assert all(client.out[item.rid] == expected(item) for item in samples)
    computed = sum(chunk.count for chunk in tokens if chunk.start < 29)
    assert computed == 29 + 3
    assert [client.last[item.rid].cached_tokens for item in samples] == [0, 28, 28, 28]


def test_shared_prefix_waits_for_the_one_that_computes_it():
    scheduler = make_scheduler(page_size=4, pages=200, chunked_prefill_size=512)
    prompt = list(range(40)) * 2
    client = run(scheduler, *(spec(str(i), [*prompt, i]) for i in range(5)))
    cached = [client.last[str(i)].cached_tokens for i in range(5)]
    assert cached == [0, 80, 80, 80, 80]


def test_full_queue_is_503():
    scheduler = make_scheduler(rows=1, max_queued_requests=1)
    client = run(scheduler, *(spec(str(i), 5) for i in range(3)))
    assert client.finish["0"].type == "length"
    assert {client.finish[rid].status for rid in "12"} == {503}
    assert client.finish["2"].message.startswith("The request queue is full.")
    assert client.finish["2"].retry_after >= 1.0


def test_full_queue_evicts_the_less_urgent():
    scheduler = make_scheduler(rows=1, max_queued_requests=1, enable_priority_scheduling=True)
    client = run(scheduler, spec("low", 5, priority=1), spec("high", 5, priority=2))
    assert client.finish["low"].message == "The request is aborted by a higher priority request."
    assert client.finish["high"].type == "length"


@pytest.mark.parametrize(("gap", "preempts"), [(9, False), (10, True)])
def test_priority_preempts_beyond_the_threshold(gap, preempts):
    scheduler = make_scheduler(rows=1, enable_priority_scheduling=True)
    client = Client(scheduler)
    low, high = spec("low", 5, 30, priority=0), spec("high", 5, priority=gap)
    scheduler.submit(low)
    for _ in range(6):
        scheduler.step()
    scheduler.submit(high)
    client.run()
    assert list(client.finish) == (["high", "low"] if preempts else ["low", "high"])
    assert client.last["low"].retractions == int(preempts)
    assert client.out["low"] == expected(low) and client.out["high"] == expected(high)


def test_abort_frees_within_a_step():
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    scheduler.submit(spec("a", 20, 40))
    scheduler.submit(spec("ab", 20, 40))
    scheduler.submit(spec("b", 20, 40))
    for _ in range(5):
        scheduler.step()
    scheduler.submit(AbortRequest(rid="a", prefix=True))
    assert [request.rid for request in scheduler.planner.running] == ["b"]
    scheduler.step()
    scheduler.step()
    assert [request.rid for request in scheduler.planner.rows.values()] == ["b"]
    scheduler.submit(AbortRequest(all=True))
    client.run()
    scheduler.check()
    assert {reason.type for reason in client.finish.values()} == {"abort"}


def test_flush_only_when_idle():
    scheduler = make_scheduler()
    client = Client(scheduler)
    scheduler.submit(spec("a", 20, 4))
    scheduler.submit(Control(1, "flush_cache"))
    (refused,) = [m for m in scheduler.take() if isinstance(m, ControlReply)]
    assert not refused.ok and "1 wait" in refused.message
    client.run()
    assert scheduler.space.cache.held > 0
    scheduler.submit(Control(2, "flush_cache"))
    assert scheduler.take()[0] == ControlReply(2, message="Cache flushed.")
    assert scheduler.space.cache.held == 0


def test_state_is_a_message():
    scheduler = make_scheduler()
    scheduler.submit(Control(3, "state"))
    (reply,) = scheduler.take()
    wire = msgspec.msgpack.encode(reply)
    assert msgspec.msgpack.decode(wire, type=ControlReply).data["max_running_requests"] == 6


def test_too_long_and_empty_are_refused():
    scheduler = make_scheduler(pages=10, page_size=4)
    client = run(scheduler, spec("long", 30, 20), spec("empty", []), spec("fits", 30, 10))
    assert "50 tokens" in client.finish["long"].message and client.finish["long"].status == 400
    assert client.finish["empty"].status == 400
    assert client.finish["fits"].type == "length"


def test_after_a_failed_step_everything_is_computed_again():
    """Nothing of it is kept, and nobody notices: tokens and prompt scores are as ever."""
    scheduler = make_scheduler(pages=60)
    scheduler.runner.broken = lambda plan: plan.step in (1, 15)
    specs = [spec(str(i), [i] * 9, most=24, logprobs=LogprobSpec(start=0)) for i in range(4)]
    client = run(scheduler, *specs)
    for one in specs:
        assert client.out[one.rid] == expected(one)
        scores = client.input_logprobs[one.rid]
        assert scores.values == [None, *[-float(one.rid)] * 8]
    assert scheduler.planner.retracted_total == 6  # two, then all four


def test_who_fails_its_steps_is_failed_alone():
    """Its step fails whenever one of its rows is in it; the others go on without it."""
    scheduler = make_scheduler(pages=60)
    bad = spec("bad", [9] * 5, most=24)

    def broken(plan):
        rows = {chunk.row for chunk in plan.chunks}
        return any(one.row in rows and one.rid == "bad" for one in scheduler.planner.running)

    scheduler.runner.broken = broken
    specs = [spec(str(i), [i] * 9, most=24) for i in range(4)]
    client = run(scheduler, *specs, bad)
    assert client.finish["bad"].status == 500 and "a kernel failed" in client.finish["bad"].message
    for one in specs:
        assert client.out[one.rid] == expected(one)
    assert run(scheduler, late := spec("late", [9] * 5, most=24)).out["late"] == expected(late)


def test_failed_row_fails_alone():
    scheduler = make_scheduler()
    launch = scheduler.runner.launch

    def nan_in_first(plan):
        future = launch(plan)
        result = future.result()
        if plan.step == 2:
            result.chunks[0] = ChunkResult(error="logits are NaN")
        return future

    scheduler.runner.launch = nan_in_first
    client = run(scheduler, spec("a", 5), spec("b", [9, 8, 7]))
    assert client.finish["a"].status == 500
    assert client.out["b"] == expected(spec("b", [9, 8, 7]))


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fcfs", "abcd"),
        ("lpm", "cabd"),
        ("lof", "dabc"),
        ("shortest-prefill-first", "cdab"),
        ("dfs-weight", "cabd"),
    ],
)
def test_policies(policy, order):
    scheduler = make_scheduler(page_size=4, pages=100, schedule_policy=policy)
    run(scheduler, spec("warm", 40))
    specs = {
        "a": spec("a", [7] * 30),
        "b": spec("b", [8] * 30),
        "c": spec("c", 41),
        "d": spec("d", [9] * 4, most=9),
    }
    for item in specs.values():
        scheduler.submit(item)
    queue = scheduler.planner.queue
    assert "".join(request.rid for request in queue.candidates(0.0)) == order
    assert set(POLICIES) >= {policy}


def test_retracted_requests_go_on_exactly():
    """Too little room for all: somebody gives way, nobody's tokens change."""
    scheduler = make_scheduler(pages=12, page_size=4, schedule_conservativeness=0.0)
    specs = [spec(str(i), [i] * 8, most=24) for i in range(3)]
    client = run(scheduler, *specs)
    assert scheduler.planner.retracted_total > 0
    assert all(client.out[item.rid] == expected(item) for item in specs)


def test_decode_goes_on_beside_a_long_prefill():
    scheduler = make_scheduler(pages=100, page_size=4, chunked_prefill_size=8)
    client = Client(scheduler)
    scheduler.submit(spec("short", [1, 2], most=20, stream=True))
    for _ in range(3):
        scheduler.step()
    scheduler.submit(spec("long", 100, most=1))
    before = len(client.out["short"])
    for _ in range(8):
        scheduler.step()
        client.pump()
    assert len(client.out["short"]) - before >= 6 and "long" not in client.finish
    client.run()


def test_stats_count_tokens_once():
    scheduler = make_scheduler(pages=100)
    run(scheduler, spec("a", 20, 5), spec("b", np.arange(20).tolist(), 5))
    stats = scheduler.reporter.stats()
    assert (stats.requests_total, stats.prompt_tokens_total) == (2, 40)
    assert stats.generated_tokens_total == 10 and stats.running == stats.waiting == 0
