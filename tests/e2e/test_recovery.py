"""Lost processes: every stream goes on as if nothing had happened, and the guilty one is found."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from headrace import Engine
from headrace.bench.chaos import Chaos, calls
from headrace.bench.harm import Harm
from headrace.core.errors import WorkerLost
from tests.support.servers import Server, wait_for

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]
SCHEDULER, DETOKENIZER = "headrace::scheduler", "headrace::detokenizer"


def test_every_stream_survives_the_loss_of_a_process():
    """32 streams of every kind; `headrace bench chaos` runs more rounds."""
    with (
        Harm(("disk", "memory", "kernel"), watchdog=0.0) as harm,
        Engine(max_total_tokens=8192, **harm.options) as engine,
    ):
        chaos = Chaos(engine, calls(32), harm, seed=1)
        assert not any(isinstance(answer, str) for answer in chaos.quiet)
        assert chaos.round(["scheduler"], ["disk"]) == []
        assert chaos.round(["scheduler"], ["kernel"]) == []
        metrics = engine._manager.metrics
        assert metrics.crashes == 1 and metrics.resumed > 0 and sum(metrics.recovery.counts) == 1
        assert chaos.round(["scheduler"], ["memory"]) == []
        assert chaos.round(["detokenizer"], ["disk"]) == []
        assert chaos.harmed == 4 and metrics.crashes == 3


def seeded(seed, tokens=40, prompt="The wheel"):
    return {
        "prompt": prompt,
        "sampling_params": {"max_new_tokens": tokens, "sampling_seed": seed, "ignore_eos": True},
    }


def ask_all(engine, seeds, custom_logit_processor=MappingProxyType({}), **fields):
    """The answer or error of each, asked at once; processors by seed."""
    found = {}

    def ask(seed):
        try:
            chosen = {"custom_logit_processor": custom_logit_processor.get(seed)}
            found[seed] = engine.generate(**seeded(seed), **chosen, **fields)["output_ids"]
        except WorkerLost as error:
            found[seed] = error

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


PLUGIN = """
class Broken:
    def __init__(self, params, facts): ...
    def __call__(self, logits, prompt, output):
        if len(output) == 3:
            raise KeyError("what is in here is nobody's business")
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Requests with these seeds do harm, each in its own place, and so does a plug-in. A scheduler
    that comes back takes its weights from the cache that the first one made."""
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "own_plugin.py").write_text(PLUGIN)
    faults = "kernel:kill:13,kernel:raise:14,sample:raise:15,commit:raise:16,accept:raise:17"
    faults += ",prompt:raise:18,plan:raise:19"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADRACE_TEST_FAULTS", faults)
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        patch.syspath_prepend(str(folder))
        plugin = "own=own_plugin:Broken"
        packed = str(folder / "packed")
        with Engine(max_total_tokens=8192, logit_processors=plugin, weight_cache=packed) as engine:
            yield engine


@pytest.mark.parametrize(
    ("seed", "words"),
    [
        (15, "sampling failed"),
        (16, "taking in its tokens failed"),
        (17, "accepting the request failed"),
        (18, "scoring failed"),
        (19, "planning failed"),
    ],
)
def test_what_goes_wrong_with_one_request_fails_that_one(faulty, seed, words):
    before = faulty.get_all_child_pids()
    right = ask_all(faulty, [1, 2, 3])
    fields = {"return_logprob": True, "logprob_start_len": 0} if seed == 18 else {}
    found = ask_all(faulty, [1, 2, seed, 3], **fields)
    assert words in found.pop(seed).message
    assert found == right
    assert faulty.get_all_child_pids() == before


def test_a_processor_that_raises_fails_its_request_alone(faulty):
    right = ask_all(faulty, [1, 2])
    found = ask_all(faulty, [1, 3, 2], custom_logit_processor={3: "own"})
    message = found.pop(3).message
    assert "sampling failed" in message and "business" not in message
    assert found == right


def test_a_request_whose_kernel_raises_is_failed_alone(faulty):
    right = faulty.generate(**seeded(1))["output_ids"]
    found = ask_all(faulty, [1, 14])
    assert "Computing it failed; incident" in found[14].message
    assert "purpose" not in found[14].message
    assert found[1] == right


def test_a_request_that_kills_its_worker_twice_is_failed_alone(faulty):
    right = ask_all(faulty, range(20, 28))
    found = ask_all(faulty, [*range(20, 24), 13, *range(24, 28)])
    assert "ended the process that served it twice" in found.pop(13).message
    assert found == right
    assert faulty._manager.metrics.poisonous == 1
    scheduler, _ = faulty.get_all_child_pids()
    assert faulty._config.model.weight_cache in Path(f"/proc/{scheduler}/maps").read_text()


def body(tokens, **fields):
    return {"text": "Hello", "sampling_params": {"max_new_tokens": tokens}} | fields


def test_a_stopped_scheduler_is_noticed_killed_and_replaced(tmp_path):
    crashes = tmp_path / "crashes"
    options = ["--watchdog-timeout", "1.0", "--crash-dump-folder", str(crashes)]
    with Server(tmp_path, "--runner", "fake", *options) as server:
        server.wait_ready()
        secret = "a prompt that nobody else shall read"
        server.post("/generate", body(4, text=secret)).close()
        for path in ("/livez", "/readyz", "/health", "/health_generate"):
            assert server.status(path) == 200
        server.post("/slow_down", {"forward_sleep_time": 0.005}).close()
        stream = server.post("/generate", body(400, stream=True))
        assert stream.readline().startswith(b"data: ")
        server.children()[SCHEDULER].suspend()
        wait_for(
            lambda: {server.status(path) for path in ("/livez", "/readyz", "/health")} == {503}
        )
        wait_for(lambda: "scheduler back after" in server.text)
        assert server.status("/livez") == server.status("/readyz") == 200
        (report,) = crashes.iterdir()
        text = report.read_text()
        assert "was stuck (not running at all for 1 s)" in text and "loop.py" in text
        assert secret not in text
        *_, last, end, _ = stream.read().split(b"\n\n")
        assert end == b"data: [DONE]"
        assert len(json.loads(last.removeprefix(b"data: "))["output_ids"]) == 400
        server.children()[DETOKENIZER].send_signal(signal.SIGSEGV)
        wait_for(lambda: len(list(crashes.iterdir())) == 2)
        wait_for(lambda: server.text.count("back after") == 2)
        assert server.status("/readyz") == 200
        with server.post("/generate", body(4)) as answer:
            assert json.load(answer)["meta_info"]["completion_tokens"] == 4


def test_a_busy_scheduler_is_not_called_dead(tmp_path):
    """Every step sleeps longer than a silence may last, in the scheduler's own thread."""
    with Server(tmp_path, "--runner", "fake") as server:
        server.wait_ready()
        server.post("/slow_down", {"forward_sleep_time": 4.0}).close()
        asking = threading.Thread(target=lambda: server.post("/generate", body(1)).read())
        asking.start()
        deadline = time.monotonic() + 3.8
        while time.monotonic() < deadline:
            assert server.status("/livez") == server.status("/health") == 200
            time.sleep(0.2)
        asking.join()


