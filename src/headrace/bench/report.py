"""Numbers of a run: as a dict (JSON) and as a table for people.

Keys are those of sglang.bench_serving's JSONL where one exists. Failed requests count only in
`failed`; a statistic without data is None, never 0. Knows nothing of how the load was made.
"""

import argparse
import datetime
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from headrace.bench.stream import Sample
from headrace.core.errors import HeadraceError

STATISTICS = ("mean", "median", "std", "p90", "p95", "p99", "max")
_SHOWN = ("mean", "median", "p90", "p95", "p99", "max")
_LATENCIES = {
    "TTFT": "ttft",
    "TPOT": "tpot",
    "ITL": "itl",
    "chunk gap": "chunk_gap",
    "E2E": "e2e_latency",
}
"""Row of the table -> name in the keys."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `emit`."""
    group = parser.add_argument_group("report")
    group.add_argument(
        "--output-file", "--output", type=Path, metavar="FILE", help="append one JSON line"
    )
    group.add_argument("--json", action="store_true", help="print JSON only, no table")


def summarize(samples: Sequence[Sample], duration: float) -> dict[str, Any]:
    """All numbers of a run of `duration` seconds; latencies in ms, throughputs per second."""
    good = [sample for sample in samples if sample.ok]
    inputs = sum(sample.prompt_tokens for sample in good)
    outputs = sum(sample.output_tokens for sample in good)
    cached = sum(sample.cached_tokens for sample in good)
    chunks = sum(sample.chunks for sample in good)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(samples) - len(good),
        "uncounted": sum(not sample.counted for sample in good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": cached,
        "cached_token_share": cached / inputs if inputs else None,
        "request_throughput": len(good) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        "tokens_per_chunk": outputs / chunks if chunks else None,
        "concurrency": sum(sample.e2e for sample in good) / duration,
    }
    series: dict[str, Iterable[float]] = {
        "ttft": (sample.ttft for sample in good),
        "tpot": (sample.tpot for sample in good if sample.tpot is not None),
        "itl": (gap for sample in good for gap in sample.itl),
        "chunk_gap": (gap for sample in good for gap in sample.gaps),
        "e2e_latency": (sample.e2e for sample in good),
    }
    for name, seconds in series.items():
        for statistic, value in statistics(seconds).items():
            result[f"{statistic}_{name}_ms"] = None if value is None else value * 1000
    return result


def statistics(values: Iterable[float]) -> dict[str, float | None]:
    """`STATISTICS` of the values; percentiles interpolate linearly."""
    data = np.fromiter(values, dtype=np.float64)
    if not data.size:
        return dict.fromkeys(STATISTICS)
    median, p90, p95, p99 = np.percentile(data, (50, 90, 95, 99)).tolist()
    mean, std, most = float(data.mean()), float(data.std()), float(data.max())
    return dict(zip(STATISTICS, (mean, median, std, p90, p95, p99, most), strict=True))


def details(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """Per-request lists, under the keys of sglang.bench_serving's --output-details."""
    return {
        "input_lens": [sample.prompt_tokens for sample in samples],
        "output_lens": [sample.output_tokens for sample in samples],
        "ttfts": [sample.ttft for sample in samples],
        "itls": [sample.itl for sample in samples],
        "generated_texts": [sample.text for sample in samples],
        "errors": [sample.error for sample in samples],
    }


def serve_table(result: Mapping[str, Any]) -> str:
    """The table of `headrace bench serve`, within 80 columns."""
    return "\n".join([*_summary_lines(result), "", *_latency_lines(result)])


def _summary_lines(result: Mapping[str, Any]) -> list[str]:
    facts = [
        (
            "requests",
            f"{result['completed']} ok, {result['failed']} failed in {result['duration']:.2f} s",
            result["request_throughput"],
        ),
        (
            "input tokens",
            f"{result['total_input_tokens']}, {percent(result['cached_token_share'])} cached",
            result["input_throughput"],
        ),
        (
            "output tokens",
            f"{result['total_output_tokens']}, {number(result['tokens_per_chunk'])} per chunk",
            result["output_throughput"],
        ),
        ("all tokens", "", result["total_throughput"]),
    ]
    lines = [f"{name:<15}{what:<44}{number(rate):>12} /s" for name, what, rate in facts]
    lines.append(f"{'concurrency':<15}{number(result['concurrency'])} requests on average")
    if result.get("max_send_lag_ms") is not None:
        lag = number(result["max_send_lag_ms"])
        lines.append(f"{'send lag':<15}at most {lag} ms behind the request rate")
    if result["uncounted"]:
        lines.append(
            f"{'note':<15}{result['uncounted']} answers had no usage: chunks counted as tokens"
        )
    return lines


def _latency_lines(result: Mapping[str, Any]) -> list[str]:
    rows = [
        [label, *(number(result[f"{statistic}_{name}_ms"]) for statistic in _SHOWN)]
        for label, name in _LATENCIES.items()
    ]
    return align(["ms", *_SHOWN], rows)


def align(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: first column left, the others right, each as wide as it needs."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    widths = [widths[0], *(max(width, 7) for width in widths[1:])]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in table
    ]


def number(value: float | None) -> str:
    """Two decimals below 1000, none above; a dash for no data."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else f"{value:.0f}"


def percent(share: float | None) -> str:
    """A share as a percentage; a dash for no data."""
    return "-" if share is None else f"{share:.1%}"


def emit(args: argparse.Namespace, result: Mapping[str, Any], table: str) -> None:
    """Print the table (or with --json the result), and append the result to --output-file.

    Raises:
        HeadraceError: the file cannot be written.
    """
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    line = msgspec.json.encode({"date": date, **result})
    sys.stdout.write(line.decode() + "\n" if args.json else table + "\n")
    sys.stdout.flush()
    if args.output_file is None:
        return
    try:
        with args.output_file.open("ab") as file:
            file.write(line + b"\n")
    except OSError as error:
        raise HeadraceError(f"cannot write {args.output_file}: {error.strerror}") from None


def note(text: str) -> None:
    """A line for people that is not part of the result."""
    print(text, file=sys.stderr, flush=True)
