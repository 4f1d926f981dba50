"""How the processes start, fail and end: with their own words, at once, leaving nothing."""

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from headrace import Engine, Runtime
from headrace.assets import demo_model_path
from headrace.core.errors import BadRequest, LoadError, WorkerLost
from tests.support.servers import Server, wait_for

pytestmark = [pytest.mark.timeout(180), pytest.mark.slow]
SCHEDULER, DETOKENIZER = "headrace::scheduler", "headrace::detokenizer"


def gone(processes):
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def assert_nothing_is_left(server, children):
    wait_for(lambda: gone(children))
    wait_for(lambda: not server.folders())
    assert server.status() == 0


def seconds_of_work(processes):
    """What they compute in a second."""
    before = sum(sum(p.cpu_times()[:2]) for p in processes)
    time.sleep(1.0)
    return sum(sum(p.cpu_times()[:2]) for p in processes) - before


def stream(server, tokens, rid="r"):
    """The lines of a long stream, as they come."""
    body = {
        "text": "Hello",
        "rid": rid,
        "stream": True,
        "sampling_params": {"max_new_tokens": tokens, "stream_interval": 1},
    }
    return server.post("/generate", body)


def test_life_of_a_server(tmp_path):
    """Bound early, healthy late, children named, idle when idle, gone after SIGTERM."""
    with Server(tmp_path, "--runner", "fake") as server:
        statuses = []

        def ready():
            statuses.append(server.status())
            return statuses[-1] == 200

        wait_for(ready)
        assert set(statuses) <= {0, 503, 200}
        children = server.children()
        assert set(children) == {SCHEDULER, DETOKENIZER}
        assert len(server.folders()) == 1
        assert "The server is ready at" in server.text and "start-up took" in server.text

        family = [psutil.Process(server.process.pid), *children.values()]
        wait_for(lambda: seconds_of_work(family) <= 0.1)

        server.process.terminate()
        assert server.process.wait(60) == 0, server.text
        assert_nothing_is_left(server, children.values())


@pytest.mark.parametrize("everyone", [False, True], ids=["the server", "every process"])
def test_sigterm_lets_running_requests_finish(tmp_path, everyone):
    """Also when a service manager or a terminal signals the children, too."""
    with Server(tmp_path, "--runner", "fake") as server:
        server.wait_ready()
        children = server.children().values()
        response = stream(server, 900)
        response.readline()
        for child in children if everyone else ():
            child.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGTERM if everyone else signal.SIGINT)
        lines = [line for line in response if line.startswith(b"data: ")]
        assert lines[-1] == b"data: [DONE]\n"
        last = json.loads(lines[-2].removeprefix(b"data: "))
        assert last["meta_info"]["completion_tokens"] == 900
        assert server.process.wait(60) == 0, server.text
        assert_nothing_is_left(server, children)


def test_the_signal_of_a_lost_parent_may_come_many_times(tmp_path):
    """The kernel sends it once for each thread of the parent that dies."""
    with Server(tmp_path, "--runner", "fake", "--on-crash", "exit") as server:
        server.wait_ready()
        detokenizer = server.children()[DETOKENIZER]
        with contextlib.suppress(ProcessLookupError):
            for _ in range(100_000):
                os.kill(detokenizer.pid, signal.SIGUSR1)
        wait_for(lambda: gone([detokenizer]))
        assert server.process.wait(60) == 1


def test_sigkill_of_a_busy_server_leaves_nothing(tmp_path):
    """Also while it loads, and while the scheduler computes."""
    for ready in (False, True):
        with Server(tmp_path, "--runner", "model" if ready else "fake") as server:
            children = wait_for(lambda s=server: len(s.children()) == 2 and s.children())
            if ready:
                server.wait_ready()
                children = server.children()
                stream(server, 900).readline()
            server.process.kill()
            server.process.wait()
            assert_nothing_is_left(server, children.values())


@pytest.mark.parametrize("role", [SCHEDULER, DETOKENIZER])
def test_a_lost_child_ends_the_server_with_an_error_if_asked_to(tmp_path, role):
    with Server(tmp_path, "--runner", "fake", "--on-crash", "exit") as server:
        server.wait_ready()
        children = server.children()
        # Nothing comes any more, so the request is in flight when the child dies.
        children[SCHEDULER].suspend()
        answer = []
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 900}}

        def ask():
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/generate", json.dumps(body), headers)
            response = connection.getresponse()
            answer.append((response.status, json.loads(response.read())))

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(0.3)
        began = time.monotonic()
        children[role].kill()
        assert server.process.wait(60) == 1
        assert time.monotonic() - began < 20
        asking.join()
        ((status, error),) = answer
        name = role.removeprefix("headrace::")
        assert status == 500 and f"The {name} process was lost" in error["error"]["message"]
        assert f"The {name} process was lost (killed by SIGKILL" in server.text
        assert_nothing_is_left(server, children.values())


def test_a_lost_child_fails_the_requests_of_an_engine_if_asked_to():
    with Engine(runner="fake", on_crash="exit") as engine:
        chunks = engine.generate(
            "Hello", {"max_new_tokens": 900, "stream_interval": 1}, stream=True
        )
        next(chunks)
        scheduler, _ = (psutil.Process(pid) for pid in engine.get_all_child_pids())
        scheduler.suspend()
        scheduler.kill()
        with pytest.raises(WorkerLost, match="The scheduler process was lost"):
            list(chunks)
        with pytest.raises(WorkerLost):
            engine.generate("Hello")


