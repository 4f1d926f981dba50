"""The whole app in-process: routes, error bodies, access, vanishing clients."""

import asyncio
import functools
import itertools
import json
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.errors import WorkerLost
from headrace.core.messages import Delta, FinishReason, GenerateRequest
from headrace.frontend import native as frontend_native
from headrace.server import native, sse
from headrace.server.app import build_app
from headrace.server.schemas import all_schemas
from tests.support.scripted_manager import STATS, ScriptedManager

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def server(script: Callable | None = None, **options) -> tuple[TestClient, ScriptedManager]:
    config = Config.from_flat({"served_model_name": "tiny", "model_path": "/m/tiny"} | options)
    manager = ScriptedManager(config, script)
    app = build_app(manager, config, manager.info)
    return TestClient(app, raise_server_exceptions=False), manager


# One app for all requests that it refuses: they leave nothing behind.
refusing = functools.cache(server)


def events(text: str) -> list:
    """The JSON values of a stream, and that it ends with [DONE]."""
    *parts, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


# -- generating routes ------------------------------------------------------------------------


def test_generate():
    client, _ = server()
    answer = client.post("/generate", json={"text": "hi"})
    assert answer.status_code == 200
    assert answer.json()["text"] == "Hello wheel!"
    assert answer.json()["meta_info"]["finish_reason"] == {"type": "stop", "matched": 3}
    assert client.put("/generate", json={"text": "hi"}).json()["text"] == "Hello wheel!"


def test_generate_batch_answers_in_order():
    client, _ = server()
    body = {"text": ["a", "b"], "rid": ["x", "y"], "sampling_params": {"n": 2}}
    answer = client.post("/generate", json=body).json()
    assert [item["meta_info"]["id"] for item in answer] == ["x_0", "x_1", "y_0", "y_1"]


