"""`bench offline` with an engine that takes a known time, and the table of benchmarks."""

import argparse
import importlib
import json
import subprocess
import sys
import time
from typing import Any

import pytest

import headrace
from headrace.bench import BENCHMARKS, offline
from headrace.bench.datasets import Prompt, random_prompts
from headrace.core.errors import BadRequest, HeadraceError

PREFILL = 0.02
DECODE = 0.002


class FakeEngine:
    """PREFILL seconds for a batch and DECODE for each further step; keeps what it was asked."""

    def __init__(self, reason: dict[str, Any] | None = None) -> None:
        self.calls: list[tuple[list[Any], list[dict[str, Any]]]] = []
        self.flushes = 0
        self.reason = reason

    def generate(
        self,
        prompt: list[str] | None = None,
        *,
        input_ids: list[list[int]] | None = None,
        sampling_params: list[dict[str, Any]],
    ) -> list[dict[str, Any]]:
        prompts: list[Any] = input_ids or prompt or []
        self.calls.append((prompts, sampling_params))
        lengths = [sampling["max_new_tokens"] for sampling in sampling_params]
        time.sleep(PREFILL + DECODE * (max(lengths) - 1))
        return [
            {
                "text": "",
                "output_ids": [],
                "meta_info": {
                    "prompt_tokens": len(item),
                    "completion_tokens": length,
                    "cached_tokens": 0,
                    "e2e_latency": 0.5,
                    "finish_reason": self.reason,
                },
            }
            for item, length in zip(prompts, lengths, strict=True)
        ]

    def flush_cache(self) -> None:
        self.flushes += 1


def test_prefill_and_decode_are_told_apart() -> None:
    engine = FakeEngine()
    result = offline.measure(engine, random_prompts(4, 50, 21, 1.0, 1, "ids"), ignore_eos=True)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (200, 84)
    assert result["prefill_time"] >= PREFILL
    assert result["duration"] >= PREFILL + 20 * DECODE
    assert result["prefill_throughput"] == pytest.approx(200 / result["prefill_time"])
    decode_time = result["duration"] - result["prefill_time"]
    assert result["decode_throughput"] == pytest.approx(80 / decode_time)
    assert result["total_throughput"] == pytest.approx(284 / result["duration"])
    assert result["median_e2e_latency_ms"] == 500.0
    assert engine.flushes == 2
    measured = [{item["max_new_tokens"] for item in sampling} for _, sampling in engine.calls]
    assert measured == [{4}, {1}, {21}]
    assert all(item["ignore_eos"] for _, sampling in engine.calls for item in sampling)
    lines = offline.table(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split()[:2] == ["prefill", "200"]


def test_text_prompts_go_as_text() -> None:
    engine = FakeEngine()
    offline.measure(engine, [Prompt(text="hello", input_len=1, output_len=2)], ignore_eos=False)
    assert engine.calls[-1][0] == ["hello"]


def test_one_token_each_has_no_decode_rate() -> None:
    result = offline.measure(FakeEngine(), random_prompts(2, 5, 1, 1.0, 1, "ids"), True)
    assert result["decode_throughput"] is None
    assert "-" in offline.table(result)


def test_mixed_prompts_and_aborts_are_errors() -> None:
    mixed = [
        Prompt(token_ids=[1], input_len=1, output_len=1),
        Prompt(text="x", input_len=1, output_len=1),
    ]
    with pytest.raises(BadRequest, match="mixes text and token ids"):
        offline.measure(FakeEngine(), mixed, True)
    aborting = FakeEngine({"type": "abort", "message": "too long"})
    with pytest.raises(HeadraceError, match="aborted a prompt: too long"):
        offline.measure(aborting, mixed[:1], True)


def test_run_loads_measures_and_closes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: dict[str, Any] = {}

    class Engine(FakeEngine):
        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            made.update(arguments)

        def __enter__(self) -> "Engine":
            return self

        def __exit__(self, *_: object) -> None:
            made["closed"] = True

    monkeypatch.setitem(vars(headrace), "Engine", Engine)
    parser = argparse.ArgumentParser()
    offline.add_arguments(parser)
    flags = ["--model", "m", "--engine-args", '{"page_size": 1}', "--num-prompts", "3", "--json"]
    assert offline.run(parser.parse_args(flags)) == 0
    assert made == {"model_path": "m", "page_size": 1, "closed": True}
    result = json.loads(capsys.readouterr().out)
    assert result["completed"] == 3 and result["model"] == "m" and result["load_time"] >= 0


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_has_flags_and_help(name: str) -> None:
    module = importlib.import_module(BENCHMARKS[name].module)
    parser = argparse.ArgumentParser(prog="headrace")
    sub = parser.add_subparsers().add_parser(name)
    module.add_arguments(sub)
    assert "--out" in sub.format_help()  # --output-file, or what write-model writes
    assert callable(module.run)


@pytest.mark.parametrize("name", ["startup", "control"])
def test_server_arguments_follow_two_dashes(name: str) -> None:
    module = importlib.import_module(BENCHMARKS[name].module)
    parser = argparse.ArgumentParser()
    module.add_arguments(
        parser.add_subparsers().add_parser("bench").add_subparsers().add_parser(name)
    )
    args = parser.parse_args(
        ["bench", name, "--json", "--", "--model-path", "m", "--page-size", "1"]
    )
    assert args.json
    assert args.server_args == ["--model-path", "m", "--page-size", "1"]


def test_the_table_loads_nothing_heavy() -> None:
    heavy = "{'aiohttp', 'numpy', 'torch'}"
    code = f"import sys, headrace.bench; print({heavy} & {{*sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
