"""The suite of `headrace bench abuse` that lasts: everything at once, and nothing may change."""

import argparse
import asyncio
import json
import random
import time

import numpy as np

from headrace.bench.abuse_load import send_all, vanish
from headrace.bench.abuse_site import Check, Site
from headrace.bench.hostile import attacks
from headrace.bench.wire import ask

_CLIENTS = 12
_QUESTIONS = 64


async def soak(args: argparse.Namespace) -> list[Check]:
    """Known questions, vanishing and hostile clients side by side for `--seconds`."""
    async with Site(*args.server.split()) as site:
        truth = [await _answer(site, number) for number in range(_QUESTIONS)]
        over = time.monotonic() + args.seconds
        counts = {"asked": 0, "lost": 0, "different": 0}
        memory: list[tuple[float, int]] = []
        workers = [_ask_on(site, truth, counts, over, n) for n in range(_CLIENTS)]
        await asyncio.gather(*workers, _abuse_on(site, over, args.seed), _weigh(site, memory, over))
        grown = growth(memory)
        state = await site.at_rest()
        repeated = site.repeated_lines()
    held = {name: state[name] for name in ("running", "waiting", "used_tokens")}
    return [
        Check(f"answers in {args.seconds:.0f} s", str(counts["asked"]), counts["asked"] > 0),
        Check("lost answers", str(counts["lost"]), not counts["lost"]),
        Check("other answers than alone", str(counts["different"]), not counts["different"]),
        Check("memory after the first third", f"{grown:+.1f} MiB", grown < 48),
        Check("nothing is held", str(held), not any(held.values())),
        Check("no log line twice", repr(repeated[:1])[:60], not repeated),
    ]


async def _answer(site: Site, number: int) -> str:
    """The text of one of the questions; "" when there was none."""
    sampling = {"max_new_tokens": 16 + number, "temperature": (number % 3) / 2, "seed": number}
    body = {"text": f"Question {number % 16}: why does a wheel turn?", "sampling_params": sampling}
    status, answer = await ask(site.port, "/generate", body)
    return json.dumps(json.loads(answer)["output_ids"]) if status == 200 else ""


async def _ask_on(
    site: Site, truth: list[str], counts: dict[str, int], over: float, seed: int
) -> None:
    chance = random.Random(seed)
    while time.monotonic() < over:
        number = chance.randrange(_QUESTIONS)
        try:
            answer = await _answer(site, number)
        except (OSError, ValueError):
            answer = ""
        counts["asked"] += 1
        counts["lost"] += not answer
        counts["different"] += bool(answer) and answer != truth[number]


async def _abuse_on(site: Site, over: float, seed: int) -> None:
    chance = random.Random(seed)
    bodies = attacks(seed, await site.vocab_size())
    while time.monotonic() < over:
        await asyncio.gather(*(vanish(site, chance) for _ in range(8)))
        await send_all(site, [chance.choice(bodies)])


async def _weigh(site: Site, memory: list[tuple[float, int]], over: float) -> None:
    while time.monotonic() < over:
        memory.append((time.monotonic(), site.sizes().memory))
        await asyncio.sleep(min(5.0, max(0.2, over - time.monotonic())))


def growth(memory: list[tuple[float, int]]) -> float:
    """MiB that the straight line through the last two thirds of the samples rises."""
    samples = np.array(memory[len(memory) // 3 :], dtype=np.float64)
    if len(samples) < 3:
        return 0.0
    times = samples[:, 0] - samples[0, 0]
    slope = np.polyfit(times, samples[:, 1], 1)[0]
    return float(slope * times[-1] / (1 << 20))
