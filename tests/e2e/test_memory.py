"""64 streams at once with random disconnects, again and again: nothing stays, memory is flat."""

import asyncio
import random

import aiohttp
import psutil
import pytest

from tests.support.servers import Server, wait_for


async def storm(url: str, seed: int) -> int:
    """64 concurrent streams; about half of the clients leave early. Returns how many ended."""
    dice = random.Random(seed)

    async def one(index: int) -> bool:
        body = {
            "text": f"Tell me a story about number {dice.randrange(40)} and {index % 7}.",
            "sampling_params": {"max_new_tokens": dice.randrange(8, 60), "ignore_eos": True},
            "stream": True,
        }
        leave_after = dice.choice([None, 0, 1, 5])
        chunks = 0
        async with session.post(url + "/generate", json=body) as response:
            assert response.status == 200
            async for line in response.content:
                chunks += line.startswith(b"data: {")
                if leave_after is not None and chunks > leave_after:
                    return False
        return True

    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        return sum(await asyncio.gather(*(one(index) for index in range(64))))


def resident(pid: int) -> float:
    """MiB of the process tree."""
    root = psutil.Process(pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)]) / 2**20


@pytest.mark.slow
def test_nothing_stays(tmp_path):
    with Server(tmp_path, "--log-level", "warning") as server:
        server.wait_ready()
        sizes = []
        for round_number in range(8):
            assert 0 < asyncio.run(storm(server.url, round_number)) < 64
            load = wait_for(lambda: _idle(server.url))
            assert load["num_used_tokens"] == 0, "pages are lost"
            sizes.append(resident(server.process.pid))
        # The first rounds touch the KV cache and warm allocators up.
        assert sizes[-1] - sizes[3] < 8, sizes


def _idle(url: str) -> dict | None:
    import json
    import urllib.request

    with urllib.request.urlopen(url + "/v1/loads") as response:
        load = json.load(response)["loads"][0]
    quiet = load["num_running_reqs"] == load["num_waiting_reqs"] == 0
    return load if quiet and _flushes(url) else None


def _flushes(url: str) -> bool:
    """The cache can be flushed only when no request is left in the scheduler."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url + "/flush_cache", method="POST"))
    except urllib.error.HTTPError:
        return False
    return True