def test_generate_stream_repeats_the_text_so_far():
    client, _ = server()
    found = events(client.post("/generate", json={"text": "hi", "stream": True}).text)
    texts = [item["text"] for item in found]
    assert texts[-1] == "Hello wheel!"
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert found[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": 3}
    assert "index" not in found[0]


def test_generate_stream_of_deltas():
    client, _ = server(incremental_streaming_output=True)
    found = events(client.post("/generate", json={"text": "hi", "stream": True}).text)
    assert "".join(item["text"] for item in found) == "Hello wheel!"
    assert sum(len(item["output_ids"]) for item in found) == 4


def test_generate_stream_of_a_batch_is_numbered():
    client, _ = server()
    found = events(client.post("/generate", json={"text": ["a", "b"], "stream": True}).text)
    last = {item["index"]: item for item in found}
    assert [last[index]["text"] for index in (0, 1)] == ["Hello wheel!"] * 2


def test_generate_returns_prompt_ids():
    client, manager = server()
    expected = manager.tokenizer.encode("Hello")
    body = {"text": ["Hello", "Hello"], "return_prompt_token_ids": True}
    for item in client.post("/generate", json=body).json():
        assert item["prompt_token_ids"] == expected


def test_completions_and_chat_stream():
    client, _ = server()
    found = events(client.post("/v1/completions", json={"prompt": "a", "stream": True}).text)
    assert "".join(item["choices"][0]["text"] for item in found) == "Hello wheel!"
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = events(answer.text)
    assert found[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {item["id"] for item in found} == {answer.headers["x-request-id"]}
    assert found[0]["id"].startswith("chatcmpl-")


def test_ids_differ_between_answers():
    client, _ = server()
    ids = {client.post("/v1/completions", json={"prompt": "a"}).json()["id"] for _ in range(3)}
    assert len(ids) == 3


def test_ignored_fields_are_told_in_a_safe_header():
    client, _ = server()
    body = {"prompt": "a", "user": "x", "evil\r\nset-cookie: a": 1, "é": 2}
    answer = client.post("/v1/completions", json=body)
    assert answer.headers["x-headrace-ignored"] == "user,evil??set-cookie??a,?"
    assert "set-cookie" not in answer.headers
    answer = client.post("/generate", json={"text": "a", "log_metrics": True})
    assert answer.headers["x-headrace-ignored"] == "log_metrics"


def test_native_fields_are_those_of_the_frontend():
    assert set(frontend_native._Body.__struct_fields__) == native.HONORED


def test_large_bodies_are_served():
    client, _ = server(context_length=None)
    body = {"prompt": "a " * 40_000}
    assert client.post("/v1/completions", json=body).json()["error"]["code"] == (
        "context_length_exceeded"
    )


# -- errors -----------------------------------------------------------------------------------


def ending(finish: FinishReason, after: tuple[str, ...] = ()) -> Callable:
    def script(request: GenerateRequest) -> list[Delta]:
        news = [Delta(request.rid, ids=[5], text=text) for text in after]
        return [*news, Delta(request.rid, finish=finish)]

    return script


FULL = FinishReason("abort", message="The request queue is full.", status=503)


@pytest.mark.parametrize(
    ("path", "body", "status", "field", "code"),
    [
        ("/generate", {"text": 5}, 400, "text", None),
        ("/generate", {}, 400, "text", None),
        ("/generate", {"text": "a", "sampling_params": {"top_p": 2}}, 400, "top_p", None),
        ("/generate", {"text": "a", "sampling_params": {"n": 10**12}}, 400, "n", None),
        ("/generate", {"input_ids": [10**6]}, 400, "input_ids", None),
        ("/generate", {"text": "a", "sampling_params": {"regex": 1}}, 400, "regex", None),
        ("/v1/completions", {"prompt": [455]}, 400, "prompt", None),
        ("/v1/completions", {"prompt": "a", "logprobs": 10**6}, 400, "logprobs", None),
        ("/v1/completions", {"prompt": "a", "top_p": -1}, 400, "top_p", None),
        ("/v1/completions", {"prompt": "a", "min_tokens": 99}, 400, "min_tokens", None),
        (
            "/v1/completions",
            {"prompt": "a", "max_tokens": 10**6},
            400,
            "max_tokens",
            "context_length_exceeded",
        ),
        (
            "/v1/completions",
            {"prompt": "a " * 500},
            400,
            "prompt",
            "context_length_exceeded",
        ),
        ("/v1/chat/completions", CHAT | {"top_logprobs": 21}, 400, "top_logprobs", None),
        (
            "/v1/chat/completions",
            CHAT | {"logprobs": True, "top_logprobs": 21},
            400,
            "top_logprobs",
            None,
        ),
        ("/v1/chat/completions", CHAT | {"stop_regex": "("}, 400, "stop_regex", None),
        ("/v1/models/other", None, 404, "model", "model_not_found"),
        ("/nowhere", None, 404, None, None),
        ("/v1/completions", None, 405, None, None),
        ("/flush_cache?timeout=soon", None, 400, "timeout", None),
        ("/flush_cache?timeout=1e9", None, 400, "timeout", None),
        ("/v1/loads?include=all,x", None, 400, "include", None),
        ("/v1/loads?dp_rank=3", None, 404, "dp_rank", None),
        ("/detokenize", {"tokens": [10**6]}, 400, "tokens", None),
        ("/tokenize", {}, 400, "prompt", None),
        ("/abort_request", {"rid": 5}, 400, "rid", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_error_has_one_shape(path, body, status, field, code, stream):
    client, manager = refusing()
    if body is None:
        answer = client.get(path)
    else:
        answer = client.post(path, json=body | {"stream": stream})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert (error["param"], error["code"]) == (field, code)
    if field and status == 400:
        assert field in error["message"] or "The input (502 tokens)" in error["message"]
    assert manager.seen == []


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue_is_503_before_anything_is_streamed(stream):
    client, _ = server(ending(FULL))
    answer = client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert answer.json()["error"]["message"] == "The request queue is full."


@pytest.mark.parametrize("stream", [False, True])
def test_loading_model_is_503(stream):
    client, manager = server()
    manager.limits = None
    manager.ready.clear()
    assert client.post("/generate", json={"text": "a", "stream": stream}).status_code == 503
    assert client.get("/ready").status_code == 503
    assert client.get("/health").status_code == 503
    assert client.get("/health_generate").status_code == 503
    assert client.get("/model_info").status_code == 200


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
def test_error_in_a_stream_is_an_event(path):
    lost = FinishReason("abort", message="The scheduler died.", status=500)
    client, _ = server(ending(lost, after=("Hi",)))
    body = CHAT | {"text": "a", "stream": True}
    if path == "/v1/completions":
        body = {"prompt": "a", "stream": True}
    found = events(client.post(path, json=body).text)
    assert found[-1]["error"]["message"] == "The scheduler died."
    assert "error" not in found[0]


def test_failure_of_one_request_fails_and_aborts_the_batch():
    def script(request: GenerateRequest) -> list[Delta]:
        return [Delta(request.rid, finish=FULL)] if request.rid == "b" else []

    client, manager = server(script)
    answer = client.post("/generate", json={"text": ["x", "y"], "rid": ["a", "b"]})
    assert answer.status_code == 503
    assert [message.rid for message in manager.aborted] == ["a"]


def test_abort_on_demand_is_an_answer():
    client, _ = server(ending(FinishReason("abort", message="Aborted."), after=("Hi",)))
    answer = client.post("/v1/chat/completions", json=CHAT).json()
    assert answer["choices"][0]["finish_reason"] == "abort"
    assert answer["choices"][0]["message"]["content"] == "Hi"
    native_answer = client.post("/generate", json={"text": "a"}).json()
    assert native_answer["meta_info"]["finish_reason"]["type"] == "abort"


def test_texts_of_bugs_stay_inside():
    def script(request: GenerateRequest) -> list[Delta]:
        raise ZeroDivisionError("secret path /root")

    client, _ = server(script)
    answer = client.post("/v1/completions", json={"prompt": "a"})
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "InternalServerError"


def test_bug_in_a_stream_ends_it_with_an_event(monkeypatch):
    client, manager = server(lambda r: [Delta(r.rid, ids=[5], text="Hi")] * 9)
    calls = []

    def broken(delta: Delta) -> None:
        calls.append(delta)
        if len(calls) == 2:
            raise ZeroDivisionError("secret")

    monkeypatch.setattr(sse, "raise_failure", broken)
    answer = client.post("/v1/completions", json={"prompt": "a", "stream": True})
    assert events(answer.text)[-1]["error"]["type"] == "InternalServerError"
    assert "secret" not in answer.text
    assert len(manager.aborted) == 1


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/tokenize", "/abort_request"])
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 999]
)
def test_bodies_that_are_no_json_object(path, raw):
    client, _ = refusing()
    answer = client.post(path, content=raw, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_content_type_must_be_json():
    client, _ = server()
    answer = client.post("/v1/completions", data={"prompt": "a"})
    assert answer.status_code == 400
    assert "application/json" in answer.json()["error"]["message"]
    no_type = client.post("/v1/completions", content=b'{"prompt": "a"}')
    assert no_type.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_bodies_have_a_limit(chunked):
    client, manager = server(max_request_bytes=2000)
    raw = b'{"prompt": "' + b"a" * 4000 + b'"}'
    answer = client.post("/v1/completions", content=iter([raw]) if chunked else raw)
    assert answer.status_code == 413
    assert "2000 bytes" in answer.json()["error"]["message"]
    assert manager.seen == []


# -- access -----------------------------------------------------------------------------------


def test_api_key():
    client, _ = server(api_key="s3cret")
    for path in ("/", "/health", "/health_generate", "/ready", "/metrics"):
        assert client.get(path).status_code == 200, path
    for path in (
        "/v1/models",
        "/server_info",
        "/model_info",
        "/v1/loads",
        "/docs",
        "/openapi.json",
    ):
        assert client.get(path).status_code == 401, path
    for wrong in ("", "s3cret", "Bearer", "Bearer s3cre", "Bearer s3cret ", "Basic s3cret"):
        answer = client.get("/v1/models", headers={"authorization": wrong})
        assert answer.status_code == 401, wrong
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert client.get("/v1/models", headers={"authorization": "Bearer s3cret"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": "bearer s3cret"}).status_code == 200
    odd = client.get("/v1/models", headers={b"authorization": "Bearer é".encode()})
    assert odd.status_code == 401


def test_browsers_may_ask_before_they_call():
    client, _ = server(api_key="s3cret")
    headers = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    answer = client.options("/v1/chat/completions", headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == headers["origin"]
    refused = client.get("/v1/models", headers={"origin": headers["origin"]})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == headers["origin"]


def test_secrets_are_not_shown():
    client, _ = server(api_key="s3cret")
    key = {"authorization": "Bearer s3cret"}
    for path in ("/server_info", "/model_info", "/v1/loads", "/metrics", "/openapi.json"):
        assert "s3cret" not in client.get(path, headers=key).text


# -- vanishing clients ------------------------------------------------------------------------


async def vanish(client: TestClient, path: str, body: dict, when: Callable[[list], bool]) -> list:
    """Call the app as a server does; the client goes away as soon as `when(sent messages)`."""
    sent: list[dict] = []
    gone = asyncio.Event()
    incoming = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> dict:
        if incoming:
            return incoming.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
        "http_version": "1.1",
        "scheme": "http",
        "server": ("test", 80),
        "client": ("test", 1),
        "asgi": {"version": "3.0", "spec_version": "2.3"},
    }
    task = asyncio.ensure_future(client.app(scope, receive, send))
    while not when(sent):
        await asyncio.sleep(0)
    gone.set()
    await asyncio.wait_for(task, 30)
    return sent


def endless(request: GenerateRequest) -> list[Delta]:
    return [Delta(request.rid, ids=[5], text="Hi")]


def silent(request: GenerateRequest) -> list[Delta]:
    return []


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_vanished_client_aborts_its_requests(path, stream):
    client, manager = server(endless if stream else silent)
    body = {"stream": stream, "n": 2, "rid": "r"}
    if path == "/generate":
        body = {"text": ["a", "b"], "stream": stream, "rid": ["r_0", "r_1"]}
    elif path == "/v1/completions":
        body["prompt"] = "a"
    else:
        body |= CHAT
    sent = await vanish(
        client, path, body, lambda sent: len(sent) > 2 if stream else len(manager.seen) == 2
    )
    assert sorted(message.rid for message in manager.aborted) == ["r_0", "r_1"]
    assert manager._flights == {}
    if not stream:
        assert all(message.get("status", 499) == 499 for message in sent)


async def test_client_that_vanishes_before_the_first_event():
    client, manager = server(silent)
    body = {"prompt": "a", "stream": True, "rid": "r"}
    sent = await vanish(client, "/v1/completions", body, lambda sent: bool(manager.seen))
    assert [message.rid for message in manager.aborted] == ["r"]
    assert sent == []


async def test_slow_reader_holds_up_nobody_and_vanishes():
    """A client that reads nothing blocks in `send`; its going ends the request all the same."""
    client, manager = server(endless)
    blocked = asyncio.Event()
    inner = client.app

    async def app(scope, receive, send):
        async def stuck(message):
            await send(message)
            if message["type"] == "http.response.body":
                blocked.set()
                await asyncio.Event().wait()

        await inner(scope, receive, stuck)

    client.app = app
    body = {"prompt": "a", "stream": True, "rid": "r"}
    await vanish(client, "/v1/completions", body, lambda sent: blocked.is_set())
    assert [message.rid for message in manager.aborted] == ["r"]


# -- about the server -------------------------------------------------------------------------


def test_information():
    client, manager = server(random_seed=5)
    assert client.get("/").text == "headrace is running"
    assert client.head("/").status_code == 200
    (card,) = client.get("/v1/models").json()["data"]
    assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 256)
    assert client.get("/v1/models/tiny").json() == card
    info = client.get("/model_info").json()
    assert client.get("/get_model_info").json() == info
    assert (info["model_path"], info["is_generation"]) == ("/m/tiny", True)
    manager.startup = {"load": 0.5}
    found = client.get("/server_info").json()
    assert client.get("/get_server_info").json() == found
    assert (found["random_seed"], found["status"]) == (5, "ready")
    assert (found["max_total_num_tokens"], found["max_req_input_len"]) == (1000, 255)
    assert found["internal_states"][0]["effective_max_running_requests_per_dp"] == 8
    assert found["startup"] == {"load": 0.5}


def test_names_of_models_may_have_slashes():
    client, _ = server(served_model_name="org/tiny")
    assert client.get("/v1/models/org/tiny").json()["id"] == "org/tiny"


def test_loads():
    client, _ = server()
    (load,) = client.get("/v1/loads").json()["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (2, 1)
    assert (load["token_usage"], load["cache_hit_rate"]) == (0.3, 0.25)
    assert load["queues"] == {"waiting": 1}
    (core,) = client.get("/v1/loads?include=core&dp_rank=0").json()["loads"]
    assert "queues" not in core
    lines = client.get("/v1/loads?format=prometheus").text
    assert 'num_running_reqs{dp_rank="0"} 2\n' in lines
    assert client.get("/get_load").json() == [
        {"dp_rank": 0, "num_reqs": 3, "num_waiting_reqs": 1, "num_tokens": STATS.used_tokens}
    ]


def test_metrics():
    client, _ = server()
    client.post("/generate", json={"text": "a"})
    assert 'num_requests_total{model_name="tiny"} 1.0' in client.get("/metrics").text
    off, _ = server(enable_metrics=False)
    assert off.get("/metrics").status_code == 404


def test_health_asks_the_scheduler():
    client, manager = server()
    assert client.get("/health").status_code == 200
    assert manager.seen == []
    assert client.get("/health_generate").status_code == 200
    assert manager.seen[0].rid.startswith("HEALTH_CHECK")
    manager.fail(WorkerLost("The scheduler died."))
    assert client.get("/health").status_code == 503
    assert client.get("/health_generate").status_code == 503


def test_silent_scheduler_is_not_healthy(monkeypatch):
    client, manager = server(silent)
    monkeypatch.setattr("headrace.server.admin.PROBE_SECONDS", 0.05)
    assert client.get("/health_generate").status_code == 503
    assert len(manager.aborted) == 1, "a probe that timed out is not left in the batch"


def test_full_queue_is_busy_not_ill():
    client, _ = server(ending(FULL))
    assert client.get("/health_generate").status_code == 200


def test_flush_cache():
    client, manager = server()
    assert client.post("/flush_cache").text == "Cache flushed.\n"
    manager.flushes = [False]
    assert client.get("/flush_cache").status_code == 400
    manager.flushes = [False, False, True]
    assert client.get("/flush_cache?timeout=5").status_code == 200


def test_abort_request():
    client, manager = server()
    assert client.post("/abort_request", json={"rid": "r"}).status_code == 200
    assert client.post("/abort_request", json={"abort_all": True}).status_code == 200
    assert client.post("/abort_request", json={"rid": ""}).status_code == 200
    first, second = manager.aborted
    assert (first.rid, first.prefix, first.all) == ("r", True, False)
    assert second.all


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_tokenize_and_back(prefix):
    client, manager = server()
    text = "Hello wheel, grüße 🙂"
    answer = client.post(f"{prefix}/tokenize", json={"prompt": text, "model": None}).json()
    ids = manager.tokenizer.encode(text)
    assert answer == {"tokens": ids, "count": len(ids), "max_model_len": 256}
    back = client.post(f"{prefix}/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"text": text}
    many = client.post(f"{prefix}/tokenize", json={"prompt": ["a", text]}).json()
    assert many["count"] == [2, len(ids)]
    assert client.post(f"{prefix}/detokenize", json={"tokens": many["tokens"]}).json() == {
        "text": ["a", text]
    }
    plain = client.post(f"{prefix}/tokenize", json={"prompt": "a", "add_special_tokens": False})
    assert plain.json()["tokens"] == manager.tokenizer.encode("a", False)


def test_tokenize_messages_as_the_chat_does():
    client, manager = server()
    client.post("/v1/chat/completions", json=CHAT)
    tokens = client.post("/tokenize", json=CHAT).json()["tokens"]
    assert len(tokens) * 4 == len(manager.seen[0].ids)


def test_openapi_document_has_the_bodies():
    client, _ = server()
    document = client.get("/openapi.json").json()
    assert all_schemas().keys() <= document["components"]["schemas"].keys()
    body = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    name = body["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    assert "messages" in document["components"]["schemas"][name]["properties"]