def test_the_port_must_be_free(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    with Server(tmp_path / "first", "--runner", "fake") as first:
        wait_for(lambda: first.status() != 0)
        with Server(tmp_path / "second", "--runner", "fake", "--port", str(first.port)) as second:
            assert second.process.wait(60) == 1
            assert f"cannot listen on 127.0.0.1:{first.port}: Address already in use" in second.text
            assert not second.folders()


def processes() -> set[int]:
    """Our children; servers of other tests' fixtures may be among them."""
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_path": "/nowhere/at/all"}, "/nowhere/at/all is neither a folder nor a hub id"),
        ({"context_length": 10**6}, "--context-length 1000000 is more than the model's"),
        ({"json_model_override_args": "x"}, "--json-model-override-args must be a JSON object"),
        ({"preferred_sampling_params": "[]"}, "--preferred-sampling-params must be a JSON object"),
        ({"max_total_tokens": 10**9}, "KV cache of 1000000000 tokens"),
    ],
)
def test_a_wrong_option_is_told(options, message):
    before = processes()
    with pytest.raises((LoadError, BadRequest)) as caught:
        Engine(runner="fake", **options)
    assert message in caught.value.message
    assert processes() == before


def test_a_broken_checkpoint_is_told_in_the_childs_words(tmp_path):
    before = processes()
    broken = tmp_path / "model"
    shutil.copytree(demo_model_path(), broken)
    (weights,) = broken.glob("*.safetensors")
    weights.write_bytes(b"no weights")
    with pytest.raises(LoadError) as caught:
        Engine(model_path=str(broken))
    assert weights.name in caught.value.message
    assert "Traceback" not in caught.value.message
    assert processes() == before


@pytest.mark.parametrize("role", ["scheduler", "detokenizer"])
def test_a_crash_while_loading_shows_its_last_output(tmp_path, monkeypatch, role):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if '{role}' in sys.orig_argv:\n"
        "    print('a last word', file=sys.stderr, flush=True)\n"
        "    os._exit(7)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = processes()
    with pytest.raises(LoadError) as caught:
        Engine(runner="fake")
    assert f"the {role} process failed while loading (exit code 7)" in caught.value.message
    assert "a last word" in caught.value.message
    assert processes() == before


def test_an_exception_while_loading_shows_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "setproctitle.py").write_text("def setproctitle(title): pass\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nif 'scheduler' in sys.orig_argv:\n"
        "    sys.modules['headrace.engine.build'] = None\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(LoadError) as caught:
        Engine(runner="fake")
    assert "the scheduler process failed while loading (exit code 1)" in caught.value.message
    assert "Traceback" in caught.value.message and "headrace.engine.build" in caught.value.message


def test_a_killed_script_leaves_no_engine(tmp_path):
    code = (
        "from headrace import Engine\n"
        "engine = Engine(runner='fake')\n"
        "print(*engine.get_all_child_pids(), flush=True)\n"
        "for _ in engine.generate('x', {'max_new_tokens': 900}, stream=True): pass\n"
        "import time; time.sleep(60)\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    children = [psutil.Process(int(pid)) for pid in script.stdout.readline().split()]
    assert len(children) == 2 and list(tmp_path.glob("headrace-*"))
    script.kill()
    script.wait()
    script.stdout.close()
    wait_for(lambda: gone(children))
    wait_for(lambda: not list(tmp_path.glob("headrace-*")))


def test_a_killed_script_leaves_no_runtime(tmp_path):
    code = (
        "from headrace import Runtime\n"
        "runtime = Runtime(runner='fake')\n"
        "print(runtime.url, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    script = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
    )
    assert script.stdout.readline().startswith(b"http://127.0.0.1:")
    family = psutil.Process(script.pid).children(recursive=True)
    assert len(family) == 3
    script.kill()
    script.wait()
    script.stdout.close()
    wait_for(lambda: gone(family))
    wait_for(lambda: not list(tmp_path.glob("headrace-*")))


def test_runtime_is_the_engine_over_http():
    sampling = {"max_new_tokens": 8, "temperature": 0.0, "seed": 1}
    with Runtime(runner="fake", api_key="secret") as runtime, Engine(runner="fake") as engine:
        ours = runtime.generate(["Hello", "there"], sampling)
        assert [r["output_ids"] for r in ours] == [
            r["output_ids"] for r in engine.generate(["Hello", "there"], sampling)
        ]
        chunks = list(runtime.generate("Hello", sampling, stream=True))
        assert chunks[-1]["text"] == ours[0]["text"]
        with pytest.raises(BadRequest, match="top_p must be 0 to 1"):
            runtime.generate("Hello", {"top_p": 3})
        assert runtime.get_server_info()["runner"] == "fake"
        assert runtime.get_model_info()["model_type"] == "llama"
        assert runtime.flush_cache() is True
        server = runtime._process
    runtime.shutdown()
    assert server.poll() == 0


def test_runtime_tells_of_a_server_that_does_not_start():
    with pytest.raises(LoadError, match=r"ended while it started \(exit code 1\)"):
        Runtime(runner="fake", model_path="/nowhere")
