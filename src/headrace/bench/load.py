"""When requests are sent, and how many at once.

`arrival_times` is the plan, `drive` carries it out with any coroutine that sends one request, and
`measure` puts both on a server. A request that waits for `max_concurrency` starts its own clock
when it is sent; how far sending fell behind the plan is reported, not hidden.
"""

import argparse
import asyncio
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import aiohttp
import numpy as np
import uvloop
from tqdm import tqdm

from headrace.bench import client
from headrace.bench.client import Target
from headrace.bench.datasets import Form, Prompt, random_prompts
from headrace.bench.flags import json_object, natural_int, positive_float, positive_int
from headrace.bench.stream import Sample
from headrace.core.errors import HeadraceError

T = TypeVar("T")

_WARMUP_INPUT = 64
_WARMUP_OUTPUT = 16
_WARMUP_SEED = 2**62  # none that a person would choose


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """How the prompts of a run reach the server."""

    request_rate: float = math.inf
    """Mean requests per second; inf sends all at once."""
    burstiness: float = 1.0
    """Shape of the gamma-distributed gaps: 1 is a Poisson process, less is burstier."""
    max_concurrency: int | None = None
    warmup_requests: int = 1
    flush_cache: bool = False
    seed: int = 1
    keep_text: bool = False
    show_progress: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class LoadResult:
    """Samples in the order of the prompts; `duration` from first send to last answer, seconds."""

    samples: list[Sample]
    duration: float
    send_lag: float
    """Most seconds a request was sent after its planned arrival."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `plan_from`."""
    group = parser.add_argument_group("load")
    group.add_argument(
        "--request-rate",
        type=positive_float,
        default=math.inf,
        help="mean requests per second, arriving at random (default: inf, all at once)",
    )
    group.add_argument(
        "--burstiness",
        type=positive_float,
        default=1.0,
        help="1 is a Poisson process, less is burstier, more is steadier (default: 1)",
    )
    group.add_argument("--max-concurrency", type=positive_int, help="most requests in flight")
    group.add_argument(
        "--warmup-requests", type=natural_int, default=1, help="unmeasured first (default: 1)"
    )
    group.add_argument(
        "--flush-cache", action="store_true", help="empty the prefix cache before measuring"
    )
    group.add_argument(
        "--request-timeout", type=positive_float, default=3600.0, help="seconds (default: 3600)"
    )
    group.add_argument("--api-key", default="", help="sent as bearer token")
    group.add_argument(
        "--extra-request-body",
        type=json_object,
        default={},
        metavar="JSON",
        help='laid over every request, as {"sampling_params": {"temperature": 1}}',
    )
    group.add_argument(
        "--disable-ignore-eos", action="store_true", help="let the model end its answers"
    )
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bar")


def plan_from(args: argparse.Namespace) -> LoadPlan:
    """The plan that the flags of `add_arguments` (and --seed, --output-details) describe."""
    return LoadPlan(
        request_rate=args.request_rate,
        burstiness=args.burstiness,
        max_concurrency=args.max_concurrency,
        warmup_requests=args.warmup_requests,
        flush_cache=args.flush_cache,
        seed=args.seed,
        keep_text=args.output_details,
        show_progress=not args.disable_tqdm,
    )


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run on a fast event loop, with as many open sockets as the system grants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def measure(target: Target, prompts: Sequence[Prompt], plan: LoadPlan) -> LoadResult:
    """Warm up, then send every prompt as planned.

    Raises:
        HeadraceError: no server, every warm-up request failed, or the cache could not be flushed.
    """
    bodies = [client.request_body(target, prompt) for prompt in prompts]
    arrivals = arrival_times(len(bodies), plan.request_rate, plan.burstiness, plan.seed)
    async with client.open_session(target) as session:
        await warm_up(session, target, prompts[0], plan.warmup_requests)
        if plan.flush_cache:
            await client.flush_cache(session, target)
        with Progress(len(bodies), plan.show_progress) as progress:

            async def send(index: int) -> Sample:
                sample = await client.send(session, target, bodies[index], plan.keep_text)
                progress.add(sample)
                return sample

            return await drive(send, arrivals, plan.max_concurrency)


async def warm_up(session: aiohttp.ClientSession, target: Target, like: Prompt, count: int) -> None:
    """Send `count` prompts of about the size of `like`, but none that will be measured.

    Raises:
        HeadraceError: all of them failed; says how the first one did.
    """
    form: Form = "ids" if like.token_ids else target.prompt_form(as_text=True)
    input_len = max(1, min(like.input_len, _WARMUP_INPUT))
    prompts = random_prompts(
        count, input_len, min(like.output_len, _WARMUP_OUTPUT), 1.0, _WARMUP_SEED, form
    )
    bodies = [client.request_body(target, prompt) for prompt in prompts]
    samples = await asyncio.gather(*(client.send(session, target, body) for body in bodies))
    if samples and not any(sample.ok for sample in samples):
        raise HeadraceError(f"the warm-up failed: {samples[0].error}")


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Planned arrivals in seconds, the first at 0; gaps are gamma with mean 1 / rate."""
    if math.isinf(rate):
        return [0.0] * count
    rng = np.random.default_rng(seed)
    gaps = rng.gamma(burstiness, 1.0 / (rate * burstiness), count)
    times: list[float] = (np.cumsum(gaps) - gaps[:1]).tolist()
    return times


async def drive(
    send: Callable[[int], Awaitable[Sample]], arrivals: Sequence[float], max_concurrency: int | None
) -> LoadResult:
    """Call `send(i)` at `arrivals[i]`, at most `max_concurrency` at a time."""
    gate = asyncio.Semaphore(max_concurrency or len(arrivals))
    clock = time.perf_counter
    start = clock()
    lags = [0.0]

    async def one(index: int) -> Sample:
        async with gate:
            lags.append(clock() - start - arrivals[index])
            return await send(index)

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, due in enumerate(arrivals):
            if (delay := start + due - clock()) > 0:
                await asyncio.sleep(delay)
            tasks.append(group.create_task(one(index)))
    return LoadResult([task.result() for task in tasks], clock() - start, max(lags))


class Progress:
    """A bar on the terminal: requests done and output tokens per second; silent when piped."""

    def __init__(self, total: int, show: bool) -> None:
        self._bar = tqdm(total=total, unit="req", file=sys.stderr, disable=None if show else True)
        self._tokens = 0
        self._start = time.perf_counter()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, sample: Sample) -> None:
        """Count one answered request."""
        self._tokens += sample.output_tokens
        rate = self._tokens / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
        self._bar.update()
