"""`headrace bench offline`: a dataset through an Engine in this process, without HTTP.

Two passes over the same prompts: one that ends after the first token (prefill), one in full. What
the second takes longer is decode. The cache is emptied between them, so both compute every prompt.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any, Protocol

from headrace.bench import datasets, report
from headrace.bench.datasets import Prompt
from headrace.bench.flags import json_object
from headrace.core.errors import BadRequest, HeadraceError


class Generator(Protocol):
    """The part of `headrace.Engine` that is measured."""

    def generate(
        self,
        prompt: list[str] | None = None,
        *,
        input_ids: list[list[int]] | None = None,
        sampling_params: list[dict[str, Any]],
    ) -> list[dict[str, Any]]: ...

    def flush_cache(self) -> Any: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags; datasets are given as token ids."""
    parser.add_argument(
        "--model-path", "--model", default="", help="folder or hub id (default: the demo model)"
    )
    parser.add_argument(
        "--engine-args",
        type=json_object,
        default={},
        metavar="JSON",
        help='other arguments of Engine, as {"page_size": 16}',
    )
    parser.add_argument(
        "--disable-ignore-eos", action="store_true", help="let the model end its answers"
    )
    datasets.add_arguments(parser)
    report.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and report.

    Raises:
        HeadraceError: bad dataset, or the model cannot be loaded.
    """
    from headrace import Engine

    prompts = datasets.load(args, "ids")
    report.note("loading the engine ...")
    began = time.perf_counter()
    with Engine(model_path=args.model_path, **args.engine_args) as engine:
        load_time = time.perf_counter() - began
        result = measure(engine, prompts, not args.disable_ignore_eos)
    result |= {
        "model": args.model_path,
        "dataset_name": args.dataset_name,
        "seed": args.seed,
        "engine_args": args.engine_args,
        "load_time": load_time,
    }
    report.emit(args, result, table(result))
    return 0


def measure(engine: Generator, prompts: Sequence[Prompt], ignore_eos: bool) -> dict[str, Any]:
    """Both passes; times in seconds, throughputs in tokens per second."""
    _generate(engine, prompts[:1], ignore_eos, output_len=4)
    engine.flush_cache()
    report.note(f"prefill: {len(prompts)} prompts ...")
    prefill_time, _ = _generate(engine, prompts, ignore_eos, output_len=1)
    engine.flush_cache()
    report.note(f"prefill and decode: {len(prompts)} prompts ...")
    duration, answers = _generate(engine, prompts, ignore_eos)
    usage = [answer["meta_info"] for answer in answers]
    inputs = sum(meta["prompt_tokens"] for meta in usage)
    outputs = sum(meta["completion_tokens"] for meta in usage)
    cached = sum(meta["cached_tokens"] for meta in usage)
    decoded = outputs - len(answers)
    decode_time = duration - prefill_time
    result: dict[str, Any] = {
        "completed": len(answers),
        "duration": duration,
        "prefill_time": prefill_time,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "total_cached_tokens": cached,
        "cached_token_share": cached / inputs,
        "request_throughput": len(answers) / duration,
        "input_throughput": inputs / duration,
        "output_throughput": outputs / duration,
        "total_throughput": (inputs + outputs) / duration,
        "prefill_throughput": inputs / prefill_time,
        "decode_throughput": decoded / decode_time if decoded and decode_time > 0 else None,
    }
    latencies = report.statistics(meta["e2e_latency"] for meta in usage)
    for statistic, value in latencies.items():
        result[f"{statistic}_e2e_latency_ms"] = None if value is None else value * 1000
    return result


def _generate(
    engine: Generator, prompts: Sequence[Prompt], ignore_eos: bool, output_len: int | None = None
) -> tuple[float, list[dict[str, Any]]]:
    """(seconds, answers) of all prompts as one batch."""
    sampling = [
        {
            "temperature": 0.0,
            "max_new_tokens": output_len or prompt.output_len,
            "ignore_eos": ignore_eos,
        }
        for prompt in prompts
    ]
    ids = [prompt.token_ids for prompt in prompts if prompt.token_ids]
    texts = [prompt.text for prompt in prompts if prompt.text]
    if ids and texts:
        raise BadRequest("the dataset mixes text and token ids", field="dataset_path")
    began = time.perf_counter()
    if ids:
        answers = engine.generate(input_ids=ids, sampling_params=sampling)
    else:
        answers = engine.generate(texts, sampling_params=sampling)
    duration = time.perf_counter() - began
    for answer in answers:
        reason = answer["meta_info"].get("finish_reason") or {}
        if reason.get("type") == "abort":
            raise HeadraceError(f"the engine aborted a prompt: {reason.get('message')}")
    return duration, answers


def table(result: dict[str, Any]) -> str:
    """The table of `headrace bench offline`, within 80 columns."""
    rows = [
        ["prefill", result["total_input_tokens"], result["prefill_time"], "prefill_throughput"],
        [
            "decode",
            result["total_output_tokens"] - result["completed"],
            result["duration"] - result["prefill_time"],
            "decode_throughput",
        ],
        [
            "together",
            result["total_input_tokens"] + result["total_output_tokens"],
            result["duration"],
            "total_throughput",
        ],
    ]
    lines = report.align(
        ["", "tokens", "seconds", "tokens/s"],
        [
            [name, str(tokens), report.number(seconds), report.number(result[rate])]
            for name, tokens, seconds, rate in rows
        ],
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{result['completed']} requests, {report.number(result['request_throughput'])} per "
            f"second; output {report.number(result['output_throughput'])} tokens/s; "
            f"{report.percent(result['cached_token_share'])} cached",
            "decode is the time of the full pass less that of a pass of one token each",
        ]
    )
