"""`headrace bench control`: server CPU time per token when the model costs nothing.

The server runs with `--runner fake`, which returns tokens at once, so what is left is the control
plane: HTTP, tokenizing, messages, scheduling, detokenizing. CPU time is read per process around
each level of concurrency; the client runs in this process and is reported, not counted.
"""

import argparse
import dataclasses
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import psutil

from headrace.bench import load, report
from headrace.bench.client import Target
from headrace.bench.datasets import random_prompts
from headrace.bench.flags import natural_int, positive_float, positive_int, positive_ints
from headrace.bench.load import LoadPlan
from headrace.bench.process import ServerProcess, cpu_seconds, role, serve_command
from headrace.bench.serve import check_answers
from headrace.core.ports import free_port

ROLES = ("main", "scheduler", "detokenizer", "other")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is sent at each level of concurrency."""

    rounds: int
    """Requests per slot of concurrency."""
    input_len: int
    output_len: int
    seed: int
    show_progress: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; what follows `--` goes to the server."""
    parser.add_argument(
        "--concurrency",
        type=positive_ints,
        default=[1, 8, 32, 64],
        metavar="N,N,...",
        help="requests in flight, one level after the other (default: 1,8,32,64)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=4, help="requests per slot (default: 4)"
    )
    parser.add_argument(
        "--random-input-len", type=positive_int, default=32, help="tokens (default: 32)"
    )
    parser.add_argument(
        "--random-output-len", type=positive_int, default=256, help="tokens (default: 256)"
    )
    parser.add_argument("--seed", type=natural_int, default=1)
    parser.add_argument(
        "--timeout", type=positive_float, default=300.0, help="seconds for the start (default: 300)"
    )
    parser.add_argument("--disable-tqdm", action="store_true", help="no progress bar")
    report.add_arguments(parser)
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARG", help="arguments of `headrace serve`"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        HeadraceError: the server did not start, or a level had no answered request.
    """
    workload = Workload(
        rounds=args.rounds,
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        seed=args.seed,
        show_progress=not args.disable_tqdm,
    )
    port = free_port()
    command = serve_command(port, ["--runner", "fake", *args.server_args])
    levels = measure(command, port, args.timeout, args.concurrency, workload)
    result = {
        "rounds": args.rounds,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "server_args": args.server_args,
        "levels": levels,
    }
    report.emit(args, result, table(levels))
    return 0


def measure(
    command: Sequence[str],
    port: int,
    timeout: float,
    concurrencies: Sequence[int],
    workload: Workload,
) -> list[dict[str, Any]]:
    """Start the server, run every level on it, end it."""
    with ServerProcess(command, port, timeout) as server:
        server.wait_port()
        server.wait_health()
        # What happens only once (lazy imports, first connections) is not a cost per token.
        measure_level(server, 1, dataclasses.replace(workload, rounds=1, show_progress=False))
        return [measure_level(server, level, workload) for level in concurrencies]


def measure_level(server: ServerProcess, concurrency: int, workload: Workload) -> dict[str, Any]:
    """CPU time per output token in microseconds, by role, at one concurrency."""
    count = concurrency * workload.rounds
    prompts = random_prompts(
        count, workload.input_len, workload.output_len, 1.0, workload.seed + concurrency, "ids"
    )
    plan = LoadPlan(
        max_concurrency=concurrency, warmup_requests=0, show_progress=workload.show_progress
    )
    target = Target(base_url=server.base_url)
    processes = server.tree()
    roles = {process.pid: role(process, server.pid) for process in processes}
    watched = [*processes, psutil.Process()]
    roles[os.getpid()] = "client"
    before = cpu_seconds(watched)
    outcome = load.run_async(load.measure(target, prompts, plan))
    after = cpu_seconds(watched)
    check_answers(outcome)
    tokens = sum(sample.output_tokens for sample in outcome.samples)
    spent: defaultdict[str, float] = defaultdict(float)
    for pid, seconds in after.items():
        spent[roles[pid]] += seconds - before[pid]
    cost = {f"{name}_us_per_token": spent[name] / tokens * 1e6 for name in (*ROLES, "client")}
    return {
        "concurrency": concurrency,
        "output_tokens": tokens,
        "output_throughput": tokens / outcome.duration,
        **cost,
        "server_us_per_token": sum(cost[f"{name}_us_per_token"] for name in ROLES),
    }


def table(levels: Sequence[dict[str, Any]]) -> str:
    """One row for each level; costs in microseconds of CPU time per output token."""
    names = ("server", *ROLES, "client")
    rows = [
        [
            str(level["concurrency"]),
            report.number(level["output_throughput"]),
            *(f"{level[f'{name}_us_per_token']:.1f}" for name in names),
        ]
        for level in levels
    ]
    lines = report.align(["requests", "tokens/s", "server", "main", *ROLES[1:], "client"], rows)
    return "\n".join(["CPU time per output token in µs; server is the sum without client", *lines])
