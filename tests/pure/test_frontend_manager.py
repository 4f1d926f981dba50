"""TokenizerManager against a scheduler that says what the test wants."""

import asyncio
import time
from contextlib import aclosing

import pytest

from headrace.core.errors import BadRequest, HeadraceError, Overloaded, TooLong, WorkerLost
from headrace.core.messages import (
    AbortRequest,
    Control,
    ControlReply,
    Delta,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    SchedulerStats,
    TokenLogprobs,
    pack_ids,
    unpack_ids,
)
from headrace.frontend.requests import fan_out
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.frontend.validate import error_of
from headrace.grammar.check import GrammarCheck
from headrace.grammar.engine import LLGUIDANCE, XGRAMMAR
from headrace.ipc.address import AddressFolder
from headrace.text.tokenizer import Tokenizer
from tests.support.fake_scheduler import LIMITS, FakeScheduler, config, model_info
from tests.support.tokenizers import byte_level_bpe

LENGTH = FinishReason("length", length=2)
TOKENIZER = Tokenizer(byte_level_bpe())


@pytest.fixture
def addresses(tmp_path):
    folder = AddressFolder(tmp_path)
    yield folder.addresses
    folder.remove()


@pytest.fixture
async def scheduler(addresses):
    made = FakeScheduler(addresses)
    yield made
    made.close()


async def start(addresses, tokenizer=TOKENIZER, **options) -> TokenizerManager:
    made = TokenizerManager(config(**options), model_info(), tokenizer, None, addresses)
    await made.start()
    made.open(LIMITS)
    return made


@pytest.fixture
async def manager(addresses):
    made = await start(addresses)
    yield made
    await made.close()


def request(rid="r", ids=(1, 2, 3), stream=True, text=None, **sampling) -> GenerateRequest:
    return GenerateRequest(
        rid=rid,
        ids=b"" if text is not None else pack_ids(list(ids)),
        text=text,
        stream=stream,
        sampling=SamplingParams(**{"max_new_tokens": 16, **sampling}),
    )


async def settle(manager, scheduler):
    """Everything that was said before has been received."""
    asked = asyncio.create_task(manager.control("ping"))
    ping = await scheduler.hear()
    scheduler.send(ControlReply(ping.id))
    await asked


async def collect(news):
    return [delta async for delta in news]


async def test_a_request_goes_out_complete_and_comes_back_in_order(manager, scheduler):
    before = time.monotonic()
    task = asyncio.create_task(
        collect(manager.generate(request(text="Hello world", max_new_tokens=None)))
    )
    sent = await scheduler.hear()
    assert isinstance(sent, GenerateRequest) and sent.text is None
    assert unpack_ids(sent.ids).tolist() == TOKENIZER.encode("Hello world")
    assert sent.sampling.max_new_tokens == LIMITS.context_length - len(sent.ids) // 4
    assert 0 <= sent.sampling.seed < 2**63
    assert before <= sent.received <= time.monotonic()
    scheduler.say(Delta("r", ids=[5], text="a"))
    await settle(manager, scheduler)
    scheduler.say(Delta("r", ids=[6], text="b", finish=LENGTH), stats=SchedulerStats(running=4))
    first, last = await task
    assert (first.text, last.text, last.finish) == ("a", "b", LENGTH)
    assert manager.stats.running == 4


async def test_news_that_waits_is_merged(manager, scheduler):
    news = manager.generate(request())
    first = asyncio.create_task(anext(news))
    await scheduler.hear()
    scheduler.say(Delta("r", ids=[1], text="a", input_logprobs=TokenLogprobs([9], [None])))
    await first
    for i in range(2, 5):
        scheduler.say(Delta("r", [i], str(i), logprobs=TokenLogprobs([i], [-float(i)])))
    scheduler.say(Delta("r", [5], "5", LENGTH, completion_tokens=5))
    await settle(manager, scheduler)
    rest = await collect(news)
    assert [(d.ids, d.text, d.finish, d.completion_tokens) for d in rest] == [
        ([2, 3, 4, 5], "2345", LENGTH, 5)
    ]
    assert rest[0].logprobs == TokenLogprobs([2, 3, 4], [-2.0, -3.0, -4.0])


async def test_without_stream_there_is_one_delta(manager, scheduler):
    task = asyncio.create_task(collect(manager.generate(request(stream=False))))
    await scheduler.hear()
    scheduler.say(Delta("r", [1], "a"))
    await settle(manager, scheduler)
    scheduler.say(Delta("r", [2], "b"), Delta("r", [3], "c", LENGTH))
    (only,) = await task
    assert (only.ids, only.text, only.finish) == ([1, 2, 3], "abc", LENGTH)


async def test_leaving_early_aborts_at_once(manager, scheduler):
    async with aclosing(manager.generate(request())) as news:
        waiting = asyncio.create_task(anext(news))
        await scheduler.hear()
        scheduler.say(Delta("r", [1], "a"))
        await waiting
    assert await scheduler.hear() == AbortRequest("r")


