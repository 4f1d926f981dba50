"""`headrace bench kernels`: linear operators and attention beside what the machine can do.

First the limits are measured: read bandwidth and multiply-add rates. Then each product of the
shapes of real models, timed as the best of many short runs (a shared machine still shows its limit
now and then), against the lower of two limits: reading the weights, and multiplying. Weights are
copied until they exceed the caches. Attention likewise: decode against reading keys and values,
prefill against multiplying. Does not know models or servers.
"""

import argparse
import os
from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any

from headrace.bench.report import add_arguments as add_report_arguments
from headrace.bench.report import align, emit, note
from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.hardware import detect

if TYPE_CHECKING:
    from headrace.ops.cpu.probe import Product

# name -> [(out, in)] of a layer's four products and the head's first rows
SHAPES = {
    "qwen3-0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072), (16384, 1024)),
    "llama-3.2-1b": ((3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)),
}

# name -> query heads, KV heads, elements of a head
HEADS = {"qwen3-0.6b": (16, 8, 128), "llama-3.2-1b": (32, 8, 64)}
KV_FORMATS = ("bf16", "fp8_e4m3", "int8")
# sequences, queries of each, context
LOADS = (
    *((rows, 1, 256) for rows in (1, 16, 32)),
    *((rows, 1, 2048) for rows in (1, 16)),
    (1, 1, 8192),
    (1, 512, 512),
    *((1, count, 2048) for count in (512, 2048)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="one model's shapes; default: all")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 16, 32, 512], help="rows of x (tokens)"
    )
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["bfloat16", "float32", "int8", "int4", "fp8"],
        help="of weights; int4-32 has 32 inputs per scale (16, 32, 64, 128)",
    )
    parser.add_argument(
        "--kv-formats",
        nargs="*",
        choices=KV_FORMATS,
        default=list(KV_FORMATS),
        help="none: no rows",
    )
    parser.add_argument("--threads", type=int, default=0, help="0 takes the usable cores")
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each measurement")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from headrace import ops
    from headrace.ops.cpu.library import LIBRARY

    if LIBRARY is None:
        raise HeadraceError(
            "the native kernels are not built: install a C++ compiler and reinstall"
        )
    _check(args)
    threads = args.threads or detect().cores
    ops.set_threads(threads)
    note("times are the best of many short runs; the machine may be busy with other work")
    result = measure_limits(args.seconds, threads)
    result["operators"] = list(measure_linear(args, result))
    result["attention"] = list(measure_attention(args, result))
    result["load_average"] = os.getloadavg()[0]
    emit(args, result, table(result))
    return 0


def _check(args: argparse.Namespace) -> None:
    from headrace.ops.packed import FORMATS, INT4_GROUPS, TABLES

    floats = [format for format in FORMATS if format not in ("mxfp4", *TABLES)]
    known = (*floats, *(f"int4-{group}" for group in INT4_GROUPS))
    unknown = set(args.formats) - set(known)
    if unknown:
        raise BadRequest(f"--formats knows {', '.join(known)}, not {min(unknown)}", field="formats")
    if min(args.rows) < 1:
        raise BadRequest(f"--rows must be at least 1, not {min(args.rows)}", field="rows")


def measure_limits(seconds: float, threads: int) -> dict[str, Any]:
    """Bytes and operations per second of this machine."""
    from headrace.ops.cpu import library, probe

    return {
        "level": library.level(),
        "threads": threads,
        "read_bytes_per_s": probe.read_bandwidth(seconds),
        "operations_per_s": probe.peak_rates(seconds),
    }


def measure_linear(args: argparse.Namespace, limits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dict per shape, format and number of rows."""
    from headrace.ops.cpu.probe import time_linear

    read, peaks = limits["read_bytes_per_s"], limits["operations_per_s"]
    shapes = [(model, *shape) for model in SHAPES for shape in SHAPES[model]]
    for (model, out_size, in_size), name, rows in product(shapes, args.formats, args.rows):
        if args.shapes not in (None, model):
            continue
        took = time_linear(out_size, in_size, name, rows, args.seconds)
        # Weights that are widened are multiplied at the rate of what they are widened to.
        peak = peaks.get(name.partition("-")[0], peaks["fp32"])
        yield {
            "model": model,
            "out": out_size,
            "in": in_size,
            "format": name,
            "rows": rows,
            **rates(took, read, peak),
        }


def measure_attention(args: argparse.Namespace, limits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One dict per model's heads, kind of work and format of keys and values."""
    from headrace.ops.cpu.probe import Load, time_attention

    read, peak = limits["read_bytes_per_s"], limits["operations_per_s"]["fp32"]
    for model, load, name in product(HEADS, LOADS, args.kv_formats):
        if args.shapes not in (None, model):
            continue
        took = time_attention(HEADS[model], Load(*load), name, args.seconds)
        yield {
            "model": model,
            "format": name,
            "sequences": load[0],
            "queries": load[1],
            "context": load[2],
            **rates(took, read, peak),
        }


def rates(took: "Product", read: float, peak: float) -> dict[str, Any]:
    """What was reached beside the lower of two limits."""
    reading, multiplying = took.bytes_read / read, took.operations / peak
    return {
        "microseconds": took.seconds * 1e6,
        "bytes_per_s": took.bytes_read / took.seconds,
        "operations_per_s": took.operations / took.seconds,
        "bound": "read" if reading > multiplying else "multiply",
        "fraction_of_limit": max(reading, multiplying) / took.seconds,
    }


def table(result: dict[str, Any]) -> str:
    """Limits and operators for people."""
    peaks = ", ".join(f"{v / 1e9:.0f} G/s {k}" for k, v in result["operations_per_s"].items())
    linear = [
        [
            f"{item['model']} [{item['out']}, {item['in']}] {item['format']}",
            str(item["rows"]),
            *_cells(item),
        ]
        for item in result["operators"]
    ]
    attention = [
        [
            f"{item['model']} {item['queries']} of {item['context']} {item['format']}",
            str(item["sequences"]),
            *_cells(item),
        ]
        for item in result["attention"]
    ]
    header = ["us", "GB/s", "GFLOP/s", "bound", "of limit"]
    return "\n".join(
        [
            f"{result['level']}, {result['threads']} threads: read "
            f"{result['read_bytes_per_s'] / 1e9:.1f} GB/s; multiply-add {peaks}",
            f"load average {result['load_average']:.1f}",
            "",
            *align(["linear", "rows", *header], linear),
            "",
            *align(["attention", "sequences", *header], attention),
        ]
    )


def _cells(item: dict[str, Any]) -> list[str]:
    return [
        f"{item['microseconds']:.0f}",
        f"{item['bytes_per_s'] / 1e9:.1f}",
        f"{item['operations_per_s'] / 1e9:.0f}",
        item["bound"],
        f"{item['fraction_of_limit']:.0%}",
    ]
