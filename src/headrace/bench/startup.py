"""`headrace bench startup`: from process start to the first streamed token, several times."""

import argparse
import dataclasses
import statistics
from collections.abc import Sequence

from headrace.bench import client, load, report
from headrace.bench.client import Target
from headrace.bench.datasets import Prompt
from headrace.bench.flags import positive_float, positive_int
from headrace.bench.process import ServerProcess, peak_rss, serve_command
from headrace.core.errors import HeadraceError
from headrace.core.ports import free_port


@dataclasses.dataclass(frozen=True, slots=True)
class Start:
    """One start: seconds since the process was made, and bytes."""

    port_open: float
    health: float
    first_token: float
    peak_rss: int
    leftovers: tuple[str, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; what follows `--` goes to the server."""
    parser.add_argument(
        "--runs", type=positive_int, default=5, help="starts to measure (default: 5)"
    )
    parser.add_argument(
        "--timeout", type=positive_float, default=300.0, help="seconds for a start (default: 300)"
    )
    report.add_arguments(parser)
    parser.add_argument(
        "server_args", nargs="*", metavar="-- ARG", help="arguments of `headrace serve`"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report; 1 when a server left something behind.

    Raises:
        HeadraceError: a server did not start, or did not answer.
    """
    starts = []
    for number in range(args.runs):
        report.note(f"start {number + 1} of {args.runs} ...")
        port = free_port()
        starts.append(measure_start(serve_command(port, args.server_args), port, args.timeout))
    leftovers = [left for start in starts for left in start.leftovers]
    report.emit(args, summarize(starts, args.server_args), table(starts))
    for left in leftovers:
        report.note(f"left behind after SIGTERM: {left}")
    return 1 if leftovers else 0


def measure_start(command: Sequence[str], port: int, timeout: float) -> Start:
    """Start a server on `port`, stream from it, end it."""
    with ServerProcess(command, port, timeout) as server:
        port_open = server.wait_port()
        health = server.wait_health()
        target = Target(base_url=server.base_url, timeout=60.0)
        first_token = load.run_async(first_token_at(target)) - server.started
        peak = peak_rss(server.tree())
        server.stop()
        return Start(port_open, health, first_token, peak, tuple(server.leftovers))


async def first_token_at(target: Target) -> float:
    """Time (`time.perf_counter`) of the first token of a short answer."""
    prompt = Prompt(text="Hello", input_len=1, output_len=4)
    async with client.open_session(target) as session:
        sample = await client.send(session, target, client.request_body(target, prompt))
    if not sample.ok:
        raise HeadraceError(f"the server is healthy but did not answer: {sample.error}")
    return sample.start + sample.ttft


def summarize(starts: Sequence[Start], server_args: Sequence[str]) -> dict[str, object]:
    """Medians, extremes and all runs; seconds and bytes."""
    result: dict[str, object] = {"runs": len(starts), "server_args": list(server_args)}
    for name in ("port_open", "health", "first_token", "peak_rss"):
        values = [getattr(start, name) for start in starts]
        spread = _spread(values)
        result |= {f"{label}_{name}": value for label, value in spread.items()}
        result[f"{name}_runs"] = values
    result["leftovers"] = [left for start in starts for left in start.leftovers]
    return result


def table(starts: Sequence[Start]) -> str:
    """A row for each run (the first may be cold), then minimum, median and maximum."""
    columns = [
        [start.port_open for start in starts],
        [start.health for start in starts],
        [start.first_token for start in starts],
        [start.peak_rss / 2**20 for start in starts],
    ]
    rows = [
        [f"run {index + 1}", *(f"{column[index]:.2f}" for column in columns)]
        for index in range(len(starts))
    ]
    spreads = [_spread(column) for column in columns]
    for label in ("min", "median", "max"):
        rows.append([label, *(f"{spread[label]:.2f}" for spread in spreads)])
    header = ["since start", "port open s", "health s", "first token s", "peak RSS MiB"]
    return "\n".join(report.align(header, rows))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}
