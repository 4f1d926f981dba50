"""Recovery without processes: who goes on where, who is blamed, how often, and what is written."""

import asyncio
import random
import resource
import time
from types import SimpleNamespace

import msgspec
import pytest

from headrace.core.blame import culprit
from headrace.core.errors import Overloaded, WorkerLost
from headrace.core.messages import (
    AbortRequest,
    Control,
    Delta,
    Deltas,
    FinishReason,
    GenerateRequest,
    LogprobSpec,
    SamplingParams,
    SchedulerStats,
    SessionParams,
    StreamStart,
    pack_ids,
    unpack_ids,
)
from headrace.engine import crash
from headrace.engine.restart import Budget, team_of
from headrace.frontend.detokenizer import DetokenizerManager
from headrace.frontend.flight import key_of
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.frontend.validate import error_of
from headrace.frontend.vitals import Vitals
from headrace.ipc import pulse as pulses
from headrace.ipc.address import AddressFolder
from headrace.ipc.pulse import Pulse
from headrace.scheduler.commit import failure
from headrace.text.tokenizer import Tokenizer
from tests.pure.test_scheduler_properties import Client, expected, make_scheduler
from tests.support.fake_scheduler import LIMITS, FakeScheduler, config, model_info
from tests.support.tokenizers import byte_fallback_bpe, byte_level_bpe

TOKENIZER = Tokenizer(byte_level_bpe())
LENGTH = FinishReason("length", length=4)


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


@pytest.fixture
async def manager(addresses, scheduler):
    options = config(max_queued_requests=1)
    made = TokenizerManager(options, model_info(), TOKENIZER, None, addresses)
    await made.start()
    made.open(LIMITS)
    yield made
    await made.close()


def request(rid="r", stream=True, **fields):
    sampling = SamplingParams(max_new_tokens=16, seed=1)
    ids = pack_ids([1, 2, 3])
    return GenerateRequest(rid=rid, ids=ids, stream=stream, sampling=sampling, **fields)


def lose(manager, batch=(), scheduler=True):
    keys = {key_of(rid, 0): strikes for rid, strikes in batch}
    manager.suspend("A process was lost.", scheduler=scheduler, batch=keys)


class Consumer:
    """Takes the news of a request in a task of its own."""

    def __init__(self, manager, request):
        self.deltas = []
        self.task = asyncio.create_task(self._take(manager, request))

    async def _take(self, manager, request):
        async for delta in manager.generate(request):
            self.deltas.append(delta)

    @property
    def text(self):
        return "".join(delta.text for delta in self.deltas)

    @property
    def ids(self):
        return [token for delta in self.deltas for token in delta.ids]

    async def end(self):
        async with asyncio.timeout(30):
            await self.task
        return self.deltas[-1]


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("lost", ["scheduler", "detokenizer"])
@pytest.mark.parametrize("stream", [True, False])
async def test_a_request_goes_on_where_it_was(manager, scheduler, lost, stream):
    consumer = Consumer(manager, request(stream=stream))
    asked = await scheduler.hear()
    assert (asked.out, asked.attempt) == (b"", 0)
    scheduler.say(Delta("r", [5, 6], text="ab", completion_tokens=2, cached_tokens=3))
    await until(lambda: manager._flights["r"].out == [5, 6])
    lose(manager, scheduler=lost == "scheduler")
    manager.resume()
    again = await scheduler.hear()
    assert (unpack_ids(again.out).tolist(), again.attempt > 0) == ([5, 6], True)
    assert again.sampling == asked.sampling and again.ids == asked.ids and again.stream
    # News of the first attempt that was under way says nothing new.
    scheduler.say(Delta("r", [7], text="c", completion_tokens=3))
    new = {"attempt": again.attempt, "cached_tokens": 9}
    scheduler.say(Delta("r", [7], text="abc", completion_tokens=3, **new))
    scheduler.say(Delta("r", [8], text="d", completion_tokens=4, finish=LENGTH, **new))
    last = await consumer.end()
    assert (consumer.text, consumer.ids) == ("abcd", [5, 6, 7, 8])
    assert (last.finish, last.cached_tokens, last.completion_tokens) == (LENGTH, 3, 4)
    assert manager._flights == {}


