"""`headrace bench roofline MODEL`: steps of a model as a fraction of what the machine can do.

Measures the machine's read bandwidth and multiply-add rate, then whole steps of the runner (batch,
model, logits, greedy sampling): prefill of one prompt, and decode of several sequences at a given
context. A step must read every weight once and the keys and values that its tokens see, and
multiply: the lower of the two limits is the roofline. Weights are those of the checkpoint, or
made up with --load-format dummy; --shape needs no files at all. The median step counts; the best
one and the limits before and after stand beside it, since machines are often shared. What shares a
core as another hyperthread, maybe of another virtual machine, does not show in those limits: so
each step is run between two looks at how fast the cores start instructions, and only those that
had the cores for themselves count, if there are any.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headrace.bench import plot
from headrace.bench.flags import positive_float, positive_int
from headrace.bench.report import add_arguments as add_report_arguments
from headrace.bench.report import align, emit, note
from headrace.bench.shapes import SHAPES, write_config
from headrace.core.config import Config
from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.hardware import detect
from headrace.core.messages import SamplingParams, pack_ids
from headrace.core.model_info import ModelInfo, read_model_info
from headrace.core.plan import Chunk, NewRow, Pages, StepPlan
from headrace.core.resolve import resolve

if TYPE_CHECKING:
    from headrace.ops.cpu.record import Program
    from headrace.runner.model_runner import ModelRunner

_PAGE = 16
_ALONE = 0.75  # of the highest rate of starting instructions: a shared core has half of it
_PATIENCE = 4  # times --seconds to wait for steps that have the cores for themselves
# What multiplies weights of a type where the level has the instruction, else fp32.
_RATES = {"torch.bfloat16": "bf16"}


@dataclass(frozen=True)
class Work:
    """One kind of step: `rows` sequences that run `count` tokens each, `context` at the end."""

    name: str
    rows: int
    count: int
    context: int

    @property
    def tokens(self) -> int:
        return self.rows * self.count


@dataclass(frozen=True)
class Run:
    """One step: its time, the lower rate of starting instructions before and after it."""

    seconds: float
    starts: float


@dataclass(frozen=True)
class Timed:
    """All runs of a kind of step, and of its operators (calls, seconds of all runs)."""

    work: Work
    runs: list[Run]
    operators: dict[str, tuple[int, float]]

    def alone(self, full: float) -> list[float]:
        """Seconds of the runs that had the cores for themselves."""
        return [run.seconds for run in self.runs if run.starts >= _ALONE * full]

    def counted(self, full: float) -> list[float]:
        """The same, but of all runs if these are fewer than three."""
        alone = self.alone(full)
        return alone if len(alone) >= 3 else [run.seconds for run in self.runs]

    def enough(self, spent: float, seconds: float, full: float) -> bool:
        """Whether `spent` seconds of runs will do."""
        if len(self.runs) < 3 or spent < seconds:
            return False
        return len(self.alone(full)) >= 3 or spent > _PATIENCE * seconds


@dataclass(frozen=True)
class Cost:
    """What a model makes a step read and multiply."""

    linear: int  # weights that multiply every token
    head: int  # weights that multiply sampled tokens
    kv_bytes: int  # per token of context
    heads_dim: int  # attention heads x head_dim, all layers
    weight_bytes: int  # of all that multiplies

    def bytes_read(self, work: Work) -> int:
        return self.weight_bytes + work.rows * work.context * self.kv_bytes

    def operations(self, work: Work) -> int:
        products = self.linear * work.tokens + self.head * work.rows
        seen = work.count * work.context - work.count * (work.count - 1) // 2
        return 2 * products + 4 * work.rows * seen * self.heads_dim


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="", help="folder of the model, or --shape")
    parser.add_argument("--shape", choices=tuple(SHAPES), help="a known shape, weights made up")
    parser.add_argument("--load-format", default="auto", help="dummy makes weights up")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="none", help="of the weights: int8, int4, fp8")
    parser.add_argument("--kv-cache-dtype", default="auto", help="bf16, fp8_e4m3, int8")
    parser.add_argument("--batches", type=positive_int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--prompts", type=positive_int, nargs="+", default=[512, 2048])
    parser.add_argument("--context", type=positive_int, default=256, help="tokens when decoding")
    parser.add_argument("--threads", type=int, default=0, help="0 takes the usable cores")
    parser.add_argument("--seconds", type=positive_float, default=2.0, help="for each kind of step")
    parser.add_argument("--operators", action="store_true", help="time each kind of operator, too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw a PNG picture")
    add_report_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from headrace.ops.cpu.library import LIBRARY

    if bool(args.model) == bool(args.shape):
        raise BadRequest("name either a model's folder or --shape", field="model")
    if args.plot:
        plot.require()  # before minutes of measuring
    if LIBRARY is None:
        raise HeadraceError("the native kernels are not built: install a C++ compiler, reinstall")
    if args.shape:
        with tempfile.TemporaryDirectory() as folder:
            write_config(args.shape, Path(folder))
            args.model, args.load_format = folder, "dummy"
            result = measure(args) | {"model": args.shape}
    else:
        result = measure(args)
    emit(args, result, table(result))
    if args.plot:
        plot.draw(result, args.plot)
    return 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Limits, every kind of step, and the limits again."""
    from headrace.bench.kernels import measure_limits
    from headrace.loader.files import resolve_model_path

    info = read_model_info(resolve_model_path(args.model))
    work = [Work(f"prefill {n}", 1, n, n) for n in args.prompts if n < info.context_length]
    context = min(args.context, info.context_length - 1)
    work += [Work(f"decode batch {n}", n, 1, context) for n in args.batches]
    runner, cost = load(args, info, work)
    note("the machine may be busy with other work: compare the limits before and after")
    threads = args.threads or detect().cores
    budget = min(0.5, args.seconds)
    before = measure_limits(budget, threads)
    measured = list(timed(runner, work, args))
    after = measure_limits(budget, threads)
    limits = highest(before, after, _RATES.get(str(runner.dtype), ""))
    full = max(run.starts for item in measured for run in item.runs)
    steps = [fraction(item, cost, limits, full) for item in measured]
    return {
        "model": args.model,
        **before,
        "limits_after": after,
        "steps": steps,
        "load_average": os.getloadavg()[0],
    }


