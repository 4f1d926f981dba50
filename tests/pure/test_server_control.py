"""Routes for operators, in front of a real scheduler: status codes, bodies, what they do."""

import asyncio
import json
import logging

import pytest
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.messages import Control, ControlReply, GenerateRequest
from headrace.server.app import build_app
from tests.pure.test_scheduler import run, spec
from tests.pure.test_scheduler_properties import make_scheduler
from tests.support.scripted_manager import ScriptedManager


class ControlledManager(ScriptedManager):
    """Generates by script; control messages go to a scheduler."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.scheduler = make_scheduler(pages=100, max_sessions=config.schedule.max_sessions)

    def _reply(self, message: Control) -> ControlReply:
        self.scheduler.submit(message)
        reply, *counters = self.scheduler.take()
        assert bool(counters) == (message.verb in ("pause", "continue"))
        return reply


def server(**options):
    config = Config.from_flat({"served_model_name": "tiny", "model_path": "/m/tiny"} | options)
    manager = ControlledManager(config)
    app = build_app(manager, config, manager.info)
    return TestClient(app, raise_server_exceptions=False), manager


def error(answer) -> dict:
    assert answer.status_code >= 400
    return answer.json()["error"]


@pytest.fixture(autouse=True)
def log_level():
    root = logging.getLogger()
    before = root.level
    yield
    root.setLevel(before)


def test_pause_and_continue():
    client, manager = server()
    for body, mode in ((None, "abort"), ({"mode": "retract"}, ""), ({"mode": "in_place"}, "")):
        answer = (
            client.post("/pause_generation", json=body)
            if body
            else client.post("/pause_generation")
        )
        assert answer.status_code == 200 and answer.json()["status"] == "ok", mode
        assert manager.scheduler.planner.paused
        assert client.get("/health").status_code == 200
        assert client.get("/health_generate").status_code == 200
        assert manager.seen == []
        answer = client.post("/continue_generation", json={"torch_empty_cache": True})
        assert answer.json()["status"] == "ok"
        assert answer.headers["x-headrace-ignored"] == "torch_empty_cache"
        assert not manager.scheduler.planner.paused
    assert error(client.post("/pause_generation", json={"mode": "stop"}))["param"] == "mode"


def test_sessions_open_and_close():
    client, manager = server(max_sessions=2)
    id = client.post("/open_session", json={"capacity_of_str_len": 1000}).json()
    assert isinstance(id, str) and len(manager.scheduler.sessions) == 1
    body = {"capacity_of_str_len": 10, "session_id": "mine", "timeout": 5.5}
    assert client.post("/open_session", json=body).json() == "mine"
    assert "open already" in error(client.post("/open_session", json=body))["message"]
    assert client.post("/open_session", json={}).status_code == 503
    assert client.post("/close_session", json={"session_id": id}).status_code == 200
    assert client.post("/close_session", json={"session_id": id}).status_code == 400
    assert error(client.post("/open_session", json={"timeout": 0}))["param"] == "timeout"
    assert client.post("/open_session", json={"streaming": True}).status_code == 400
    assert error(client.post("/close_session", json={}))["param"] == "session_id"


def test_generate_in_a_session():
    client, manager = server()
    params = {"id": "s", "rid": "r", "offset": -2, "drop_previous_output": True, "replace": None}
    body = {"input_ids": [1, 2, 3], "session_params": params}
    assert client.post("/generate", json=body).status_code == 200
    sent = manager.seen[-1].session
    assert (sent.id, sent.rid, sent.offset, sent.replace) == ("s", "r", -2, False)
    assert sent.drop_previous_output
    body = {"input_ids": [[1], [2]], "session_params": [{"id": "a"}, None]}
    client.post("/generate", json=body)
    assert [request.session and request.session.id for request in manager.seen[-2:]] == ["a", None]
    for wrong in ({"id": 1}, {"rid": "x"}, {"id": "s", "other": 1}, "s"):
        answer = client.post("/generate", json={"text": "a", "session_params": wrong})
        assert error(answer)["param"].startswith("session_params")
    for other in ({"sampling_params": {"n": 2}}, {"return_prompt_token_ids": True}):
        body = {"text": "a", "session_params": {"id": "s"}, **other}
        assert client.post("/generate", json=body).status_code == 400
    assert client.post("/generate", json={"text": "a", "session_id": "s"}).status_code == 400


def test_profile(tmp_path):
    client, manager = server(profile_dir=str(tmp_path))
    body = {"num_steps": 50, "profile_prefix": "p", "profile_id": "1", "activities": ["CPU"]}
    answer = client.post("/start_profile", json=body)
    assert answer.status_code == 200 and str(tmp_path / "p-1.trace.json") in answer.text
    assert answer.headers["x-headrace-ignored"] == "activities"
    assert "being recorded" in error(client.post("/start_profile"))["message"]
    run(manager.scheduler, spec("a", 5))
    assert client.post("/stop_profile").status_code == 200
    assert json.loads((tmp_path / "p-1.trace.json").read_text())["traceEvents"]
    assert client.post("/stop_profile").status_code == 400
    answer = client.post("/start_profile", json={"output_dir": "/etc"})
    assert error(answer)["param"] == "output_dir"
    assert client.post("/start_profile", json={"profile_id": "../x"}).status_code == 400
    client, _ = server()
    assert "--profile-dir" in error(client.post("/start_profile"))["message"]


def test_configure_logging_logs_requests(caplog):
    client, manager = server()
    caplog.set_level(logging.INFO)
    client.post("/generate", json={"text": "hi"})
    assert not [one for one in caplog.records if one.name == "headrace.requests"]
    body = {"log_requests": True, "log_requests_level": 3, "log_requests_format": "json"}
    assert client.post("/configure_logging", json=body).status_code == 200
    client.post("/generate", json={"text": "hi", "rid": "r", "sampling_params": {"top_k": 3}})
    lines = [one.message for one in caplog.records if one.name == "headrace.requests"]
    came, ended = map(json.loads, lines)
    assert came["event"] == "received" and came["text"] == "hi"
    assert came["sampling_params"]["top_k"] == 3
    assert (ended["rid"], ended["text"]) == ("r", "Hello wheel!")
    assert ended["completion_tokens"] == 4 and ended["finish_reason"]["type"] == "stop"
    client.post("/configure_logging", json={"log_requests_level": 0, "log_requests_format": "text"})
    caplog.clear()
    client.post("/generate", json={"text": "secret"})
    assert "secret" not in caplog.text and "request received" in caplog.text
    client.post("/configure_logging", json={"log_requests": False})
    assert not manager.log.on
    assert client.post("/configure_logging", json={"log_level": "debug"}).status_code == 200
    assert logging.getLogger().level == logging.DEBUG
    assert client.post("/configure_logging", json={"log_level": "loud"}).status_code == 400
    assert client.post("/configure_logging", json={"dump_requests_folder": "/x"}).status_code == 400


async def test_a_refused_request_leaves_the_log_as_it_is():
    config = Config.from_flat({"model_path": "/m/tiny", "log_requests": True})
    manager = ScriptedManager(config, lambda request: [])
    request = GenerateRequest("r", text="hi")
    first = asyncio.create_task(anext(manager.generate(request)))
    while "r" not in manager.log._open:
        await asyncio.sleep(0)
    entry = manager.log._open["r"]
    with pytest.raises(BadRequest, match="in use"):
        await anext(manager.generate(request))
    assert manager.log._open == {"r": entry}
    first.cancel()


def test_slow_down_and_freeze():
    client, manager = server()
    assert client.post("/slow_down", json={"forward_sleep_time": 0.5}).status_code == 200
    assert manager.scheduler.slow_down == 0.5
    assert client.post("/slow_down", json={"forward_sleep_time": None}).status_code == 200
    assert manager.scheduler.slow_down == 0.0
    assert client.post("/slow_down", json={"forward_sleep_time": 60}).status_code == 400
    assert client.post("/freeze_gc").status_code == 200


def test_names_of_other_platforms():
    client, _ = server(api_key="k")
    assert client.get("/ping").status_code == 200
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert client.post("/invocations", json=body).status_code == 401
    answer = client.post("/invocations", json=body, headers={"Authorization": "Bearer k"})
    assert answer.json()["choices"][0]["message"]["content"] == "Hello wheel!"


def test_operators_need_the_key():
    client, _ = server(api_key="k")
    for path in ("pause_generation", "continue_generation", "open_session", "start_profile"):
        assert client.post(f"/{path}").status_code == 401
        assert client.get(f"/{path}").status_code == 401
