"""`bench startup` and `bench control` on a small server script with a child process.

The script has the shape of `headrace serve`: a main process that answers HTTP and a child that
names itself scheduler. What is tested is the measuring, and that nothing stays behind.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from headrace.bench import control, startup
from headrace.bench.process import ServerProcess, serve_command
from headrace.core.errors import HeadraceError
from headrace.core.ports import free_port

SCRIPT = """
import json, signal, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, mode = int(sys.argv[1]), sys.argv[2]
if mode == "broken":
    print("cannot load the model: no such file")
    sys.exit(3)
WORK = "import time\\n" + ("while True: pass" if mode == "busy" else "time.sleep(60)")
child = subprocess.Popen([sys.executable, "-c", WORK, "fake::scheduler"])
time.sleep(0.2)
born = time.monotonic()


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200 if time.monotonic() - born > 0.1 else 503)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count = body["sampling_params"]["max_new_tokens"]
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for done in range(1, count + 1):
            time.sleep(0.002)
            reason = {"type": "length", "length": count} if done == count else None
            meta = {"prompt_tokens": 1, "completion_tokens": done, "finish_reason": reason}
            event = {"text": "x" * done, "output_ids": [0] * done, "meta_info": meta}
            self.wfile.write(b"data: %s\\n\\n" % json.dumps(event).encode())
        self.wfile.write(b"data: [DONE]\\n\\n")


def stop(*_):
    if mode != "leaky":
        child.kill()
        child.wait()
    sys.exit(0)


signal.signal(signal.SIGTERM, stop)
ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever(poll_interval=0.01)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SCRIPT)
    return path


def command(script: Path, port: int, mode: str = "good") -> list[str]:
    return [sys.executable, str(script), str(port), mode]


def test_startup_measures_each_stage_in_order(script: Path) -> None:
    port = free_port()
    began = time.perf_counter()
    start = startup.measure_start(command(script, port), port, 30.0)
    assert 0.2 <= start.port_open <= start.health <= start.first_token
    assert start.first_token <= time.perf_counter() - began
    assert start.health - 0.2 >= 0.1  # 503 is not ready
    assert start.peak_rss > 2 * 5e6  # two Python processes
    assert start.leftovers == ()


def test_what_a_server_leaves_behind_is_named_and_ended(script: Path) -> None:
    port = free_port()
    with ServerProcess(command(script, port, "leaky"), port, 30.0) as server:
        server.wait_health()
        main, child = server.tree()
        server.stop()
        assert server.leftovers == [f"process {child.pid} (scheduler)"]
    for process in (main, child):
        assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_orphans_of_a_dead_server_are_found(script: Path) -> None:
    port = free_port()
    with ServerProcess(command(script, port, "leaky"), port, 30.0) as server:
        server.wait_health()
        main, child = server.tree()
        main.kill()
        main.wait(30)
        server.stop()
        assert server.leftovers == [f"process {child.pid} (scheduler)"]


def test_sigterm_to_the_measuring_process_ends_the_server(script: Path) -> None:
    port = free_port()
    code = (
        "import time\n"
        "from headrace.bench.process import ServerProcess, ended_by_sigterm\n"
        f"server = ServerProcess({command(script, port)}, {port}, 30.0)\n"
        "with ended_by_sigterm(), server:\n"
        "    server.wait_port()\n"
        "    print(server.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    words = [sys.executable, "-c", code]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as measuring:
        assert measuring.stdout is not None
        server = psutil.Process(int(measuring.stdout.readline()))
        assert server.is_running()
        measuring.terminate()
        assert measuring.wait(30) == 128 + signal.SIGTERM
    assert not server.is_running()


def test_server_that_does_not_start_shows_its_own_words(script: Path) -> None:
    port = free_port()
    with pytest.raises(HeadraceError, match="status 3 while starting") as caught:
        startup.measure_start(command(script, port, "broken"), port, 30.0)
    assert "cannot load the model: no such file" in caught.value.message


def test_start_that_takes_too_long(script: Path) -> None:
    port = free_port()
    with pytest.raises(HeadraceError, match=r"port did not open in 0\.1 s"):
        startup.measure_start(command(script, port), port, 0.1)


@pytest.mark.parametrize(("mode", "status"), [("good", 0), ("leaky", 1)])
def test_startup_command(
    script: Path,
    mode: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(startup, "serve_command", lambda port, _: command(script, port, mode))
    parser = argparse.ArgumentParser()
    startup.add_arguments(parser)
    assert startup.run(parser.parse_args(["--runs", "1"])) == status
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == [
        *("since", "run", "min", "median", "max")
    ]
    assert ("left behind after SIGTERM: process" in err) == (mode == "leaky")


def test_control_command_asks_for_the_fake_runner(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def build(port: int, server_args: list[str]) -> list[str]:
        asked.extend(server_args)
        return command(script, port)

    monkeypatch.setattr(control, "serve_command", build)
    parser = argparse.ArgumentParser()
    control.add_arguments(parser)
    flags = ["--concurrency", "2", "--rounds", "1", "--random-output-len", "10", "--json"]
    assert control.run(parser.parse_args([*flags, "--", "--page-size", "1"])) == 0
    assert asked == ["--runner", "fake", "--page-size", "1"]
    (level,) = json.loads(capsys.readouterr().out)["levels"]
    assert (level["concurrency"], level["output_tokens"]) == (2, 20)


def test_startup_report() -> None:
    starts = [startup.Start(1.0 + i, 2.0 + i, 3.0 + i, 2**20 * (i + 1), ()) for i in range(3)]
    result = startup.summarize(starts, ["--page-size", "1"])
    assert result["median_first_token"] == 4.0
    assert (result["min_port_open"], result["max_health"]) == (1.0, 4.0)
    assert result["leftovers"] == []
    lines = startup.table(starts).splitlines()
    assert lines[-2].split() == ["median", "2.00", "3.00", "4.00", "2.00"]
    assert max(map(len, lines)) <= 80


def test_control_charges_cpu_time_to_the_process_that_spent_it(script: Path) -> None:
    port = free_port()
    workload = control.Workload(rounds=2, input_len=4, output_len=50, seed=1, show_progress=False)
    levels = control.measure(command(script, port, "busy"), port, 30.0, [1, 3], workload)
    assert [level["concurrency"] for level in levels] == [1, 3]
    assert [level["output_tokens"] for level in levels] == [100, 300]
    for level in levels:
        # The child spins, so it spends more than a main process that mostly sleeps.
        assert level["scheduler_us_per_token"] > level["main_us_per_token"]
        assert level["detokenizer_us_per_token"] == 0
        parts = sum(level[f"{name}_us_per_token"] for name in control.ROLES)
        assert level["server_us_per_token"] == pytest.approx(parts)
        assert level["output_throughput"] > 0
    lines = control.table(levels).splitlines()
    assert max(map(len, lines)) <= 80
    assert json.dumps(levels)


def test_serve_command_runs_this_python() -> None:
    built = serve_command(1234, ["--runner", "fake"])
    assert built[:4] == [sys.executable, "-m", "headrace", "serve"]
    assert built[4:] == ["--host", "127.0.0.1", "--port", "1234", "--runner", "fake"]
