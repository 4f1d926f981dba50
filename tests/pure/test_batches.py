"""Files and batches through the official `openai` package, with a scripted model."""

import json
import time

import openai
import pytest

from headrace.core.errors import LoadError
from headrace.core.messages import SchedulerStats
from headrace.server import answers, batches
from headrace.server.batch_db import BatchDb
from headrace.server.batches import read_lines
from headrace.text.parsers.events import Content
from tests.support.api_server import LinesParser, Model, serve
from tests.support.servers import wait_for

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def request(custom_id: str, url: str = CHAT, **body) -> dict:
    if url == CHAT:
        body = {"model": "tiny", "messages": [{"role": "user", "content": custom_id}]} | body
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def lines(*requests: dict) -> bytes:
    return b"".join(json.dumps(item).encode() + b"\n" for item in requests)


class Site:
    """A server with a store, and a client of it."""

    def __init__(self, url: str, model: Model) -> None:
        self.model = model
        self.client = openai.OpenAI(base_url=url + "/v1", api_key="any", max_retries=0)

    def submit(self, content: bytes, endpoint: str = CHAT, **fields):
        file = self.client.files.create(file=("in.jsonl", content), purpose="batch")
        return self.client.batches.create(
            **{"input_file_id": file.id, "endpoint": endpoint, "completion_window": "24h"} | fields
        )

    def ended(self, id: str):
        def look():
            batch = self.client.batches.retrieve(id)
            return batch if batch.status in ENDED else None

        return wait_for(look)

    def results(self, file_id: str) -> dict[str, dict]:
        text = self.client.files.content(file_id).text
        found = [json.loads(line) for line in text.splitlines()]
        return {item["custom_id"]: item for item in found}


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "b.db"
    with serve(model := Model(), batch_store=str(path), batch_concurrency=2) as url:
        site = Site(url, model)
        with site.client:
            yield site


@pytest.fixture
def site(running, monkeypatch):
    monkeypatch.setattr(answers, "parser_for", lambda *_: LinesParser())
    running.model.reset()
    running.model.manager.stats = SchedulerStats()
    running.model.manager.aborted.clear()
    return running


def test_files(site):
    client = site.client
    made = client.files.create(file=("a.jsonl", b"one\n"), purpose="batch")
    assert (made.filename, made.bytes, made.purpose, made.status) == (
        "a.jsonl",
        4,
        "batch",
        "processed",
    )
    brief = client.files.create(
        file=("b.txt", b"two"),
        purpose="user_data",
        expires_after={"anchor": "created_at", "seconds": 3600},
    )
    assert brief.expires_at == brief.created_at + 3600
    assert client.files.content(made.id).content == b"one\n"
    assert [file.id for file in client.files.list()][:2] == [brief.id, made.id]
    assert client.files.list(purpose="batch").data[0].id == made.id
    assert client.files.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(made.id)
    with pytest.raises(openai.BadRequestError, match="multipart"):
        client.post("/files", body={"purpose": "batch"}, cast_to=object)