def highest(before: dict[str, Any], after: dict[str, Any], kind: str) -> tuple[float, float]:
    """Bytes and operations per second; operations of `kind`, or fp32 without an instruction."""
    rates = [limits["operations_per_s"] for limits in (before, after)]
    return (
        max(before["read_bytes_per_s"], after["read_bytes_per_s"]),
        max(rate.get(kind, rate["fp32"]) for rate in rates),
    )


def load(args: argparse.Namespace, info: ModelInfo, work: list[Work]) -> tuple["ModelRunner", Cost]:
    """A runner with room for all of `work`, its cache written."""
    from headrace.runner.worker import build_runner

    rows = max(item.rows for item in work)
    asked = {
        "model_path": args.model,
        "load_format": args.load_format,
        "dtype": args.dtype,
        "quantization": args.quantization,
        "kv_cache_dtype": args.kv_cache_dtype,
        "skip_tokenizer_init": True,
        "page_size": _PAGE,
        "max_running_requests": rows,
        "max_total_tokens": max(item.rows * (item.context + _PAGE) for item in work),
        "chunked_prefill_size": max(item.tokens for item in work),
        "threads": args.threads,
    }
    hardware = detect()
    config, _ = resolve(Config.from_flat(asked), info, hardware)
    runner, plan = build_runner(config, info, hardware)
    for cache in runner.pool.caches:
        cache.keys.fill_(0.01)
        cache.values.fill_(0.01)
    matrices = {
        name: math.prod(shape)
        for name, shape in runner.model.checkpoint_shapes().items()
        if len(shape) > 1
    }
    head = info.vocab_size * info.hidden_size
    outside = [size for name, size in matrices.items() if "embed" in name or "lm_head" in name]
    unread = sum(outside) - head
    specs = runner.model.state_specs()
    cost = Cost(
        linear=sum(matrices.values()) - sum(outside),
        head=head,
        kv_bytes=plan.bytes_per_token,
        heads_dim=len(specs) * info.num_heads * info.head_dim,
        # As packed; an embedding that is not the head, too, is looked up, not read.
        weight_bytes=plan.weights * (sum(matrices.values()) - unread) // sum(matrices.values()),
    )
    return runner, cost


def timed(runner: "ModelRunner", work: list[Work], args: argparse.Namespace) -> Iterator[Timed]:
    """Each kind of step, at least three runs of it."""
    full = 0.0
    for item in work:
        runner.execute(setup(item))
        plan = StepPlan(
            step=1,
            chunks=[Chunk(row, item.context - item.count, item.count) for row in range(item.rows)],
        )
        result = Timed(item, [], {})
        programs = _programs(runner) if args.operators else []
        for program in programs:
            program.start_timing()
        began = time.perf_counter()
        while not result.enough(time.perf_counter() - began, args.seconds, full):
            result.runs.append(_run(runner, item, plan))
            full = max(full, result.runs[-1].starts)
        for name, spent in [took for program in programs for took in program.take_times()]:
            calls, before = result.operators.get(name, (0, 0.0))
            result.operators[name] = (calls + 1, before + spent)
        yield result
        runner.execute(StepPlan(step=2, chunks=[], freed_rows=list(range(item.rows))))


