"""Numbers against the standard library, the table's width, and the output file."""

import argparse
import json
import statistics
from pathlib import Path

import pytest

from headrace.bench import report
from headrace.bench.stream import Sample
from headrace.core.errors import HeadraceError


def sample(index: int) -> Sample:
    return Sample(
        ok=True,
        start=0.0,
        prompt_tokens=100,
        output_tokens=5,
        cached_tokens=25,
        ttft=0.1 * (index + 1),
        e2e=1.0 + index,
        tpot=0.01 * (index + 1),
        itl=[0.02, 0.04],
        gaps=[0.06],
        chunks=2,
        text=f"text {index}",
    )


def test_summary() -> None:
    failed = Sample(ok=False, start=0.0, error="no", e2e=50.0)
    result = report.summarize([*(sample(i) for i in range(4)), failed], 10.0)
    assert (result["completed"], result["failed"]) == (4, 1)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (400, 20)
    assert result["cached_token_share"] == 0.25
    assert result["request_throughput"] == 0.4
    assert result["input_throughput"] == 40.0
    assert result["output_throughput"] == 2.0
    assert result["total_throughput"] == 42.0
    assert result["concurrency"] == pytest.approx((1 + 2 + 3 + 4) / 10)
    assert result["tokens_per_chunk"] == 2.5
    ttfts = [100.0, 200.0, 300.0, 400.0]
    assert result["mean_ttft_ms"] == pytest.approx(statistics.fmean(ttfts))
    assert result["median_ttft_ms"] == pytest.approx(statistics.median(ttfts))
    assert result["std_ttft_ms"] == pytest.approx(statistics.pstdev(ttfts))
    assert result["max_ttft_ms"] == pytest.approx(400.0)
    assert result["mean_itl_ms"] == pytest.approx(30.0)
    assert result["mean_chunk_gap_ms"] == pytest.approx(60.0)
    assert result["mean_e2e_latency_ms"] == pytest.approx(2500.0)


def test_percentiles_are_those_of_the_standard_library() -> None:
    values = [float(value * value % 101) for value in range(101)]
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    found = report.statistics(values)
    assert found["p90"] == pytest.approx(hundredths[89])
    assert found["p95"] == pytest.approx(hundredths[94])
    assert found["p99"] == pytest.approx(hundredths[98])


def test_keys_of_sglang_bench_serving_are_there() -> None:
    known = {"duration", "completed", "total_input_tokens", "total_output_tokens", "concurrency"}
    known |= {"request_throughput", "input_throughput", "output_throughput"}
    known |= {
        f"{statistic}_{name}_ms"
        for name in ("ttft", "tpot", "itl", "e2e_latency")
        for statistic in ("mean", "median", "std", "p99")
    }
    assert known <= set(report.summarize([sample(0)], 1.0))


def test_no_data_is_null_and_a_dash() -> None:
    single = Sample(ok=True, start=0.0, prompt_tokens=1, output_tokens=1, chunks=1)
    result = report.summarize([single], 1.0)
    assert result["mean_tpot_ms"] is None
    table = report.serve_table(result)
    assert next(line for line in table.splitlines() if line.startswith("TPOT")).split() == [
        "TPOT",
        *["-"] * 6,
    ]


def test_table_fits_80_columns() -> None:
    slow = Sample(
        ok=True,
        start=0.0,
        prompt_tokens=10**9,
        output_tokens=10**8,
        ttft=3600.0,
        e2e=86400.0,
        tpot=10.0,
        itl=[999.99999],
        gaps=[999.0],
        chunks=1,
        counted=False,
    )
    result = report.summarize([slow] * 9, 86400.0) | {"max_send_lag_ms": 123456.0}
    lines = report.serve_table(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith("E2E") and "86400000" in line for line in lines)


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    report.add_arguments(parser)
    return parser.parse_args(flags)


def test_output_file_is_appended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.jsonl"
    for number in (1, 2):
        report.emit(arguments("--output", str(path)), {"completed": number}, "the table")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["completed"] for row in rows] == [1, 2]
    assert capsys.readouterr().out == "the table\nthe table\n"


def test_json_is_all_that_stdout_gets(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit(arguments("--json"), {"completed": 3}, "the table")
    assert json.loads(capsys.readouterr().out)["completed"] == 3


def test_output_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(HeadraceError, match="cannot write"):
        report.emit(arguments("--output-file", str(tmp_path / "no" / "x")), {}, "")
