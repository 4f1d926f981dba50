"""Fields without effect on every route, and what a stream sends while nothing comes."""

import asyncio
import functools
import json

import pytest
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.messages import Delta
from headrace.server import sse
from headrace.server.app import build_app
from headrace.server.sse import EventStream, Wire
from tests.support.scripted_manager import ScriptedManager

HI = [{"role": "user", "content": "hi"}]
BODIES = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": HI},
    "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": HI, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HI},
    "/api/chat": {"model": "tiny", "messages": HI, "stream": False},
    "/api/generate": {"model": "tiny", "prompt": "a", "stream": False},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/abort_request": {"rid": "a"},
}


@functools.cache
def client(**options) -> TestClient:
    config = Config.from_flat({"served_model_name": "tiny"} | options)
    manager = ScriptedManager(config)
    return TestClient(build_app(manager, config, manager.info), raise_server_exceptions=False)


@pytest.mark.parametrize("path", BODIES)
def test_unknown_fields_are_named(path):
    answer = client().post(path, json=BODIES[path] | {"surprise": 1})
    assert answer.status_code == 200
    assert answer.headers["x-headrace-ignored"] == "surprise"
    assert "x-headrace-ignored" not in client().post(path, json=BODIES[path]).headers


@pytest.mark.parametrize("path", BODIES)
def test_strict_servers_refuse_them(path):
    server = client(strict_fields=True)
    assert server.post(path, json=BODIES[path]).status_code == 200
    answer = server.post(path, json=BODIES[path] | {"surprise": 1})
    assert answer.status_code == 400
    assert "surprise" in answer.text
    assert "--strict-fields" in answer.text


def test_strict_servers_take_what_clients_always_send():
    server = client(strict_fields=True)
    body = BODIES["/v1/chat/completions"] | {"user": "u", "metadata": {}, "store": True}
    answer = server.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-headrace-ignored"] == "user,metadata,store"


def test_fields_of_objects_are_named_with_their_place():
    body = BODIES["/v1/chat/completions"] | {"stream_options": {"include_obfuscation": True}}
    answer = client().post("/v1/chat/completions", json=body)
    assert answer.headers["x-headrace-ignored"] == "stream_options.include_obfuscation"


async def slow(news: list, pause: float):
    for item in news:
        await asyncio.sleep(pause)
        yield item


async def test_a_silent_stream_sends_signs_of_life(monkeypatch):
    monkeypatch.setattr(sse, "IDLE_SECONDS", 0.01)
    sent = []

    class Reply:
        def event(self, index, delta):
            return delta.text.encode()

        def end(self):
            return b""

    async def send(message):
        sent.append(message)

    async def receive():
        await asyncio.sleep(60)

    deltas = slow([(0, Delta("a", text="x"))], 0.1)
    stream = EventStream(deltas, Reply(), {}, Wire(done=b"!", idle=b"."))
    await stream({"type": "http"}, receive, send)
    assert sent[0]["status"] == 200
    text = b"".join(message["body"] for message in sent[1:])
    assert text.startswith(b".")
    assert text.strip(b".") == b"x!"
    sent.clear()
    busy = slow([(0, Delta("a", text="x"))] * 30, 0.002)
    await EventStream(busy, Reply(), {}, Wire(done=b"!"))({"type": "http"}, receive, send)
    assert b"".join(message["body"] for message in sent[1:]) == b"x" * 30 + b"!"


def test_errors_have_the_shape_of_their_protocol():
    server = client(api_key="k")
    shapes = {
        path: json.loads(server.post(path, json={}).text)
        for path in ("/v1/responses", "/v1/messages", "/api/chat")
    }
    assert shapes["/v1/responses"]["error"]["code"] == "invalid_api_key"
    assert shapes["/v1/messages"]["error"]["type"] == "authentication_error"
    assert isinstance(shapes["/api/chat"]["error"], str)
    headers = {"x-api-key": "k"}
    assert server.get("/api/tags", headers=headers).status_code == 200
    assert server.get("/api/tags", headers={"x-api-key": "x"}).status_code == 401