async def test_what_comes_meanwhile_waits_up_to_a_limit(manager, scheduler):
    lose(manager)
    assert manager.trouble() == "A process was lost."
    with pytest.raises(Overloaded):
        await manager.control("ping")
    most = LIMITS.max_running_requests + 1  # --max-queued-requests is 1
    consumers = [Consumer(manager, request(f"r{i}")) for i in range(most)]
    await until(lambda: len(manager._flights) == most)
    with pytest.raises(Overloaded, match="queue is full"):
        await Consumer(manager, request("more")).end()
    assert await scheduler.hears_nothing()
    manager.resume()
    assert not manager.trouble()
    heard = [await scheduler.hear() for _ in range(most)]
    assert [one.rid for one in heard] == [f"r{i}" for i in range(most)]
    for one in heard:
        scheduler.say(Delta(one.rid, [1], "x", LENGTH, attempt=one.attempt))
    for consumer in consumers:
        assert (await consumer.end()).text == "x"


async def test_aborts_and_disconnects_hold_meanwhile(manager, scheduler):
    aborted, gone = Consumer(manager, request("a1")), Consumer(manager, request("b1"))
    assert {(await scheduler.hear()).rid, (await scheduler.hear()).rid} == {"a1", "b1"}
    lose(manager)
    manager.abort("a", prefix=True)
    assert (await aborted.end()).finish.type == "abort"
    gone.task.cancel()
    await asyncio.gather(gone.task, return_exceptions=True)
    manager.resume()
    # Other frontends may have requests of that name.
    assert await scheduler.hear() == AbortRequest("a", prefix=True)
    assert await scheduler.hears_nothing() and manager._flights == {}


async def test_a_pause_stays_and_a_session_does_not(manager, scheduler):
    """Sessions are memory of the scheduler; one that was lost cannot be gone on with."""
    session = Consumer(manager, request("s", session=SessionParams("id")))
    other = Consumer(manager, request("o"))
    await scheduler.hear()
    await scheduler.hear()
    scheduler.say(stats=SchedulerStats(is_paused=True))
    await until(lambda: manager.stats.is_paused)
    lose(manager)
    error = error_of((await session.end()).finish)
    assert isinstance(error, WorkerLost) and "session was lost" in error.message
    manager.resume()
    assert await scheduler.hear() == Control(0, "pause", {"mode": "in_place"})
    assert (await scheduler.hear()).rid == "o"
    other.task.cancel()
    await asyncio.gather(other.task, return_exceptions=True)


async def test_who_ends_its_process_twice_is_failed_alone(manager, scheduler):
    consumers = {rid: Consumer(manager, request(rid)) for rid in ("bad", "good", "new")}
    for _ in consumers:
        await scheduler.hear()
    lose(manager, [("bad", 0), ("good", 0)])
    manager.resume()
    strikes = {(one := await scheduler.hear()).rid: one.strikes for _ in consumers}
    assert strikes == {"bad": 1, "good": 1, "new": 0}
    many = list(range(20))
    scheduler.say(Delta("good", many, text="x", completion_tokens=20, attempt=1))
    await until(lambda: consumers["good"].ids == many)
    lose(manager, [("bad", 1), ("good", 0), ("new", 0)])
    error = error_of((await consumers["bad"].end()).finish)
    assert isinstance(error, WorkerLost) and "twice" in error.message
    manager.resume()
    strikes = {(one := await scheduler.hear()).rid: one.strikes for _ in range(2)}
    assert strikes == {"good": 1, "new": 1}
    assert (manager.metrics.poisonous, manager.metrics.crashes) == (1, 2)
    for rid in strikes:
        consumers[rid].task.cancel()
        await asyncio.gather(consumers[rid].task, return_exceptions=True)


def test_nobody_is_blamed_who_may_be_innocent():
    assert culprit({}) is culprit({1: 0, 2: 0}) is culprit({1: 1, 2: 1}) is None
    assert culprit({1: 0, 2: 1}) == 2
    assert culprit({1: 1, 2: 2, 3: 1}) == 2


def spec(rid="r", seed=1, **fields):
    sampling = SamplingParams(max_new_tokens=20, seed=seed, ignore_eos=True)
    return GenerateRequest(rid, pack_ids(list(range(9))), sampling=sampling, stream=True, **fields)


