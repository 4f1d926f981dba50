"""`bench compare`: workloads on a server of our own, the order of a comparison, its arithmetic."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from headrace.bench import compare, workloads
from headrace.bench.load import LoadResult
from headrace.bench.stream import Sample
from headrace.bench.workloads import Workload
from headrace.core.errors import BadRequest, HeadraceError

# Answers /v1/completions with one token every few milliseconds, as OpenAI chunks.
SCRIPT = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, gap, lost = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/v1/models":
            self.wfile.write(b'{"data": [{"id": "tiny"}]}')

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions" and body["model"] == "tiny"
        assert body["ignore_eos"] and body["temperature"] == 0
        count = body["max_tokens"] - lost
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for done in range(1, count + 1):
            time.sleep(gap)
            reason = "length" if done == count else None
            self.event({"choices": [{"index": 0, "text": "x", "finish_reason": reason}]})
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\\n\\n")

    def event(self, value):
        self.wfile.write(b"data: %s\\n\\n" % json.dumps(value).encode())


ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever(poll_interval=0.01)
"""


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a server, one that is three times as slow, one that loses tokens."""
    script = tmp_path / "server.py"
    script.write_text(SCRIPT)
    monkeypatch.setenv("SERVER", str(script))
    command = f"{sys.executable} $SERVER {{port}}"
    lines = [
        f"[{name}]\ncommand = '{command} {gap} {lost}'"
        for name, gap, lost in (("ours", 0.004, 0), ("slow", 0.012, 0), ("broken", 0, 1))
    ]
    path = tmp_path / "servers.toml"
    path.write_text("\n".join(lines))
    return path


def bench(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    return compare.run(parser.parse_args([*flags, "--short"]))


def test_two_servers_in_turn(
    servers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "noise", lambda _: {"load_average": 1.0})
    flags = ("--servers", "ours", "slow", "--rounds", "2", "--workloads", "start", "decode-1")
    assert bench(str(servers), *flags, "--json") == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [(b["round"], b["workload"], list(b["values"])) for b in result["blocks"]] == [
        (1, "start", ["ours", "slow"]),
        (1, "decode-1", ["ours", "slow"]),
        (2, "start", ["slow", "ours"]),
        (2, "decode-1", ["slow", "ours"]),
    ]
    start, decode = result["rows"]
    assert start["unit"] == "s" and 0 < start["medians"]["ours"] < 30
    assert decode["best_other"] == "slow" and decode["ratio"] > 1
    assert 0 < decode["medians"]["slow"] <= 1 / 0.012 * 1.05
    assert err.count("round ") == 8


def test_a_wrong_answer_is_an_error_beside_good_ones(
    servers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "noise", lambda _: {"load_average": 1.0})
    flags = ("--servers", "ours", "broken", "--rounds", "1", "--workloads", "prefill-512")
    assert bench(str(servers), *flags) == 1
    out, err = capsys.readouterr()
    assert "asked for 8 tokens, an answer has 7" in err
    assert "prefill-512 tokens/s" in out and "short workloads" in out


@pytest.mark.parametrize(
    ("text", "flags", "problem"),
    [
        ("[a]\ncommand = 1", (), "Expected `str`"),
        ("[a]\ncommand = 'x'\nport = 1", (), "unknown field `port`"),
        ("[a]", (), "either a command or a url"),
        ("[a", (), "Expected"),
        ("", (), "has nothing"),
        ("[a]\ncommand = 'x'", ("--servers", "b"), "has a, not b"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, flags: tuple[str, ...], problem: str) -> None:
    path = tmp_path / "servers.toml"
    path.write_text(text)
    with pytest.raises(BadRequest, match=problem):
        bench(str(path), *flags)


def test_commands_take_port_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL", "/a folder/m")
    launch = compare.Launch(command="run -m $MODEL '--port={port}'")
    assert launch.words(7) == ["run", "-m", "/a folder/m", "--port=7"]
    monkeypatch.delenv("MODEL")
    with pytest.raises(BadRequest, match="not set"):
        launch.words(7)


def test_a_server_that_runs_already(servers: Path) -> None:
    with compare.Peer("x", compare.read_launches(servers, ["ours"])["ours"], 30.0) as started:
        started.start()
        url = compare.Launch(url=started._process.base_url)
        with compare.Peer("y", url, 30.0) as peer:
            assert 0 < peer.measure(workloads.SHORT["decode-1"], 1) <= 1 / 0.004 * 1.05
            with pytest.raises(HeadraceError, match="cannot be started"):
                peer.start()
        assert started.measure(workloads.SHORT["decode-1"], 2) > 0


def test_a_program_that_is_not_there() -> None:
    with (
        compare.Peer("x", compare.Launch(command="/no/such/program"), 5.0) as peer,
        pytest.raises(HeadraceError, match="cannot run /no/such/program"),
    ):
        peer.start()


def sample(start: float, ttft: float, itl: list[float]) -> Sample:
    return Sample(
        ok=True, start=start, ttft=ttft, itl=itl, output_tokens=1 + len(itl), e2e=ttft + sum(itl)
    )


def test_steady_rate_counts_only_while_all_run() -> None:
    early, late = sample(0.0, 1.0, [1.0] * 9), sample(0.0, 4.0, [1.0] * 9)
    assert workloads.steady_rate([early, late]) == pytest.approx(2.0)  # from 4 s to 10 s
    with pytest.raises(HeadraceError, match="never ran"):
        workloads.steady_rate([sample(0.0, 1.0, [1.0]), sample(5.0, 1.0, [1.0])])


def test_values_of_the_kinds() -> None:
    outcome = LoadResult([sample(0.0, t, [0.5]) for t in (1.0, 2.0, 4.0)], 5.0, 0.0)
    assert workloads.value(Workload("prefill", 3, 1, 100, 2), outcome) == 50.0
    assert workloads.value(Workload("load", 3, 3, 100, 2), outcome) == 6 / 5
    assert workloads.value(Workload("prefix", 3, 3, 100, 2), outcome) == 5.0


def test_seeds_share_no_beginning() -> None:
    prefix = workloads.FULL["prefix"]
    one, two = prefix.prompts(1), prefix.prompts(2)
    assert len({tuple(prompt.token_ids[:1024]) for prompt in one}) == 1
    assert len({tuple(prompt.token_ids) for prompt in one}) == 32
    assert one[0].token_ids[:16] != two[0].token_ids[:16]


def test_ratios_are_above_one_when_the_first_is_better() -> None:
    blocks = [
        {"workload": "start", "values": {"a": 2.0, "b": 8.0, "c": 6.0}},
        {"workload": "load", "values": {"a": 30.0, "b": 10.0, "c": 20.0}},
        {"workload": "load", "values": {"a": 50.0, "b": 12.0}},
        {"workload": "prefix", "values": {"b": 1.0}},
    ]
    start, load, prefix = compare.summarize(blocks, ["a", "b", "c"])
    assert (start["ratio"], start["best_other"]) == (3.0, "c")
    assert (load["ratio"], load["best_other"], load["medians"]["a"]) == (2.0, "c", 40.0)
    assert prefix["ratio"] is None