def test_workers_and_a_pause_survive(tmp_path):
    """With several HTTP processes each sends its requests again; a pause stays one."""
    options = ("--runner", "fake", "--tokenizer-worker-num", "2")
    with Server(tmp_path, *options) as server:
        server.wait_ready()
        server.post("/slow_down", {"forward_sleep_time": 0.002}).close()
        streams = [server.post("/generate", body(400, rid=f"r{i}", stream=True)) for i in range(6)]
        quiet = [stream.readline() for stream in streams]
        assert all(line.startswith(b"data: ") for line in quiet)
        server.children()[SCHEDULER].kill()
        for stream in streams:
            lines = [line for line in stream if line.startswith(b"data: ")]
            last = json.loads(lines[-2].removeprefix(b"data: "))
            assert last["meta_info"]["completion_tokens"] == len(last["output_ids"]) == 400
        server.post("/pause_generation", {"mode": "in_place"}).close()
        server.children()[SCHEDULER].kill()
        wait_for(lambda: server.text.count("scheduler back after") == 2)
        held = threading.Thread(target=lambda: server.post("/generate", body(2)).read())
        held.start()
        held.join(1.0)
        assert held.is_alive()
        server.post("/continue_generation", {}).close()
        held.join(10)
        assert not held.is_alive()
        server.children()["headrace::http-1"].kill()
        wait_for(lambda: "http-1 back after" in server.text)
        with server.post("/generate", body(4)) as answer:
            assert json.load(answer)["meta_info"]["completion_tokens"] == 4


def test_a_scheduler_in_waiting_takes_over(tmp_path):
    with Server(tmp_path, "--runner", "fake", "--standby") as server:
        server.wait_ready()
        waiting = wait_for(lambda: server.children().get("headrace::scheduler-standby"))
        time.sleep(1.0)  # it has imported everything
        server.children()[SCHEDULER].kill()
        wait_for(lambda: "scheduler back after" in server.text)
        assert server.children()[SCHEDULER].pid == waiting.pid
        with server.post("/generate", body(4)) as answer:
            assert json.load(answer)["meta_info"]["completion_tokens"] == 4
        children = list(server.children().values())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        wait_for(lambda: not any(child.is_running() for child in children))


def test_a_server_that_cannot_stay_up_ends(tmp_path):
    with Server(tmp_path, "--runner", "fake", "--restart-limit", "1") as server:
        server.wait_ready()
        server.children()[DETOKENIZER].kill()
        wait_for(lambda: "detokenizer back after" in server.text)
        server.children()[DETOKENIZER].kill()
        assert server.process.wait(60) == 1
        assert "one too many (--restart-limit)" in server.text
