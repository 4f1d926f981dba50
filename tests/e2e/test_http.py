"""A real server over HTTP: the native routes, many streams, clients that leave."""

import asyncio
import json
import random
import time

import aiohttp
import pytest

from tests.e2e.conftest import API_KEY

pytestmark = pytest.mark.slow

LONG = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0.0}


async def sleep_after_steps(http: aiohttp.ClientSession, seconds: float) -> None:
    async with http.post("/slow_down", json={"forward_sleep_time": seconds}) as answer:
        assert answer.status == 200


@pytest.fixture
async def slow(http):
    """LONG takes 8 s or more: it does not end by itself before a test has done something to it."""
    await sleep_after_steps(http, 0.02)
    yield
    await sleep_after_steps(http, 0.0)


@pytest.fixture
async def http(demo_server):
    headers = {"Authorization": f"Bearer {API_KEY}"}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(
        demo_server.url, headers=headers, connector=connector
    ) as session:
        yield session


async def generate(http: aiohttp.ClientSession, **body) -> dict:
    async with http.post("/generate", json=body) as answer:
        assert answer.status == 200, await answer.text()
        return await answer.json()


async def load(http: aiohttp.ClientSession) -> dict:
    async with http.get("/v1/loads") as answer:
        return (await answer.json())["loads"][0]


async def wait_idle(http: aiohttp.ClientSession, seconds: float) -> None:
    """Until nothing runs or waits; counters come at most every 0.1 s."""
    deadline = time.monotonic() + seconds
    while (found := await load(http))["num_running_reqs"] + found["num_waiting_reqs"]:
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.02)


async def events(answer: aiohttp.ClientResponse):
    async for line in answer.content:
        if line.startswith(b"data: ") and line != b"data: [DONE]\n":
            yield json.loads(line[6:])


async def test_generate_and_its_stream_agree(http):
    sampling = {"temperature": 0.0, "max_new_tokens": 24}
    whole = await generate(http, text="The mill wheel", sampling_params=sampling)
    body = {"text": "The mill wheel", "sampling_params": sampling, "stream": True}
    async with http.post("/generate", json=body) as answer:
        found = [event async for event in events(answer)]
    assert found[-1]["text"] == whole["text"]
    assert found[-1]["output_ids"] == whole["output_ids"]
    lengths = [len(event["output_ids"]) for event in found]
    assert lengths == sorted(lengths)
    meta = whole["meta_info"]
    assert meta["completion_tokens"] == len(whole["output_ids"])
    assert meta["finish_reason"]["type"] in ("stop", "length")


async def test_a_batch_equals_its_parts(http):
    prompts = ["The mill wheel", "Hello", "Two plus two is"]
    sampling = {"temperature": 0.0, "max_new_tokens": 12}
    batch = await generate(http, text=prompts, sampling_params=sampling)
    alone = [await generate(http, text=prompt, sampling_params=sampling) for prompt in prompts]
    assert [item["output_ids"] for item in batch] == [item["output_ids"] for item in alone]


async def test_tokenize_is_what_generate_sees(http):
    async with http.post("/tokenize", json={"prompt": "Hello wheel"}) as answer:
        tokens = (await answer.json())["tokens"]
    found = await generate(
        http,
        text="Hello wheel",
        return_prompt_token_ids=True,
        sampling_params={"max_new_tokens": 0},
    )
    assert found["prompt_token_ids"] == tokens
    async with http.post("/detokenize", json={"tokens": tokens}) as answer:
        assert (await answer.json())["text"] == "Hello wheel"


async def test_vanished_client_frees_its_request_at_once(http, slow):
    await wait_idle(http, 60)
    body = {"text": "Tell me a story", "sampling_params": LONG, "stream": True}
    async with http.post("/generate", json=body) as answer:
        async for event in events(answer):
            if event["meta_info"]["completion_tokens"] >= 2:
                break
    await wait_idle(http, 6)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await generate(http, text="Tell me a story", sampling_params=LONG)
    await wait_idle(http, 6)


async def test_abort_request_ends_a_stream(http, slow):
    body = {"text": "Tell me", "rid": "to-end", "sampling_params": LONG, "stream": True}
    last = {}
    async with http.post("/generate", json=body) as answer:
        async for event in events(answer):
            if not last:
                async with http.post("/abort_request", json={"rid": "to-end"}) as aborted:
                    assert aborted.status == 200
            last = event
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert last["meta_info"]["completion_tokens"] < LONG["max_new_tokens"]


async def test_many_streams_with_random_disconnects_leave_nothing(http):
    """More clients than rows; half of them leave somewhere in the middle."""
    dice = random.Random(5)

    async def client(number: int) -> bool:
        leave_after = dice.randrange(12) if number % 2 else None
        sampling = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True}
        body = {"text": f"Story {number % 5}", "sampling_params": sampling, "stream": True}
        seen = 0
        async with http.post("/generate", json=body) as answer:
            assert answer.status == 200
            async for event in events(answer):
                seen = event["meta_info"]["completion_tokens"]
                if leave_after is not None and seen > leave_after:
                    return False
        return seen == 12

    done = await asyncio.gather(*(client(number) for number in range(64)))
    assert all(done[::2])
    await wait_idle(http, 60)
    async with http.post("/flush_cache") as answer:
        assert answer.status == 200, "something is still held"
    assert (await load(http))["num_used_tokens"] == 0


async def test_health_while_busy(http, slow):
    body = {"text": "Tell me", "sampling_params": LONG, "stream": True}
    async with http.post("/generate", json=body) as busy:
        await anext(events(busy))
        for path in ("/health", "/health_generate", "/ready"):
            async with http.get(path) as answer:
                assert answer.status == 200
    await wait_idle(http, 6)