async def test_forgetting_the_generator_aborts(manager, scheduler):
    news = manager.generate(request())
    waiting = asyncio.create_task(anext(news))
    await scheduler.hear()
    scheduler.say(Delta("r", [1], "a"))
    await waiting
    del news, waiting
    assert await scheduler.hear() == AbortRequest("r")


async def test_a_canceled_consumer_aborts(manager, scheduler):
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await scheduler.hear() == AbortRequest("r")


async def test_a_rid_is_free_when_the_scheduler_has_let_go(manager, scheduler):
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    with pytest.raises(BadRequest, match="rid 'r' is in use"):
        await collect(manager.generate(request()))
    task.cancel()
    await scheduler.hear()
    with pytest.raises(BadRequest, match="rid 'r' is in use"):
        await collect(manager.generate(request()))
    scheduler.say(Delta("r", finish=FinishReason("abort", message="gone")))
    await settle(manager, scheduler)
    again = asyncio.create_task(collect(manager.generate(request())))
    assert (await scheduler.hear()).rid == "r"
    scheduler.say(Delta("r", [1], "new", LENGTH))
    assert [delta.text for delta in await again] == ["new"]


async def test_many_requests_interleave(manager, scheduler):
    async def run():
        requests = [request("a"), request("b", stream=False)]
        return [pair async for pair in manager.generate_many(requests)]

    task = asyncio.create_task(run())
    assert [(await scheduler.hear()).rid for _ in range(2)] == ["a", "b"]
    scheduler.say(Delta("b", [1], "1"), Delta("a", [2], "2"))
    await settle(manager, scheduler)
    scheduler.say(Delta("b", [3], "3", LENGTH))
    await settle(manager, scheduler)
    scheduler.say(Delta("a", [4], "4", LENGTH))
    news = [(index, delta.text) for index, delta in await task]
    assert news == [(0, "2"), (1, "13"), (0, "4")]


async def test_leaving_many_aborts_those_that_run(manager, scheduler):
    async with aclosing(manager.generate_many([request("a"), request("b")])) as news:
        waiting = asyncio.create_task(anext(news))
        await scheduler.hear()
        await scheduler.hear()
        scheduler.say(Delta("a", [1], "x", LENGTH))
        assert (await waiting)[0] == 0
    assert await scheduler.hear() == AbortRequest("b")
    assert await scheduler.hears_nothing()


async def test_one_wrong_request_stops_all_of_them(manager, scheduler):
    wrong = request("b", temperature=-1.0)
    with pytest.raises(BadRequest, match="temperature must be 0 to"):
        await collect(manager.generate_many([request("a"), wrong]))
    with pytest.raises(BadRequest, match="rid 'a' is in use"):
        await collect(manager.generate_many([request("a"), request("a")]))
    assert await scheduler.hears_nothing()


async def test_too_long_is_told_before_anything_is_sent(manager, scheduler):
    with pytest.raises(TooLong, match=r"The input \(65 tokens\) is longer than .* \(64 tokens\)"):
        await collect(manager.generate(request(ids=[1] * 65)))
    assert await scheduler.hears_nothing()


async def test_seeds_follow_random_seed_and_groups_share_them(addresses, scheduler):
    seen = []
    for _ in range(2):
        manager = await start(addresses, random_seed=7)
        samples = fan_out(request("s", n=2))
        assert [(r.rid, r.group, r.sample_index) for r in samples] == [
            ("s_0", "s_0", 0),
            ("s_1", "s_0", 1),
        ]
        for batch in (samples, [request("x")], [request("y", seed=5)]):
            task = asyncio.create_task(collect(manager.generate_many(batch)))
            seen += [(await scheduler.hear()).sampling.seed for _ in batch]
            scheduler.say(*(Delta(r.rid, [1], "", LENGTH) for r in batch))
            await task
        await manager.close()
    first, second = seen[:4], seen[4:]
    assert first == second
    assert first[0] == first[1] != first[2]
    assert first[3] == 5


async def test_a_dead_worker_ends_everything(manager, scheduler):
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    asked = asyncio.create_task(manager.control("ping"))
    await scheduler.hear()
    manager.ready.set()
    manager.fail(WorkerLost("The scheduler process was lost."))
    (last,) = await task
    assert isinstance(error_of(last.finish), WorkerLost)
    assert not manager.ready.is_set()
    for call in (
        lambda: asked,
        lambda: manager.control("ping"),
        lambda: collect(manager.generate(request("s"))),
    ):
        with pytest.raises(WorkerLost, match="was lost"):
            await call()


async def test_control_is_answered_by_id(manager, scheduler):
    first = asyncio.create_task(manager.control("flush_cache"))
    second = asyncio.create_task(manager.control("ping"))
    one, two = await scheduler.hear(), await scheduler.hear()
    assert (one.verb, two.verb) == ("flush_cache", "ping")
    scheduler.send(ControlReply(two.id, message="two"))
    scheduler.send(ControlReply(one.id, ok=False, message="one"))
    assert (await first).message == "one" and (await second).message == "two"
    scheduler.send(ControlReply(99, message="nobody asked"))
    with pytest.raises(HeadraceError, match=r"no answer to ping within 0\.05 s"):
        await manager.control("ping", timeout=0.05)
    assert isinstance(await scheduler.hear(), Control)