@pytest.mark.parametrize("had", [0, 1, 7, 19])
@pytest.mark.parametrize("superseded", [True, False])
def test_the_scheduler_goes_on_with_the_tokens_of_an_undisturbed_run(had, superseded):
    """On a new scheduler, or on one where an earlier attempt is still running."""
    scheduler = make_scheduler(pages=60)
    if superseded:
        scheduler.submit(spec())
        for _ in range(6):
            scheduler.step()
        scheduler.take()
    right = expected(spec())
    again = spec(out=pack_ids(right[:had]), attempt=1, logprobs=LogprobSpec(start=0))
    scheduler.submit(again)
    scheduler.take()  # the end of the earlier attempt
    client = Client(scheduler)
    client.run()
    scheduler.check()
    last = client.last["r"]
    assert (client.out["r"], last.completion_tokens, last.attempt) == (right[had:], 20, 1)
    assert last.prompt_tokens == 9 and last.finish == FinishReason("length", length=20)
    assert ("r" in client.input_logprobs) == (had == 0)


def test_a_session_outlives_the_detokenizer():
    """The scheduler knows an earlier attempt, that runs or has ended, and its place in the tree."""
    scheduler = make_scheduler(pages=100)
    scheduler.sessions.open("id", 0, None)

    def ask(rid, after, **fields):
        scheduler.submit(spec(rid, session=SessionParams("id", after), **fields))

    def run():
        client = Client(scheduler)
        client.run()
        return client

    ask("a", "")
    assert run().last["a"].prompt_tokens == 9
    ask("b", "a")
    right = run().out["b"]
    ask("b", "a", out=pack_ids(right[:5]), attempt=1)  # it had ended
    assert run().out["b"] == right[5:]
    ask("b", "a", attempt=2)
    for _ in range(6):
        scheduler.step()
    ask("b", "a", out=pack_ids(right[:3]), attempt=3)  # it was running
    scheduler.take()
    client = run()
    assert client.out["b"] == right[3:] and client.last["b"].prompt_tokens == 9 + 20 + 9
    ask("c", "b")
    assert run().last["c"].prompt_tokens == 38 + 20 + 9
    scheduler.check()


def test_suspects_run_one_at_a_time():
    scheduler = make_scheduler(pages=200)
    for number in range(4):
        out = pack_ids(expected(spec(seed=number))[:2])
        scheduler.submit(spec(f"s{number}", number, out=out, attempt=1, strikes=2))
    scheduler.submit(spec("innocent", 9, attempt=1, strikes=1))
    tried = set()
    while not scheduler.idle:
        scheduler.step()
        trial = [one.rid for one in scheduler.planner.running if one.strikes > 1]
        assert len(trial) <= 1
        tried.update(trial)
    assert tried == {f"s{number}" for number in range(4)}
    scheduler.check()


def test_a_full_queue_takes_back_what_it_had():
    scheduler = make_scheduler(rows=1, max_queued_requests=1)
    for number in range(4):
        scheduler.submit(spec(f"r{number}", attempt=1))
    client = Client(scheduler)
    client.run()
    assert {finish.type for finish in client.finish.values()} == {"length"}


@pytest.mark.parametrize("tokenizer", [byte_level_bpe, byte_fallback_bpe])
@pytest.mark.parametrize("stop", [(), ("wheel turns",)])
def test_the_detokenizer_takes_a_stream_over_anywhere(tokenizer, stop):
    tokenizer = Tokenizer(tokenizer())
    ids = tokenizer.encode("Hello 🙂 你好 déjà, the wheel turns.", add_special_tokens=False)
    start = StreamStart(pack_ids(ids[:2]), stop=stop)
    finish = FinishReason("stop", matched=stop[0]) if stop else LENGTH

    def run(pieces, manager, start):
        text = ""
        for i, piece in enumerate(pieces):
            end = finish if i == len(pieces) - 1 else None
            delta = Delta("r", piece, start=start if i == 0 else None, finish=end)
            (out,) = manager.advance(Deltas([delta])).items
            text += out.text
        return text

    whole = run([ids], DetokenizerManager(tokenizer), start)
    dice = random.Random(1)
    for had in range(len(ids)):
        first = DetokenizerManager(tokenizer)
        (told,) = first.advance(Deltas([Delta("r", ids[:had], start=start)])).items
        assert whole.startswith(told.text)
        cut = dice.randint(had, len(ids))
        later = msgspec.structs.replace(start, out=pack_ids(ids[:had]))
        rest = run([ids[had:cut], ids[cut:]], DetokenizerManager(tokenizer), later)
        assert rest == whole
    assert DetokenizerManager(tokenizer).advance(Deltas([Delta("r", [1])])).items == []


