"""`bench serve` end to end against a small server of our own, in a thread of this process."""

import argparse
import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from headrace.bench import serve
from headrace.core.errors import BadRequest, HeadraceError

GAP = 0.003


class FakeServer:
    """Answers /generate, /v1/completions and /v1/chat/completions; keeps what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[str | None] = []
        self.flushed_after: int | None = None
        self.most_running = 0
        self.fail: Callable[[int], bool] = lambda number: False
        self.incremental = False
        self.tokens_per_chunk = 1
        self._running = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/flush_cache", self.flush)
        app.router.add_post("/generate", self.native)
        app.router.add_post("/v1/completions", self.openai)
        app.router.add_post("/v1/chat/completions", self.openai)
        return app

    async def models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "tiny"}]})

    async def flush(self, _: web.Request) -> web.Response:
        self.flushed_after = len(self.bodies)
        return web.Response(text="ok")

    async def native(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        count = body["sampling_params"]["max_new_tokens"]
        size = len(body.get("input_ids") or body["text"].split())
        events = []
        for before, last in self._spans(count):
            first = before if self.incremental else 0
            reason = {"type": "length", "length": count} if last == count else None
            meta = {"finish_reason": reason, "prompt_tokens": size, "completion_tokens": last}
            ids = list(range(first, last))
            text = "".join(f" t{token}" for token in ids)
            meta |= {"cached_tokens": size // 2}
            events.append({"text": text, "output_ids": ids, "meta_info": meta})
        return await self._stream(request, body, events)

    async def openai(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        count = body["max_tokens"]
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        size = len(prompt.split()) if isinstance(prompt, str) else len(prompt)
        events: list[dict[str, Any]] = []
        if chat:
            events.append(self._choice({"delta": {"role": "assistant", "content": ""}}))
        for first, last in self._spans(count):
            text = "".join(f" t{i}" for i in range(first, last))
            key = "reasoning_content" if last <= count // 2 else "content"
            events.append(self._choice({"delta": {key: text}} if chat else {"text": text}))
        events.append(self._choice({"delta": {}} if chat else {"text": ""}, "length"))
        if body["stream_options"]["include_usage"]:
            details = {"cached_tokens": size // 2}
            usage = {"prompt_tokens": size, "completion_tokens": count}
            usage |= {"prompt_tokens_details": details}
            events.append({"choices": [], "usage": usage})
        return await self._stream(request, body, events)

    def _spans(self, count: int) -> list[tuple[int, int]]:
        """(first token, end) of each chunk; the first holds one token."""
        ends = [*range(1, count, self.tokens_per_chunk), count] if count > 1 else [1]
        return list(zip([0, *ends], ends, strict=False))

    def _choice(self, content: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
        return {"choices": [{"index": 0, **content, "finish_reason": reason}]}

    async def _stream(
        self, request: web.Request, body: dict[str, Any], events: list[dict[str, Any]]
    ) -> web.StreamResponse:
        self.bodies.append(body)
        self.headers.append(request.headers.get("Authorization"))
        if self.fail(len(self.bodies)):
            return web.json_response({"error": {"message": "queue is full"}}, status=503)
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in events:
            await asyncio.sleep(GAP)
            await response.write(b"data: %s\n\n" % json.dumps(event).encode())
        await response.write(b"data: [DONE]\n\n")
        self._running -= 1
        return response


@pytest.fixture
def server() -> Iterator[tuple[FakeServer, str]]:
    fake = FakeServer()
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(fake.app())
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    port = runner.addresses[0][1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield fake, f"http://127.0.0.1:{port}"
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    loop.close()


def bench(base_url: str, *flags: str) -> int:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.run(parser.parse_args(["--base-url", base_url, *flags]))


SMALL = ("--num-prompts", "6", "--random-input-len", "10", "--random-output-len", "8")


@pytest.mark.parametrize("backend", ["native", "completions", "chat"])
def test_backends(
    server: tuple[FakeServer, str], backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    assert bench(url, "--backend", backend, *SMALL, "--json", "--output-details") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["completed"], result["failed"], result["uncounted"]) == (6, 0, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (60, 48)
    assert result["cached_token_share"] == 0.5
    assert result["model"] == "tiny"
    assert result["request_rate"] is None
    # A busy machine makes answers later, never earlier.
    assert result["mean_e2e_latency_ms"] >= 8 * GAP * 1000
    assert result["mean_ttft_ms"] >= GAP * 1000
    assert result["generated_texts"] == ["".join(f" t{i}" for i in range(8))] * 6
    assert len(fake.bodies) == 7  # one to warm up
    assert all(body["stream"] for body in fake.bodies)


def test_table_and_file(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.jsonl"
    flags = ("--request-rate", "500", "--output", str(path))
    assert bench(server[1], *SMALL, *flags) == 0
    out, err = capsys.readouterr()
    assert "6 ok, 0 failed" in out and "TTFT" in out
    assert max(map(len, out.splitlines())) <= 80
    assert err == ""  # no bar when piped
    row = json.loads(path.read_text())
    assert row["request_rate"] == 500.0 and row["max_send_lag_ms"] >= 0


@pytest.mark.parametrize("incremental", [False, True])
def test_tokens_are_counted_not_chunks(
    server: tuple[FakeServer, str], incremental: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    fake.tokens_per_chunk = 4
    fake.incremental = incremental
    bench(url, *SMALL, "--json", "--output-details")
    result = json.loads(capsys.readouterr().out)
    assert result["total_output_tokens"] == 48
    assert result["tokens_per_chunk"] >= 8 / 3
    # A busy client reads chunks together, and then sees fewer gaps; it never sees more.
    assert all(len(itl) <= 7 for itl in result["itls"])
    assert result["generated_texts"] == ["".join(f" t{i}" for i in range(8))] * 6


def test_bodies_carry_key_extra_fields_and_prompts(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    extra = '{"sampling_params": {"temperature": 0.5}, "priority": 2}'
    bench(url, *SMALL, "--api-key", "secret", "--extra-request-body", extra)
    assert set(fake.headers) == {"Bearer secret"}
    sampling = {"temperature": 0.5, "max_new_tokens": 8, "ignore_eos": True}
    assert all(body["sampling_params"] == sampling for body in fake.bodies)
    assert all(body["priority"] == 2 for body in fake.bodies)
    prompts = [tuple(body["input_ids"]) for body in fake.bodies]
    assert len(set(prompts)) == 7  # the warm-up is not one of the measured prompts


def test_openai_bodies_and_base_url_with_v1(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    flags = ("--backend", "sglang-oai", "--model", "mine", "--text-prompts")
    bench(url + "/v1/", *SMALL, *flags, "--disable-ignore-eos")
    assert all(body["model"] == "mine" and "ignore_eos" not in body for body in fake.bodies)
    assert all(len(body["prompt"].split()) == 10 for body in fake.bodies)


def test_concurrency_and_flush(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    bench(url, *SMALL, "--max-concurrency", "2", "--warmup-requests", "1", "--flush-cache")
    assert fake.most_running == 2
    assert fake.flushed_after == 1


def test_some_failures_are_reported(
    server: tuple[FakeServer, str], capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    fake.fail = lambda number: number in (3, 4)
    assert bench(url, *SMALL) == 0
    out, err = capsys.readouterr()
    assert "4 ok, 2 failed" in out
    assert "2 requests failed; the first: HTTP 503: queue is full" in err


def test_failed_warmup_and_all_failed(server: tuple[FakeServer, str]) -> None:
    fake, url = server
    fake.fail = lambda number: True
    with pytest.raises(HeadraceError, match="warm-up failed: HTTP 503: queue is full"):
        bench(url, *SMALL)
    with pytest.raises(HeadraceError, match="all 6 requests failed; the first: HTTP 503"):
        bench(url, *SMALL, "--warmup-requests", "0")


def test_unreachable_server() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(HeadraceError, match=f"no server at http://127.0.0.1:{port}"):
        bench(f"http://127.0.0.1:{port}", *SMALL)
    with pytest.raises(HeadraceError, match="no server at localhost"):
        bench("localhost", *SMALL)


def test_wrong_route_names_the_other_backends(server: tuple[FakeServer, str]) -> None:
    with pytest.raises(HeadraceError, match="try --backend completions or chat"):
        bench(server[1] + "/elsewhere", *SMALL)


def test_slow_answers_time_out(server: tuple[FakeServer, str]) -> None:
    flags = ("--request-timeout", "0.01", "--warmup-requests", "0")
    with pytest.raises(HeadraceError, match=r"no complete answer within 0.01 s"):
        bench(server[1], *SMALL, *flags)


def test_several_samples_are_refused(server: tuple[FakeServer, str]) -> None:
    with pytest.raises(BadRequest, match="'n' must be 1"):
        bench(server[1], *SMALL, "--extra-request-body", '{"sampling_params": {"n": 2}}')


def test_file_dataset_through_chat(
    server: tuple[FakeServer, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake, url = server
    messages = [{"role": "user", "content": "one two three"}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages, "output_len": 4}) + "\n")
    flags = ("--dataset-name", "file", "--dataset-path", str(path), "--json")
    assert bench(url, "--backend", "chat", *flags) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (3, 4)
    assert fake.bodies[-1]["messages"] == messages
