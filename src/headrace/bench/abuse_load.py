"""The suites of `headrace bench abuse` about clients that vanish, are hostile, or too many."""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from headrace.bench.abuse_site import Check, Site, p99, watching
from headrace.bench.hostile import Attack, attacks
from headrace.bench.wire import Wire, ask

_AT_ONCE = 32
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}


# -- clients that vanish ----------------------------------------------------------------------


async def disconnects(args: argparse.Namespace) -> list[Check]:
    """Leave in every state: half a request, queued, in the prompt, in a grammar, in the answer."""
    async with Site(*args.server.split()) as site:
        chance = random.Random(args.seed)
        await _vanish_often(site, chance, 200)  # caches fill, threads start
        await site.at_rest()
        before = site.sizes()
        await _vanish_often(site, chance, args.count)
        checks = await site.stays_small(before, most_mb=64)
        status, _ = await ask(site.port, "/generate", {"text": "a"})
        return [*checks, Check("and it still serves", str(status), status == 200)]


async def _vanish_often(site: Site, chance: random.Random, count: int) -> None:
    left = iter(range(count))

    async def work(seed: int) -> None:
        own = random.Random(seed)
        for _ in left:
            await vanish(site, own)

    await asyncio.gather(*(work(chance.randrange(1 << 30)) for _ in range(_AT_ONCE)))


async def vanish(site: Site, chance: random.Random) -> None:
    path, body = _any_request(chance)
    try:
        async with Wire(site.port) as wire:
            part = chance.random() if chance.random() < 0.1 else 1.0
            await wire.send(path, json.dumps(body).encode(), part=part)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.expovariate(20.0))
                return
            seen, enough = 0, chance.randrange(1, 20)
            async with asyncio.timeout(chance.expovariate(4.0)):
                async for _ in wire.events():
                    seen += 1
                    if seen >= enough:
                        return
    except (OSError, TimeoutError):
        pass


def _any_request(chance: random.Random) -> tuple[str, dict[str, Any]]:
    words = "the mill wheel turns in the stream " * chance.choice((1, 1, 5, 30))
    if chance.random() < 0.3:
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": words}], "stream": True}
        if chance.random() < 0.3:
            schema = {"name": "x", "schema": _SCHEMA | {"title": str(chance.randrange(50))}}
            ask["response_format"] = {"type": "json_schema", "json_schema": schema}
        return "/v1/chat/completions", ask | {"max_tokens": chance.randrange(1, 200)}
    sampling = {"max_new_tokens": chance.randrange(1, 300), "n": chance.choice((1, 1, 1, 3))}
    stream = chance.random() < 0.7
    return "/generate", {"text": words, "stream": stream, "sampling_params": sampling}


# -- hostile bodies ---------------------------------------------------------------------------


