"""A recorded scheduler decides the same when it is run again, and other code is found out."""

import json
import random
import stat
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from headrace.cache.pages import PagePool
from headrace.cache.radix import RadixCache
from headrace.cli.main import main
from headrace.core.config import CacheOptions, Limits, ScheduleOptions
from headrace.core.errors import LoadError
from headrace.core.messages import (
    AbortRequest,
    Control,
    FinishReason,
    GenerateRequest,
    SamplingParams,
    pack_ids,
)
from headrace.scheduler import journal
from headrace.scheduler.commit import OutputRules
from headrace.scheduler.feature import Feature
from headrace.scheduler.journal import (
    Header,
    JournalFile,
    RecordedScheduler,
    Recorder,
    read_journal,
)
from headrace.scheduler.planner import Planner
from headrace.scheduler.scheduler import Scheduler
from headrace.scheduler.space import Space
from headrace.sim.replay import replay_file
from tests.support.oracle_runner import OracleRunner

VOCAB, EOS, PAGES, PAGE = 50, 7, 40, 4
LIMITS = Limits(
    max_total_tokens=PAGES * PAGE, max_running_requests=5, context_length=160, page_size=4
)


class Moody(Feature):
    """Answers by chance, as work in the background does."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._known = []

    def check(self, request):
        self._known.append(request)
        return "no mood" if self._random.random() < 0.05 else None

    def ready(self, request):
        return self._random.random() < 0.5

    def holds(self, request):
        return self._random.random() < 0.2

    def poll(self):
        # Some of this comes too late: a thread does not know who has ended meanwhile.
        if self._known and self._random.random() < 0.1:
            late = self._random.choice(self._known)
            return [(late, FinishReason("abort", message="x", status=500))]
        return ()


class Words:
    """A stop string that is there when a token is divisible by 11."""

    def push(self, token):
        return "eleven" if token % 11 == 0 else None


def record(path: Path, seed: int, most: int = 1 << 30, **options) -> None:
    """Serve random requests for a while and write it down."""
    recorder = Recorder(JournalFile(str(path), most))
    schedule = ScheduleOptions(**{"chunked_prefill_size": 12, **options})
    cache = CacheOptions(page_size=PAGE)
    recorder.begin(
        Header(
            msgspec.to_builtins(schedule), msgspec.to_builtins(cache), LIMITS, [EOS], 2, features=1
        )
    )
    chance = random.Random(seed)
    inner = Scheduler(
        schedule,
        LIMITS,
        Space(
            PagePool(PAGES, PAGE), RadixCache(PAGE, "lru"), recorder.scope(lambda n: str(n > 20))
        ),
        recorder.runner(OracleRunner(PAGES, PAGE, VOCAB)),
        output=OutputRules(
            eos_token_ids=(EOS,),
            stops=recorder.stops(lambda spec: Words() if "stop" in spec.rid else None),
            stream_interval=2,
        ),
        features=[recorder.feature(Moody(seed))],
        clock=recorder.clock,
    )
    scheduler = RecordedScheduler(inner, recorder, time.monotonic)
    for message in messages(chance):
        scheduler.submit(message)
        for _ in range(chance.randrange(6)):
            scheduler.step()
            scheduler.take()
    for _ in range(3000):
        if scheduler.idle:
            break
        scheduler.step()
        scheduler.take()
    assert scheduler.idle


def messages(chance: random.Random):
    common = [chance.randrange(8, VOCAB) for _ in range(30)]
    for index in range(40):
        rid = f"{'stop' if index % 3 == 0 else 'run'}{index}"
        prompt = [*common[: chance.randrange(25)], chance.randrange(8, VOCAB)]
        sampling = SamplingParams(max_new_tokens=chance.randrange(1, 40), seed=index)
        yield GenerateRequest(
            rid, pack_ids(prompt), sampling=sampling, stream=True, tenant=chance.choice("ab")
        )
        if chance.random() < 0.2:
            yield AbortRequest(f"run{chance.randrange(index + 1)}")
        if chance.random() < 0.1:
            yield Control(index, chance.choice(["pause", "flush_cache"]), {"mode": "retract"})
            yield Control(index, "continue")


@pytest.mark.parametrize("policy", ["fcfs", "lpm", "hrrn", "random"])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_decision_is_made_again(tmp_path, policy, seed):
    path = tmp_path / "j"
    record(path, seed, schedule_policy=policy, req_running_timeout=0.05)
    outcome = replay_file(str(path), range(3, 5))
    assert outcome.divergence == ""
    assert outcome.requests == 40 and outcome.plans > 60
    assert [step["step"] for step in outcome.steps] == [3, 4]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_other_code_is_found_out(tmp_path, monkeypatch, capsys):
    path = tmp_path / "j"
    record(path, 3)
    assert main(["replay", str(path)]) == 0
    assert "every decision agrees" in capsys.readouterr().out
    monkeypatch.setattr(Planner, "_fits", lambda self, request: not self.running)
    assert main(["replay", str(path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["divergence"].startswith("turn ")


def test_a_recording_has_an_end(tmp_path):
    path = tmp_path / "j"
    record(path, 4, most=20_000)
    assert 15_000 < path.stat().st_size < 20_100
    assert replay_file(str(path)).divergence == ""


def test_what_was_not_written_whole_is_left_out(tmp_path):
    path, cut = tmp_path / "j", tmp_path / "cut"
    record(path, 5)
    data = path.read_bytes()
    for size in np.random.default_rng(1).integers(400, len(data), 8):
        cut.write_bytes(data[:size])
        assert replay_file(str(cut)).divergence == ""


def test_files_that_are_no_recordings(tmp_path):
    path = tmp_path / "j"
    record(path, 6)
    data = path.read_bytes()
    with pytest.raises(LoadError, match="File exists"):
        JournalFile(str(path), 1)
    wrong = {
        b"": "no recording",
        b"\x80\x04pickle": "no recording",
        journal.MAGIC: "no beginning",
        journal.MAGIC + b"\xff\xff\xff\xff": "an entry of",
        journal.MAGIC + b"\x03\0\0\0abc": "cannot be read",
        data + data[len(journal.MAGIC) :]: "begins twice",
    }
    for content, text in wrong.items():
        path.write_bytes(content)
        with pytest.raises(LoadError, match=text):
            list(read_journal(str(path)))
            replay_file(str(path))
    with pytest.raises(LoadError, match="No such file"):
        replay_file(str(tmp_path / "none"))