class Broken:
    """A text stream with a bug."""

    def __init__(self, error):
        self.error = error

    def push(self, ids):
        raise self.error


def test_a_stream_whose_text_cannot_be_written_ends_alone():
    """When the scheduler says that it is over, and without what went wrong inside."""
    start = StreamStart(prompt_tail=pack_ids([5]))
    detokenizer = DetokenizerManager(Tokenizer(byte_level_bpe()))
    detokenizer.advance(Deltas([Delta(rid, [40], start=start) for rid in "ab"]))
    detokenizer._streams[0, "a"] = Broken(KeyError("inside"))
    first, second = detokenizer.advance(Deltas([Delta(rid, [41]) for rid in "ab"])).items
    assert (first.text, first.finish) == ("", None) and second.text
    first, second = detokenizer.advance(
        Deltas([Delta(rid, [42], finish=LENGTH) for rid in "ab"])
    ).items
    assert first.finish.status == 500 and first.finish.message.endswith("failed (KeyError)")
    assert second.text and second.finish == LENGTH
    assert not detokenizer._streams


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(12, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("can't start new thread"),
    ],
)
def test_a_process_without_memory_ends_instead_of_failing_requests(error):
    detokenizer = DetokenizerManager(Tokenizer(byte_level_bpe()))
    detokenizer._streams[0, "a"] = Broken(error)
    with pytest.raises(type(error)):
        detokenizer.advance(Deltas([Delta("a", [41])]))
    with pytest.raises(type(error)):
        failure("planning", error)
    assert failure("planning", OSError(28, "No space left")).message == "planning failed (OSError)"


def test_a_budget_ends_and_fills_again():
    budget = Budget(3, 10.0)
    assert [budget.delay(at) for at in (0.0, 1.0, 2.0, 3.0)] == [0.0, 0.1, 0.2, None]
    assert budget.delay(11.5) is not None
    assert Budget(100, 1e9).delay(0.0) == 0.0


def test_a_scheduler_and_its_followers_are_one_team():
    roles = ["scheduler", "rank-1", "rank-2", "detokenizer", "http-1"]
    assert team_of("rank-2", roles) == team_of("scheduler", roles) == tuple(roles[:3])
    assert team_of("detokenizer", roles) == ("detokenizer",)


def test_a_pulse_tells_the_stopped_from_the_busy(tmp_path, monkeypatch):
    writer, vitals = Pulse(str(tmp_path), "scheduler"), Vitals(str(tmp_path), 1, 2.0)
    assert vitals.trouble() == ""  # it has not started
    now = time.monotonic()
    monkeypatch.setattr(pulses.time, "monotonic", lambda: now)
    writer.beat()
    writer.begin()
    now += 1.0
    writer.beat()
    assert vitals.trouble() == ""
    now += 2.0
    writer.beat()
    assert "has been at one step for 3.0 s" in vitals.trouble()
    writer.rest()
    assert vitals.trouble() == ""
    now += 3.5
    assert "has not run for 3.5 s" in vitals.trouble()
    writer.batch([(1 << 63, 2), (7, 0)])
    reader = Pulse(str(tmp_path), "scheduler")
    assert reader.last_batch() == {1 << 63: 2, 7: 0}
    reader.reset()
    assert writer.read() is None and reader.last_batch() == {}
    writer.batch((key, 0) for key in range(10**4))
    assert len(reader.last_batch()) == pulses.MOST


def test_a_full_disk_costs_the_report_only(tmp_path, caplog):
    """`dead` is a child as the report of a crash sees it."""
    last = ["Fatal Python error: Segmentation fault"]
    process = SimpleNamespace(pid=1)
    dead = SimpleNamespace(role="scheduler", started=0.0, last_lines=last, process=process)
    pulse = Pulse(str(tmp_path), "scheduler")
    written = crash.write_report(str(tmp_path / "in"), dead, "It was lost.", pulse)
    assert "It was lost." in written.read_text() and "Segmentation" in written.read_text()
    written.unlink()
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, usual[1]))
    try:
        assert crash.write_report(str(tmp_path / "in"), dead, "It was lost.", pulse) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert "cannot be written" in caplog.text and not list((tmp_path / "in").iterdir())
    assert crash.write_report("/dev/null/no", dead, "It was lost.", pulse) is None
    assert crash.write_report("", dead, "It was lost.", pulse) is None
