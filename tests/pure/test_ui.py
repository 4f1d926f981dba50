"""The page's files and its stream of events, in-process."""

import asyncio
import json
import re
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.errors import Overloaded
from headrace.core.messages import Control, ControlReply
from headrace.server import ui
from headrace.server.app import build_app
from tests.support.scripted_manager import STATS, ScriptedManager

STATIC = Path(ui.__file__).parent / "static"
NODE = [-1, 5, 2, 3, 0]


class Watched(ScriptedManager):
    """Also answers "watch": one more step each time."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.asked: list[int] = []

    def _reply(self, message: Control) -> ControlReply:
        if message.verb != "watch":
            return super()._reply(message)
        self.asked.append(message.args["since"])
        steps = [[message.args["since"] + 1, 0.5, 0.1, 7, 2, 1]]
        ids = self.tokenizer.encode("Hello", False)
        stats = {"running": STATS.running}
        data = {"stats": stats, "steps": steps, "tree": [[*NODE, ids]], "pages": {}, "fields": []}
        return ControlReply(message.id, data=data)


@pytest.fixture
def manager():
    return Watched(Config.from_flat({"served_model_name": "tiny"}))


def client(manager: ScriptedManager, **options) -> TestClient:
    config = Config.from_flat({"served_model_name": "tiny"} | options)
    return TestClient(build_app(manager, config, manager.info))


async def heard(watch: ui.Watch, count: int) -> list[dict]:
    """The first events of a watcher, who then leaves."""
    stream = watch.events()
    found = [json.loads((await anext(stream)).removeprefix(b"data: ")) for _ in range(count)]
    await stream.aclose()
    return found


def test_every_file_is_served_with_its_headers(manager):
    web = client(manager)
    for path in STATIC.iterdir():
        answer = web.get(f"/ui/static/{path.name}")
        assert answer.status_code == 200 and answer.content == path.read_bytes()
        assert answer.headers["content-type"].startswith(ui.TYPES[path.suffix[1:]])
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        again = web.get(
            f"/ui/static/{path.name}", headers={"If-None-Match": answer.headers["etag"]}
        )
        assert again.status_code == 304 and again.content == b""
    assert web.get("/ui").content == (STATIC / "index.html").read_bytes()
    assert web.get("/ui/static/none.js").status_code == 404
    assert web.get("/ui/static/..%2fui.py").status_code == 404


def test_the_page_names_only_its_own_files():
    """No outside assets, and no import or link of a file that is not there."""
    for path in STATIC.iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text), path.name
        named = re.findall(r'(?:from "\./|"ui/static/)([\w.]+)"', text)
        assert all((STATIC / name).exists() for name in named), path.name
    ids = re.findall(r' id="([\w-]+)"', (STATIC / "index.html").read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids))


def test_the_wheel_has_the_page():
    root = Path(__file__).parents[2]
    files = WheelBuilder(str(root)).recurse_included_files()
    packed = {Path(file.path).resolve() for file in files}
    assert {path.resolve() for path in STATIC.iterdir()} <= packed


def test_the_page_is_open_and_its_events_are_not(manager):
    web = client(manager, api_key="secret")
    assert web.get("/ui").status_code == web.get("/ui/static/app.js").status_code == 200
    assert web.get("/ui/events").status_code == 401
    assert web.get("/ui/static").status_code == web.get("/ui/other").status_code == 401


def test_events_end_when_the_server_does_not_serve(manager):
    manager.ready.clear()
    answer = client(manager).get("/ui/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    (event,) = answer.text.strip().split("\n\n")
    assert json.loads(event.removeprefix("data: "))["status"] == "starting"


async def test_watchers_share_the_question(manager, monkeypatch):
    monkeypatch.setattr(ui, "SECONDS_BETWEEN", 0.05)
    watch = ui.Watch(manager, "tiny")
    one, two = await asyncio.gather(heard(watch, 4), heard(watch, 4))
    assert one[0] == {"status": "ready", "model": "tiny", "version": one[0]["version"]}
    assert [event["steps"] for event in one[1:]] == [event["steps"] for event in two[1:]]
    assert [event["steps"][0][0] for event in one[1:]] == [1, 2, 3]
    assert manager.asked == [0, 1, 2]
    assert one[1]["tree"] == [[*NODE, "Hello"]] and one[1]["stats"] == {"running": STATS.running}
    assert len(one[1]["ttft"]["counts"]) == len(one[1]["ttft"]["bounds"]) + 1


async def test_nobody_is_asked_when_nobody_watches_and_room_is_bounded(manager, monkeypatch):
    monkeypatch.setattr(ui, "MAX_WATCHERS", 1)
    watch = ui.Watch(manager, "tiny")
    assert manager.asked == []
    stream = watch.events()
    await anext(stream)
    with pytest.raises(Overloaded):
        watch.check_room()
    await stream.aclose()
    watch.check_room()