async def test_before_the_model_is_loaded_requests_are_refused(addresses, scheduler):
    manager = TokenizerManager(config(), model_info(), TOKENIZER, None, addresses)
    await manager.start()
    with pytest.raises(Overloaded, match="still loading"):
        await collect(manager.generate(request()))
    await manager.close()


async def test_close_ends_requests_and_may_be_repeated(addresses, scheduler):
    manager = await start(addresses)
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    await manager.close()
    await manager.close()
    (last,) = await task
    assert isinstance(error_of(last.finish), Overloaded)


async def test_abort_is_passed_on_and_its_answer_is_no_error(manager, scheduler):
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    manager.abort("r", prefix=True)
    assert await scheduler.hear() == AbortRequest("r", prefix=True)
    scheduler.say(Delta("r", [1], "a", FinishReason("abort", message="Aborted by the client.")))
    (last,) = await task
    assert last.finish.type == "abort" and error_of(last.finish) is None


async def test_long_texts_do_not_stop_the_loop(manager):
    text = "water wheel " * 100_000
    turns = 0

    async def beat():
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    beating = asyncio.create_task(beat())
    ids = await manager.tokenize(text)
    beating.cancel()
    assert ids == TOKENIZER.encode(text)
    assert turns > 10
    assert await manager.detokenize(ids[1:]) == text


async def test_equal_texts_become_equal_ids(manager):
    given = [request("a", text="Hello"), request("b", text="Hello"), request("c", ids=[4])]
    done = await manager.with_ids(given)
    assert done[0].ids == done[1].ids == pack_ids(TOKENIZER.encode("Hello"))
    assert done[2] == given[2]


async def test_without_a_tokenizer_only_ids_are_served(addresses, scheduler):
    manager = await start(addresses, tokenizer=None)
    with pytest.raises(BadRequest, match="skip-tokenizer-init"):
        await collect(manager.generate(request(text="Hello")))
    task = asyncio.create_task(collect(manager.generate(request())))
    await scheduler.hear()
    scheduler.say(Delta("r", [1], finish=LENGTH))
    assert [delta.ids for delta in await task] == [[1]]
    await manager.close()


async def test_latencies_and_tokens_are_counted(manager, scheduler):
    async def finish(stream, rid):
        task = asyncio.create_task(collect(manager.generate(request(rid, stream=stream))))
        await scheduler.hear()
        if stream:
            scheduler.say(Delta(rid, [1]))
            await settle(manager, scheduler)
            await asyncio.sleep(0.02)
        scheduler.say(
            Delta(
                rid,
                [2, 3],
                finish=LENGTH,
                prompt_tokens=3,
                cached_tokens=1,
                completion_tokens=3,
                first_token_time=0.001,
            )
        )
        await task

    await finish(True, "a")
    await finish(False, "b")
    task = asyncio.create_task(collect(manager.generate(request("c"))))
    await scheduler.hear()
    scheduler.say(Delta("c", finish=FinishReason("abort"), prompt_tokens=3))
    await task
    metrics = manager.metrics
    assert (metrics.requests, metrics.aborted) == (3, 1)
    assert (metrics.prompt_tokens, metrics.cached_tokens, metrics.generation_tokens) == (9, 2, 6)
    assert sum(metrics.time_to_first_token.counts) == 2
    assert sum(metrics.inter_token_latency.counts) == 4
    assert sum(metrics.e2e_latency.counts) == 2
    assert metrics.inter_token_latency.sum >= 0.02


async def test_nothing_is_left_of_ended_requests(manager, scheduler):
    for i in range(20):
        task = asyncio.create_task(collect(manager.generate(request(f"r{i}"))))
        await scheduler.hear()
        scheduler.say(Delta(f"r{i}", [1], "a", LENGTH))
        await task
    assert not manager._flights and not manager._questions


@pytest.mark.parametrize("backend", [None, LLGUIDANCE, XGRAMMAR])
async def test_grammars_that_cannot_be_enforced_are_not_sent(addresses, scheduler, backend):
    """Both backends are asked without their libraries; what is refused is counted."""
    check = GrammarCheck(TOKENIZER, backend)
    made = TokenizerManager(config(), model_info(), TOKENIZER, None, addresses, checks=[check])
    await made.start()
    made.open(LIMITS)
    schema = '{"properties": {"a": {"not": {}}}}'
    with pytest.raises(BadRequest, match="json_schema") as caught:
        await anext(made.generate(request(json_schema=schema)))
    assert ("#/properties/a/not" in caught.value.message) == (backend is not None)
    assert (made.metrics.refused, made.metrics.requests) == (1, 0)
    await made.close()