def _run(runner: "ModelRunner", work: Work, plan: StepPlan) -> Run:
    from headrace.ops.cpu.probe import start_rate

    before = start_rate()
    result = runner.execute(plan)
    if result.chunks[0].error:
        raise HeadraceError(f"{work.name}: {result.chunks[0].error}")
    return Run(result.seconds, min(before, start_rate()))


def _programs(runner: "ModelRunner") -> list["Program"]:
    """What the runner replays; nothing if it runs the model call by call."""
    from headrace.runner.graph import RecordedGraph

    graph = runner.graph
    return [graph.body, graph.head] if isinstance(graph, RecordedGraph) else []


def setup(work: Work) -> StepPlan:
    """A plan that only announces the rows and their pages."""
    pages = -(-(work.context + 1) // _PAGE)
    tokens = pack_ids([1] * work.context)
    return StepPlan(
        step=0,
        chunks=[],
        new_rows=[
            NewRow(row, tokens, work.context, SamplingParams(temperature=0.0), seed=0)
            for row in range(work.rows)
        ],
        pages=[
            Pages(row, 0, list(range(row * pages, (row + 1) * pages))) for row in range(work.rows)
        ],
    )


def fraction(timed: Timed, cost: Cost, limits: tuple[float, float], full: float) -> dict[str, Any]:
    """The measured step beside its limit; `limits` are bytes read and operations per second."""
    work, runs = timed.work, timed.counted(full)
    reading = cost.bytes_read(work) / limits[0]
    multiplying = cost.operations(work) / limits[1]
    limit = max(reading, multiplying)
    best, median = min(runs), statistics.median(runs)
    operators = {
        name: {"calls": calls, "milliseconds": spent / len(timed.runs) * 1e3}
        for name, (calls, spent) in timed.operators.items()
    }
    return {
        "name": work.name,
        "runs": len(timed.runs),
        "runs_alone": len(timed.alone(full)),
        "milliseconds": median * 1e3,
        "best_milliseconds": best * 1e3,
        "tokens_per_s": work.tokens / median,
        "best_tokens_per_s": work.tokens / best,
        "limit_tokens_per_s": work.tokens / limit,
        "bound": "read" if reading > multiplying else "multiply",
        "fraction_of_limit": limit / median,
        "best_fraction_of_limit": limit / best,
        **({"operators": operators} if operators else {}),
    }


def table(result: dict[str, Any]) -> str:
    """Limits and steps for people."""
    rows = [
        [
            step["name"],
            f"{step['milliseconds']:.2f}",
            f"{step['best_milliseconds']:.2f}",
            f"{step['tokens_per_s']:.0f}",
            f"{step['limit_tokens_per_s']:.0f}",
            step["bound"],
            f"{step['fraction_of_limit']:.0%}",
            f"{step['best_fraction_of_limit']:.0%}",
            f"{step['runs_alone']}/{step['runs']}",
        ]
        for step in result["steps"]
    ]
    header = ["step", "ms", "best ms", "token/s", "limit", "bound", "of limit", "best", "alone"]
    return "\n".join(
        [
            f"{result['model']}, {result['level']}, {result['threads']} threads",
            f"before: {_limits(result)}",
            f"after:  {_limits(result['limits_after'])}; load {result['load_average']:.1f}",
            "",
            *align(header, rows),
            "",
            "medians, beside them the best run; the limit is that of the higher rates",
            "alone: runs that shared no core; they count alone where there are three",
            *_operator_lines(result["steps"]),
        ]
    )


def _operator_lines(steps: list[dict[str, Any]]) -> list[str]:
    rows = [
        [step["name"], name, str(spent["calls"]), f"{spent['milliseconds']:.2f}"]
        for step in steps
        for name, spent in step.get("operators", {}).items()
    ]
    return ["", *align(["step", "operator", "calls", "ms"], rows)] if rows else []


def _limits(measured: dict[str, Any]) -> str:
    rates = ", ".join(f"{v / 1e9:.0f} G/s {k}" for k, v in measured["operations_per_s"].items())
    return f"read {measured['read_bytes_per_s'] / 1e9:.1f} GB/s, multiply-add {rates}"
