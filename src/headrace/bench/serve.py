"""`headrace bench serve`: latency and throughput of a running server, as its clients see them."""

import argparse
import dataclasses
import math
from typing import Any

from headrace.bench import client, datasets, load, report
from headrace.bench.client import BACKENDS, Target
from headrace.bench.datasets import Prompt
from headrace.bench.load import LoadPlan, LoadResult
from headrace.core.errors import HeadraceError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags, spelled like those of sglang.bench_serving where it has them."""
    group = parser.add_argument_group("server")
    group.add_argument(
        "--backend",
        choices=list(BACKENDS),
        default="native",
        help="native is /generate of headrace and SGLang; completions and chat are OpenAI's",
    )
    group.add_argument("--base-url", help="as http://127.0.0.1:30000; instead of host and port")
    group.add_argument("--host", default="127.0.0.1")
    group.add_argument("--port", type=int, default=30000)
    group.add_argument("--model", help="name in requests (default: the first the server lists)")
    group.add_argument(
        "--text-prompts", action="store_true", help="random prompts as words, not token ids"
    )
    datasets.add_arguments(parser)
    load.add_arguments(parser)
    report.add_arguments(parser)
    parser.add_argument(
        "--output-details", action="store_true", help="add per-request lists to the JSON"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and report; 0 when at least one request was answered.

    Raises:
        HeadraceError: bad dataset, no server, or every request failed.
    """
    target = target_from(args)
    prompts = datasets.load(args, target.prompt_form(args.text_prompts))
    plan = load.plan_from(args)
    target, outcome = load.run_async(_measure(target, args.model, prompts, plan))
    check_answers(outcome)
    result = describe(args, target) | report.summarize(outcome.samples, outcome.duration)
    if not math.isinf(plan.request_rate):
        result["max_send_lag_ms"] = outcome.send_lag * 1000
    if args.output_details:
        result |= report.details(outcome.samples)
    title = f"{target.url}\nmodel {target.model}, dataset {args.dataset_name}\n\n"
    report.emit(args, result, title + report.serve_table(result))
    return 0


def target_from(args: argparse.Namespace) -> Target:
    """The server that the flags name; its model is still open."""
    return Target(
        base_url=args.base_url or f"http://{args.host}:{args.port}",
        backend=BACKENDS[args.backend],
        api_key=args.api_key,
        ignore_eos=not args.disable_ignore_eos,
        extra_body=args.extra_request_body,
        timeout=args.request_timeout,
    )


async def _measure(
    target: Target, model: str | None, prompts: list[Prompt], plan: LoadPlan
) -> tuple[Target, LoadResult]:
    async with client.open_session(target) as session:
        listed = await client.first_model(session, target)
    target = dataclasses.replace(target, model=model or listed)
    return target, await load.measure(target, prompts, plan)


def check_answers(outcome: LoadResult) -> None:
    """Tell of the first failed request; raise when there is nothing to report."""
    failed = [sample for sample in outcome.samples if not sample.ok]
    if len(failed) == len(outcome.samples):
        raise HeadraceError(f"all {len(failed)} requests failed; the first: {failed[0].error}")
    if failed:
        report.note(f"{len(failed)} requests failed; the first: {failed[0].error}")


def describe(args: argparse.Namespace, target: Target) -> dict[str, Any]:
    """What was measured; `request_rate` None means all at once."""
    rate = args.request_rate
    return {
        "backend": args.backend,
        "base_url": target.root,
        "model": target.model,
        "dataset_name": args.dataset_name,
        "request_rate": None if math.isinf(rate) else rate,
        "burstiness": args.burstiness,
        "max_concurrency": args.max_concurrency,
        "random_input_len": args.random_input_len,
        "random_output_len": args.random_output_len,
        "random_range_ratio": args.random_range_ratio,
        "seed": args.seed,
        "extra_request_body": args.extra_request_body,
    }
