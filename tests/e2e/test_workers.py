"""Servers with several HTTP and detokenizer processes: one server to clients, and to its end."""

import json
import re
import signal
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.support.servers import Server, wait_for

pytestmark = pytest.mark.slow

KEY = {"Authorization": "Bearer k"}
OPTIONS = ("--runner", "fake", "--tokenizer-worker-num", "2", "--detokenizer-worker-num", "2")


def ask(server: Server, path: str, body: dict | None = None, headers: dict = KEY):
    """The open response on a new connection, which any worker may take."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, data, headers={"Content-Type": "application/json", **headers}
    )
    return urllib.request.urlopen(request, timeout=30)


def generate(server: Server, rid: str, seed: int, **fields):
    sampling = {"max_new_tokens": 20, "seed": seed, "ignore_eos": True}
    return ask(
        server, "/generate", {"text": "Hi", "rid": rid, "sampling_params": sampling, **fields}
    )


def assert_nothing_is_left(server: Server, children: list[psutil.Process]) -> None:
    wait_for(lambda: not [child for child in children if child.is_running()], 10)
    wait_for(lambda: not server.folders(), 5)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("workers")
    with Server(base, *OPTIONS, "--api-key", "k") as made:
        yield made.wait_ready()
        made.process.send_signal(signal.SIGTERM)
        made.process.wait(20)


def test_every_worker_gives_the_same_answers(server):
    def one(number: int) -> list[int]:
        with generate(server, f"r{number}", number % 4) as answer:
            return json.load(answer)["output_ids"]

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(one, range(48)))
    assert all(len(ids) == 20 for ids in found)
    assert all(ids == found[number % 4] for number, ids in enumerate(found))
    assert len({tuple(ids) for ids in found}) == 4


def test_metrics_are_of_all_workers(server):
    def count() -> float:
        with ask(server, "/metrics", headers={}) as answer:
            text = answer.read().decode()
        return float(re.search(r"num_requests_total\{.*\} ([0-9.e+]+)", text)[1])

    before = count()
    for number in range(12):
        generate(server, f"m{number}", 1).close()
    assert [count() for _ in range(6)] == [before + 12] * 6


def test_every_worker_feeds_the_dashboard(server):
    """What it tells is of all workers, whichever is asked."""

    def first_tokens() -> int:
        with ask(server, "/ui/events") as answer:
            news = [answer.readline() for _ in range(3)][2]
        seen = json.loads(news.removeprefix(b"data: "))
        assert seen["steps"] and seen["pages"]["total"] > 0
        return sum(seen["ttft"]["counts"])

    before = first_tokens()
    for number in range(12):
        generate(server, f"seen-{number}", 1).close()
    time.sleep(0.6)  # what was asked for another watcher half a second ago is told again
    assert [first_tokens() for _ in range(6)] == [before + 12] * 6


def test_keys_and_health_whoever_answers(server):
    for _ in range(8):
        assert server.status("/health") == server.status("/health_generate") == 200
        assert server.status("/v1/models") == 401
    with ask(server, "/server_info") as answer:
        assert json.load(answer)["status"] == "ready"


def test_aborts_reach_every_worker(server):
    long = {"sampling_params": {"max_new_tokens": 100_000, "ignore_eos": True}, "stream": True}
    ask(server, "/slow_down", {"forward_sleep_time": 0.002})
    try:
        long["sampling_params"]["max_new_tokens"] = 900
        streams = [
            ask(server, "/generate", {"text": "Hi", "rid": f"abort-{i}", **long}) for i in range(6)
        ]
        for stream in streams:
            stream.readline()
        ask(server, "/abort_request", {"rid": "abort-"})
        for stream in streams:
            lines = [line for line in stream if line.startswith(b"data: {")]
            last = json.loads(lines[-1].removeprefix(b"data: "))
            assert last["meta_info"]["finish_reason"]["type"] == "abort"
    finally:
        ask(server, "/slow_down", {"forward_sleep_time": 0})


def test_sessions_go_over_workers(server):
    with ask(server, "/open_session", {"capacity_of_str_len": 1000}) as answer:
        id = json.load(answer)
    after = None
    for turn in range(8):
        params = {"id": id, "rid": after}
        with generate(server, f"{id}-{turn}", 1, session_params=params) as answer:
            meta = json.load(answer)["meta_info"]
        after = meta["id"]
    assert meta["prompt_tokens"] > 7 * 20


def test_sigterm_lets_streams_end_and_leaves_nothing(tmp_path):
    with Server(tmp_path, *OPTIONS) as server:
        server.wait_ready()
        children = list(server.children().values())
        assert len(children) == 5
        stream = generate(
            server, "r", 1, stream=True, sampling_params={"max_new_tokens": 900, "ignore_eos": True}
        )
        stream.readline()
        for process in (*children, server.process):
            process.send_signal(signal.SIGTERM)
        lines = [line for line in stream if line.startswith(b"data: ")]
        assert lines[-1] == b"data: [DONE]\n"
        assert server.process.wait(20) == 0, server.text
        assert_nothing_is_left(server, children)


@pytest.mark.parametrize("victim", ["main", "http-1"])
def test_a_lost_process_takes_all_with_it(tmp_path, victim):
    with Server(tmp_path, *OPTIONS) as server:
        server.wait_ready()
        children = server.children()
        if victim == "main":
            server.process.kill()
        else:
            children[f"headrace::{victim}"].kill()
            assert server.process.wait(20) == 1
            assert "The http-1 process was lost" in server.text
        server.process.wait()
        assert_nothing_is_left(server, list(children.values()))
