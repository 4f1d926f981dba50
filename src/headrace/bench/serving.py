"""`headrace bench serving`: what HTTP, streaming and separate processes cost beside the model.

The same lengths go through an Engine, as one call, and through a server, as streams that a client
in this process reads. Both come in turn, started anew for each pass, with prompts that no pass has
seen. The number is the server's output tokens per second as a share of the Engine's.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from headrace.bench import load, offline, report
from headrace.bench.client import Target
from headrace.bench.datasets import Prompt, random_prompts
from headrace.bench.flags import json_object, natural_int, positive_float, positive_int
from headrace.bench.load import LoadPlan
from headrace.bench.process import ServerProcess, serve_command
from headrace.bench.serve import check_answers
from headrace.core.errors import BadRequest
from headrace.core.ports import free_port


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """One round: output tokens per second, prefill included."""

    offline: float
    served: float

    @property
    def share(self) -> float:
        return self.served / self.offline


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; --engine-args holds what both sides take besides the model."""
    parser.add_argument(
        "--model-path", "--model", default="", help="folder or hub id (default: the demo model)"
    )
    parser.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='other options of both, as {"page_size": 16}',
    )
    parser.add_argument("--rounds", type=positive_int, default=3, help="pairs (default: 3)")
    parser.add_argument("--requests", type=positive_int, default=32, help="per pass (default: 32)")
    parser.add_argument(
        "--concurrency", type=positive_int, default=16, help="requests at once (default: 16)"
    )
    parser.add_argument("--random-input-len", type=positive_int, default=256, metavar="TOKENS")
    parser.add_argument("--random-output-len", type=positive_int, default=128, metavar="TOKENS")
    parser.add_argument("--seed", type=natural_int, default=1)
    parser.add_argument(
        "--timeout", type=positive_float, default=300.0, help="seconds for a start (default: 300)"
    )
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        HeadraceError: the model cannot be loaded, or a request failed.
    """
    options = {**args.engine_args, "model_path": args.model_path}
    options.setdefault("max_running_requests", args.concurrency)
    command = flags_of(options)
    pairs = []
    for number in range(args.rounds):
        report.note(f"round {number + 1} of {args.rounds} ...")
        unseen = [_prompts(args, args.seed + 2 * number + side) for side in (0, 1)]
        rates = {}
        # Which side goes first changes, so that a slow minute of the machine hits both.
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            if side == 0:
                rates[side] = _offline(options, unseen[side])
            else:
                rates[side] = _served(command, unseen[side], args.concurrency, args.timeout)
        pairs.append(Pair(rates[0], rates[1]))
    report.emit(args, summary(args, pairs), table(pairs))
    return 0


def flags_of(options: dict[str, Any]) -> list[str]:
    """Options of an Engine as arguments of `headrace serve`.

    Raises:
        BadRequest: a value is neither a number, a string nor a truth value.
    """
    flags: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, int | float | str):
            flags += [f"--{flag}", str(value)] if value != "" else []
        else:
            raise BadRequest(f"--engine-args: {name} must be a plain value", field="engine_args")
    return flags


def _prompts(args: argparse.Namespace, seed: int) -> list[Prompt]:
    return random_prompts(
        args.requests, args.random_input_len, args.random_output_len, 1.0, seed, "ids"
    )


def _offline(options: dict[str, Any], prompts: Sequence[Prompt]) -> float:
    from headrace import Engine

    with Engine(**options) as engine:
        warm = random_prompts(2, 64, 16, 1.0, 1 << 40, "ids")
        _generate(engine, warm)
        began = time.perf_counter()
        _generate(engine, prompts)
        return _tokens(prompts) / (time.perf_counter() - began)


def _generate(engine: offline.Generator, prompts: Sequence[Prompt]) -> None:
    engine.generate(
        input_ids=[prompt.token_ids or [] for prompt in prompts],
        sampling_params=[
            {"temperature": 0.0, "max_new_tokens": prompt.output_len, "ignore_eos": True}
            for prompt in prompts
        ],
    )


def _served(
    command: Sequence[str], prompts: Sequence[Prompt], concurrency: int, timeout: float
) -> float:
    port = free_port()
    with ServerProcess(serve_command(port, command), port, timeout) as server:
        server.wait_port()
        server.wait_health()
        target = Target(base_url=server.base_url)
        plan = LoadPlan(max_concurrency=concurrency, warmup_requests=2, show_progress=False)
        outcome = load.run_async(load.measure(target, prompts, plan))
    check_answers(outcome)
    return _tokens(prompts) / outcome.duration


def _tokens(prompts: Sequence[Prompt]) -> int:
    return sum(prompt.output_len for prompt in prompts)


def summary(args: argparse.Namespace, pairs: Sequence[Pair]) -> dict[str, Any]:
    """Medians and every pair."""
    return {
        "model": args.model_path,
        "engine_args": args.engine_args,
        "requests": args.requests,
        "concurrency": args.concurrency,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "median_share": statistics.median(pair.share for pair in pairs),
        "pairs": [dataclasses.asdict(pair) | {"share": pair.share} for pair in pairs],
    }


def table(pairs: Sequence[Pair]) -> str:
    """A row for each round and the medians, within 80 columns."""
    rows = [
        [str(i + 1), report.number(p.offline), report.number(p.served), report.percent(p.share)]
        for i, p in enumerate(pairs)
    ]
    medians = [
        report.number(statistics.median(p.offline for p in pairs)),
        report.number(statistics.median(p.served for p in pairs)),
        report.percent(statistics.median(p.share for p in pairs)),
    ]
    header = ["round", "offline tok/s", "served tok/s", "share"]
    return "\n".join(report.align(header, [*rows, ["median", *medians]]))