def test_a_batch_isolates_the_errors_of_its_lines(site):
    content = lines(
        request("good"),
        request("bad", temperature=-1),
        request("streamed", stream=True),
        request("also good"),
    )
    batch = site.submit(content, metadata={"a": "b"})
    assert (batch.object, batch.status, batch.metadata) == ("batch", "validating", {"a": "b"})
    done = site.ended(batch.id)
    assert done.status == "completed"
    assert done.request_counts.to_dict() == {"total": 4, "completed": 2, "failed": 2}
    good, bad = site.results(done.output_file_id), site.results(done.error_file_id)
    assert set(good) == {"good", "also good"}
    body = good["good"]["response"]["body"]
    assert good["good"]["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert bad["bad"]["response"]["status_code"] == 400
    assert "temperature" in bad["bad"]["response"]["body"]["error"]["message"]
    assert "stream" in bad["streamed"]["response"]["body"]["error"]["message"]
    assert site.client.batches.list().data[0].id == batch.id
    with pytest.raises(openai.BadRequestError, match="completed"):
        site.client.batches.cancel(batch.id)


def test_other_endpoints(site):
    site.model.turns = [[Content("Hello")]]
    batch = site.submit(lines(request("r", "/v1/responses", input="hi")), "/v1/responses")
    done = site.ended(batch.id)
    body = site.results(done.output_file_id)["r"]["response"]["body"]
    assert body["output"][0]["content"][0]["text"] == "Hello"
    batch = site.submit(lines(request("c", "/v1/completions", prompt="hi")), "/v1/completions")
    body = site.results(site.ended(batch.id).output_file_id)["c"]["response"]["body"]
    assert body["object"] == "text_completion"


def test_cancel(site):
    site.model.endless = True
    batch = site.submit(lines(*(request(f"r{i}") for i in range(5))))
    wait_for(lambda: len(site.model.requests) == 2)  # no more run at once
    assert site.client.batches.cancel(batch.id).status == "cancelling"
    done = site.ended(batch.id)
    assert done.status == "cancelled"
    errors = site.results(done.error_file_id)
    assert {item["error"]["code"] for item in errors.values()} == {"batch_cancelled"}
    assert len(errors) == 5
    wait_for(lambda: len(site.model.manager.aborted) == 2)
    site.model.endless = False
    assert site.ended(site.submit(lines(request("next"))).id).status == "completed"


def test_lines_wait_for_clients(site, monkeypatch):
    site.model.manager.stats = SchedulerStats(waiting=1)
    batch = site.submit(lines(request("r")))
    wait_for(lambda: site.client.batches.retrieve(batch.id).status == "in_progress")
    time.sleep(0.2)
    assert site.model.requests == []
    site.model.manager.stats = SchedulerStats()
    assert site.ended(batch.id).status == "completed"


def test_a_restart_repeats_only_what_has_no_result(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "parser_for", lambda *_: LinesParser())
    options = {"batch_store": str(tmp_path / "b.db"), "batch_concurrency": 1}
    first, second = Model(), Model()
    answer = first.script

    def stuck_at_the_third(request):
        first.endless = len(first.requests) >= 2
        return answer(request)

    first.script = stuck_at_the_third
    with serve(first, **options) as url:
        first.manager.stats = SchedulerStats()
        site = Site(url, first)
        batch = site.submit(lines(*(request(f"r{i}") for i in range(4))))
        wait_for(lambda: len(first.requests) == 3)
        counts = site.client.batches.retrieve(batch.id).request_counts
        assert (counts.total, counts.completed) == (4, 2)
        site.client.close()
    with serve(second, **options) as url:
        second.manager.stats = SchedulerStats()
        site = Site(url, second)
        done = site.ended(batch.id)
        assert done.status == "completed"
        assert set(site.results(done.output_file_id)) == {"r0", "r1", "r2", "r3"}
        site.client.close()
    assert len(second.requests) == 2


def test_a_late_batch_expires(site, monkeypatch):
    monkeypatch.setattr(batches.time, "time", lambda: 1000.0)  # made long ago
    batch = site.submit(lines(request("a")), completion_window="1m")
    monkeypatch.undo()
    done = site.ended(batch.id)
    assert done.status == "expired"
    assert site.results(done.error_file_id)["a"]["error"]["code"] == "batch_expired"
    assert site.model.requests == []


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "empty_file"),
        (b"{", "invalid_json_line"),
        (b"[]", "invalid_json_line"),
        (lines(request("a"), request("a")), "duplicate_custom_id"),
        (lines(request("a", "/v1/other")), "mismatched_endpoint"),
        (lines(request("a") | {"method": "GET"}), "invalid_method"),
        (lines(request("a") | {"custom_id": 5}), "missing_required_parameter"),
        (lines(request("a") | {"body": 5}), "missing_required_parameter"),
    ],
)
def test_wrong_input_files(content, code):
    with pytest.raises(ExceptionGroup) as caught:
        read_lines(content, CHAT)
    assert caught.value.exceptions[0].value["code"] == code


def test_a_wrong_input_file_fails_its_batch(site):
    done = site.ended(site.submit(b"{\n" + lines(request("a"))).id)
    assert done.status == "failed"
    assert [(error.code, error.line) for error in done.errors.data] == [("invalid_json_line", 1)]


def test_wrong_batches(site):
    for fields, named in (
        ({"endpoint": "/v1/other"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
    ):
        with pytest.raises(openai.BadRequestError, match=named):
            site.submit(lines(request("a")), **fields)
    with pytest.raises(openai.NotFoundError):
        site.client.batches.create(input_file_id="file-x", endpoint=CHAT, completion_window="24h")
    with pytest.raises(openai.NotFoundError):
        site.client.batches.retrieve("batch_x")


def test_without_a_store():
    with serve(Model()) as url, openai.OpenAI(base_url=url + "/v1", api_key="any") as client:
        with pytest.raises(openai.BadRequestError, match="--batch-store"):
            client.files.list()
        with pytest.raises(openai.BadRequestError, match="--batch-store"):
            client.batches.retrieve("b")


def test_files_are_forgotten_when_their_time_is_over(tmp_path):
    now = [100.0]
    db = BatchDb(str(tmp_path / "b.db"), clock=lambda: now[0])
    db.add_file("a", "batch", b"x", 10)
    assert len(db.files(None)) == 1
    now[0] = 110.0
    assert db.files(None) == []
    db.close()


def test_what_is_no_database_is_refused(tmp_path):
    path = tmp_path / "text"
    path.write_text("no database " * 100)
    with pytest.raises(LoadError, match="--batch-store"):
        BatchDb(str(path))
