"""Servers with several HTTP and detokenizer processes: one server to clients, and to its end."""

import json
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psutil
import pytest

from tests.support.servers import Server, wait_for

pytestmark = pytest.mark.slow

SECRET = "k-of-the-mill"
KEY = {"Authorization": f"Bearer {SECRET}"}
OPTIONS = ("--runner", "fake", "--tokenizer-worker-num", "2", "--detokenizer-worker-num", "2")


def ask(server: Server, path: str, body: dict | None = None, headers: dict = KEY):
    """The open response on a new connection, which any worker may take."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        server.url + path, data, headers={"Content-Type": "application/json", **headers}
    )
    return urllib.request.urlopen(request, timeout=120)


def generate(server: Server, rid: str, seed: int, **fields):
    sampling = {"max_new_tokens": 20, "seed": seed, "ignore_eos": True}
    return ask(
        server, "/generate", {"text": "Hi", "rid": rid, "sampling_params": sampling, **fields}
    )


def long_streams(server: Server, name: str, count: int = 6, tokens: int = 900) -> list:
    """Open streams, at the first tokens."""
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "seed": 1}
    streams = [
        generate(server, f"{name}-{i}", 1, stream=True, sampling_params=sampling)
        for i in range(count)
    ]
    for stream in streams:
        stream.readline()
    return streams


def last_of(stream) -> dict:
    """The last event of a stream that ends well."""
    lines = [line for line in stream if line.startswith(b"data: ")]
    assert lines.pop() == b"data: [DONE]\n"
    return json.loads(lines[-1].removeprefix(b"data: "))


def running(server: Server) -> int:
    with ask(server, "/v1/loads") as answer:
        return json.load(answer)["loads"][0]["num_running_reqs"]


@contextmanager
def slow(server: Server) -> Iterator[None]:
    """Steps take long enough for something to happen between them: 900 tokens are 18 s."""
    ask(server, "/slow_down", {"forward_sleep_time": 0.02}).close()
    try:
        yield
    finally:
        ask(server, "/slow_down", {"forward_sleep_time": 0}).close()


def assert_nothing_is_left(server: Server, children: list[psutil.Process]) -> None:
    wait_for(lambda: not [child for child in children if child.is_running()])
    wait_for(lambda: not server.folders())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    base = tmp_path_factory.mktemp("workers")
    with Server(base, *OPTIONS, "--api-key", SECRET, "--log-level", "debug") as made:
        yield made.wait_ready()


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


def test_the_log_of_requests_is_of_all_workers(server):
    settings = {"log_requests": True, "log_requests_level": 3, "log_requests_format": "json"}
    ask(server, "/configure_logging", settings).close()
    try:
        wait_for(lambda: {"http-1", "http-2"} <= logged_by(server))
    finally:
        ask(server, "/configure_logging", {"log_requests": False}).close()
    assert SECRET not in server.text
    with ask(server, "/server_info") as answer:
        assert SECRET not in answer.read().decode()


def logged_by(server: Server) -> set[str]:
    """Who has logged requests, after some more of them."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: generate(server, f"l{i}", 1).close(), range(16)))
    return set(re.findall(r'(http-\d) INFO {"event":"finished"', server.text))


def test_keys_and_health_whoever_answers(server):
    for _ in range(8):
        assert server.status("/health") == server.status("/health_generate") == 200
        assert server.status("/v1/models") == 401
    with ask(server, "/server_info") as answer:
        assert json.load(answer)["status"] == "ready"


def test_aborts_reach_every_worker(server):
    with slow(server):
        streams = long_streams(server, "abort")
        ask(server, "/abort_request", {"rid": "abort-"}).close()
        for stream in streams:
            assert last_of(stream)["meta_info"]["finish_reason"]["type"] == "abort"


def test_a_client_that_leaves_frees_its_request(server):
    with slow(server):
        streams = long_streams(server, "leave")
        wait_for(lambda: running(server) == 6)
        for stream in streams:
            stream.close()
        wait_for(lambda: not running(server), 9)


def test_a_rid_is_taken_on_every_worker(server):
    with slow(server):
        (stream,) = long_streams(server, "same", 1, tokens=300)
        for _ in range(8):
            with pytest.raises(urllib.error.HTTPError) as refused:
                generate(server, "same-0", 2)
            assert refused.value.code == 400 and b"in use" in refused.value.read()
    assert last_of(stream)["meta_info"]["completion_tokens"] == 300


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_is_of_all_workers(server, mode):
    (alone,) = map(last_of, long_streams(server, f"alone-{mode}", 1, tokens=300))
    with slow(server):
        streams = long_streams(server, mode, 4, tokens=300)
        ask(server, "/pause_generation", {"mode": mode}).close()
    assert server.status("/health") == server.status("/health_generate") == 200
    wait_for(lambda: running(server) == (0 if mode == "retract" else 4))
    ask(server, "/continue_generation", {}).close()
    for stream in streams:
        assert last_of(stream)["output_ids"] == alone["output_ids"]


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


def test_sigterm_lets_streams_end_and_leaves_nothing(server):
    """The end of the server that the tests before had."""
    children = list(server.children().values())
    assert len(children) == 5
    streams = long_streams(server, "end", 4)
    for process in (*children, server.process):
        process.send_signal(signal.SIGTERM)
    for stream in streams:
        assert last_of(stream)["meta_info"]["completion_tokens"] == 900
    assert server.process.wait(60) == 0, server.text
    assert_nothing_is_left(server, children)
    assert SECRET not in server.text and "Traceback" not in server.text


@pytest.mark.parametrize("victim", ["main", "scheduler"])
def test_a_lost_process_takes_all_with_it(tmp_path, victim):
    with Server(tmp_path, *OPTIONS, "--on-crash", "exit") as server:
        server.wait_ready()
        children = server.children()
        if victim == "main":
            server.process.kill()
            server.process.wait()
        else:
            ask(server, "/slow_down", {"forward_sleep_time": 0.01}).close()
            streams = long_streams(server, "lost")
            children[f"headrace::{victim}"].kill()
            assert all(b"process was lost" in stream.read() for stream in streams)
            assert server.process.wait(60) == 1
            assert f"The {victim} process was lost" in server.text
        assert_nothing_is_left(server, list(children.values()))