async def hostile(args: argparse.Namespace) -> list[Check]:
    """Bodies nobody should send, beside a stream whose pace is compared with a harmless time."""
    async with Site(*args.server.split()) as site:
        found = attacks(args.seed, await site.vocab_size())
        harmless = [_harmless(len(attack.body)) for attack in found]
        await send_all(site, found * 3)  # every path has been taken, in several threads
        await site.at_rest()
        before = site.sizes()
        async with watching(site) as calm:
            await send_all(site, harmless * max(1, args.count // len(found)))
        async with watching(site) as gaps:
            statuses = await send_all(site, found * max(1, args.count // len(found)))
        wrong = {status: n for status, n in statuses.items() if status >= 500}
        checks = await site.stays_small(before, most_mb=128)
        pace = f"{p99(gaps):.1f} ms beside harmless {p99(calm):.1f} ms"
        return [
            Check(
                f"{sum(statuses.values())} bodies", str(dict(sorted(statuses.items()))), not wrong
            ),
            Check("p99 between a victim's tokens", pace, p99(gaps) < 2 * p99(calm) + 5),
            *checks,
        ]


def _harmless(size: int) -> Attack:
    """A request of about `size` bytes that is answered."""
    return Attack("/tokenize", json.dumps({"prompt": "hello", "user": "u" * size}).encode())


async def send_all(site: Site, found: list[Attack]) -> Counter[int]:
    """How often each status came back; one after the other."""
    statuses: Counter[int] = Counter()
    for attack in found:
        try:
            async with asyncio.timeout(60), Wire(site.port) as wire:
                await wire.send(attack.path, attack.body, attack.head)
                status = await wire.status()
                await wire.rest()
        except ConnectionError:
            status = 0
        except TimeoutError:
            status = 599
        statuses[status] += 1
    return statuses


# -- too many requests ------------------------------------------------------------------------


async def overload(args: argparse.Namespace) -> list[Check]:
    """Four times what the server does, then two tenants of which one wants ten times as much."""
    queue = 32
    # As many run under the flood as usually: a larger batch is slower for everybody.
    bounds = ("--max-running-requests", "16", "--max-queued-requests", str(queue))
    async with Site(*bounds, *args.server.split(), apart=True) as site:
        usual = Timings()
        began = time.perf_counter()
        await asyncio.gather(*(_in_turn(site, usual, 6) for _ in range(16)))
        rate = len(usual.whole) / (time.perf_counter() - began)
        before = site.sizes()
        flood = Timings()
        deepest = await _flood(site, flood, 4 * rate, args.seconds)
        checks = await site.stays_small(before, most_mb=96)
    others = {status: n for status, n in flood.statuses.items() if status not in (200, 503)}
    refused, served = flood.statuses[503], flood.statuses[200]
    return [
        Check("usual requests per second", f"{rate:.1f}", rate > 0),
        Check(
            "served of those who came", f"{served} of {served + refused}", min(served, refused) > 0
        ),
        Check("nothing but 200 and 503", str(others), not others),
        Check("waiting requests", f"at most {deepest} of {queue}", deepest <= queue),
        Check("p99 to be refused", f"{p99(flood.refused):.0f} ms", p99(flood.refused) < 1000),
        Check("refused with Retry-After", f"{flood.told} of {refused}", flood.told == refused),
        Check(
            "p99 between tokens",
            f"{p99(flood.gaps):.1f} ms, usually {p99(usual.gaps):.1f} ms",
            p99(flood.gaps) < 2 * p99(usual.gaps) + 20,
        ),
        *checks,
        *await _fairness(args),
    ]


class Timings:
    """Of requests, in seconds."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.gaps: list[float] = []
        self.refused: list[float] = []
        self.told = 0
        self.tokens = 0
        self.statuses: Counter[int] = Counter()


async def _in_turn(site: Site, timings: Timings, count: int) -> None:
    for _ in range(count):
        await _one(site, timings)


async def _one(site: Site, timings: Timings, token: str = "") -> None:
    sampling = {"max_new_tokens": 48, "temperature": 1.0, "ignore_eos": True}
    text = f"{random.random()} is a number of a mill"
    body = {"text": text, "stream": True, "sampling_params": sampling}
    began = time.perf_counter()
    async with Wire(site.port, token or site.token) as wire:
        await wire.send("/generate", json.dumps(body).encode())
        status = await wire.status()
        timings.statuses[status] += 1
        if status != 200:
            timings.refused.append(time.perf_counter() - began)
            head = (await wire.rest()).lower()
            timings.told += b"retry-after:" in head
            return
        last = 0.0
        async for when, _ in wire.events():
            timings.tokens += 1
            if last:
                timings.gaps.append(when - last)
            last = when
    timings.whole.append(time.perf_counter() - began)


async def _flood(site: Site, timings: Timings, rate: float, seconds: float) -> int:
    """Requests at a rate whatever becomes of them; returns how many waited at most."""
    tasks: set[asyncio.Task[None]] = set()
    began, sent, deepest = time.perf_counter(), 0, 0
    while (age := time.perf_counter() - began) < seconds:
        while sent < age * rate:
            tasks.add(asyncio.create_task(_one(site, timings)))
            sent += 1
        if sent % 20 == 0:
            deepest = max(deepest, (await site.state())["waiting"])
        await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    return deepest


async def _fairness(args: argparse.Namespace) -> list[Check]:
    keys = [{"name": "loud", "key": "loud-key"}, {"name": "calm", "key": "calm-key"}]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "keys.yaml")
        path.write_text(json.dumps([*keys, {"name": "op", "key": "operator", "admin": True}]))
        path.chmod(0o600)
        options = ("--api-key-file", str(path), "--max-running-requests", "4")
        async with Site(*options, *args.server.split(), token="operator") as site:
            served = Counter({"loud-key": 0, "calm-key": 0})

            async def hungry(token: str) -> None:
                # Whole answers: whether both always have someone waiting must not depend on how
                # fast this client reads.
                sampling = {"max_new_tokens": 128, "ignore_eos": True}
                while True:
                    body = {"text": f"{random.random()}", "sampling_params": sampling}
                    status, _ = await ask(site.port, "/generate", body, token)
                    served[token] += status == 200

            async with asyncio.TaskGroup() as clients:
                crowd = [clients.create_task(hungry("loud-key")) for _ in range(80)]
                crowd += [clients.create_task(hungry("calm-key")) for _ in range(8)]
                await asyncio.sleep(args.seconds / 2)
                # Counted now: what still waits is mostly of the loud one.
                share = served["calm-key"] / max(1, served.total())
                for client in crowd:
                    client.cancel()
    asked = "share of the calm tenant of two, 8 against 80 requests"
    return [Check(asked, f"{share:.1%}", 0.4 < share < 0.6)]
