"""Arrival plans and the driver, with a coroutine in place of a server."""

import asyncio
import itertools
import math
import statistics
import time

import pytest

from headrace.bench.load import arrival_times, drive
from headrace.bench.stream import Sample


def test_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times(4, math.inf, 1.0, 1) == [0.0] * 4


@pytest.mark.parametrize(("burstiness", "variation"), [(1.0, 1.0), (4.0, 0.5), (0.25, 2.0)])
def test_gaps_have_the_asked_mean_and_variation(burstiness: float, variation: float) -> None:
    times = arrival_times(20_001, 50.0, burstiness, 7)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0.0 and min(gaps) >= 0
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) / mean == pytest.approx(variation, rel=0.05)
    assert times == arrival_times(20_001, 50.0, burstiness, 7)


async def test_concurrency_is_limited_and_order_kept() -> None:
    running = 0
    most = 0

    async def send(index: int) -> Sample:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002 * (index % 3))
        running -= 1
        return Sample(ok=True, start=0.0, output_tokens=index)

    result = await drive(send, [0.0] * 20, 4)
    assert most == 4
    assert [sample.output_tokens for sample in result.samples] == list(range(20))


async def test_requests_wait_for_their_arrival() -> None:
    sent: list[float] = []

    async def send(_: int) -> Sample:
        sent.append(time.perf_counter())
        return Sample(ok=True, start=0.0)

    arrivals = [0.0, 0.02, 0.05]
    start = time.perf_counter()
    result = await drive(send, arrivals, None)
    assert all(at - start >= due for at, due in zip(sent, arrivals, strict=True))
    assert result.duration >= 0.05


async def test_falling_behind_is_measured() -> None:
    async def send(_: int) -> Sample:
        await asyncio.sleep(0.03)
        return Sample(ok=True, start=0.0)

    result = await drive(send, [0.0, 0.01, 0.02], 1)
    assert result.send_lag >= 0.04
