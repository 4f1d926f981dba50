"""Benchmarks of a server, the engine, a start and the control plane.

`BENCHMARKS` is the table behind `headrace bench NAME`. Each module has `add_arguments(parser)` and
`run(args) -> exit code`; errors meant for people leave `run` as `HeadraceError`. The modules load
only when chosen. Nothing in the rest of headrace imports this package except the command line.
"""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """Where a benchmark lives and what it is for, in one line."""

    module: str
    help: str


BENCHMARKS = {
    "serve": Benchmark(
        "headrace.bench.serve", "Load a running server; report latency and throughput."
    ),
    "offline": Benchmark(
        "headrace.bench.offline", "Run a dataset through an in-process Engine; report tokens/s."
    ),
    "startup": Benchmark(
        "headrace.bench.startup", "Start servers; report time to port, health and first token."
    ),
    "load": Benchmark(
        "headrace.bench.loaders", "Load a model in every way; report GB/s and peak memory."
    ),
    "control": Benchmark(
        "headrace.bench.control", "Serve made-up tokens; report server CPU time per token."
    ),
    "serving": Benchmark(
        "headrace.bench.serving", "Serve a load and run it offline; report the share that is left."
    ),
    "abuse": Benchmark(
        "headrace.bench.abuse", "Vanish, send garbage, flood, soak; check that nobody else suffers."
    ),
    "kernels": Benchmark(
        "headrace.bench.kernels", "Measure this machine's limits and each kernel against them."
    ),
    "grammar": Benchmark(
        "headrace.bench.grammar", "Compile grammars and compute masks on a large vocabulary."
    ),
    "roofline": Benchmark(
        "headrace.bench.roofline", "Measure a model's steps against this machine's limits."
    ),
    "compare": Benchmark(
        "headrace.bench.compare", "Start several servers; measure them in turn, with one client."
    ),
    "chaos": Benchmark(
        "headrace.bench.chaos", "Kill processes of an engine while it streams; compare the answers."
    ),
    "write-model": Benchmark(
        "headrace.bench.write_model", "Write a model folder of a known shape, weights made up."
    ),
}
