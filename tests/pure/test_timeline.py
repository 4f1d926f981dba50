"""Timelines: what the scheduler marks, stages without gaps, who gets to see them, spans."""

import itertools
import json
import logging

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.messages import AbortRequest, Delta, Deltas, FinishReason, GenerateRequest
from headrace.core.timeline import MAX_CHUNKS, Divergence, Timeline
from headrace.frontend.detokenizer import DetokenizerManager
from headrace.metrics.spans import Seen, Tracer, exporter_for, open_tracer
from headrace.server.app import build_app
from tests.pure.test_scheduler import run, spec
from tests.pure.test_scheduler_properties import Client, make_scheduler
from tests.support.scripted_manager import ScriptedManager

STAGES = ["tokenize", "dispatch", "queue", "prefill", "decode", "detokenize", "deliver", "send"]
WHOLE = Timeline(1.0, 1.5, 1.75, 2.0, 3.0, 7.0, 7.25, 7.5, 8.0, steps=9, model_seconds=4.0)


def test_stages_follow_each_other():
    stages = WHOLE.stages()
    assert [stage.name for stage in stages] == STAGES
    assert all(a.ended == b.began for a, b in itertools.pairwise(stages))
    seconds = WHOLE.seconds()
    assert seconds == dict(
        zip(STAGES, (0.5, 0.25, 0.25, 1.0, 4.0, 0.25, 0.25, 0.5), strict=True), total=7.0
    )


@pytest.mark.parametrize("missing", range(1, 9))
def test_a_stage_that_never_came_takes_no_time(missing):
    """As with an abort in the queue, or an answer without tokens."""
    marks = [1.0 + i for i in range(9)]
    for number in range(missing, 8):
        marks[number] = 0.0
    timeline = Timeline(*marks)
    stages = timeline.stages()
    assert all(a.ended == b.began <= b.ended for a, b in itertools.pairwise(stages))
    assert sum(stage.ended - stage.began for stage in stages) == timeline.seconds()["total"] == 8.0


def test_the_scheduler_marks_what_it_did():
    scheduler = make_scheduler(pages=100, page_size=4)
    client = run(scheduler, spec("a", 40, timings=True), spec("b", [7] * 9))
    assert client.last["b"].timeline is None
    found = client.last["a"].timeline
    assert 0 < found.arrived < found.admitted < found.first_token < found.finished
    assert [(chunk.start, chunk.count) for chunk in found.chunks] == [(0, 16), (16, 16), (32, 8)]
    assert found.chunks[0].ended <= found.chunks[1].ended <= found.first_token
    assert found.steps == 3 + 3
    assert found.retracted == [] and found.diverged is None


def test_an_abort_in_the_queue_has_a_timeline():
    scheduler = make_scheduler(rows=1)
    client = Client(scheduler)
    scheduler.submit(spec("a", 5, most=30))
    scheduler.submit(spec("b", 5, timings=True))
    scheduler.step()
    scheduler.submit(AbortRequest("b"))
    client.run()
    found = client.last["b"].timeline
    assert found.finished and not found.admitted and found.steps == 0
    assert list(found.seconds())[-1] == "total"


def test_a_retraction_is_marked_and_its_work_counted_again():
    scheduler = make_scheduler(pages=12, page_size=4, schedule_conservativeness=0.0)
    names = [str(i) for i in range(4)]
    client = run(scheduler, *(spec(rid, [int(rid)] * 9, 18, timings=True) for rid in names))
    retracted = [rid for rid in names if client.last[rid].retractions]
    assert retracted
    for rid in names:
        found = client.last[rid].timeline
        assert len(found.retracted) == client.last[rid].retractions
        assert sum(chunk.count for chunk in found.chunks) >= 9


def test_a_timeline_is_bounded():
    timeline = Timeline()
    for i in range(2 * MAX_CHUNKS):
        timeline.ran(float(i), 0.5, i, 1, 10**6)
        timeline.retract(float(i))
    assert len(timeline.chunks) == MAX_CHUNKS and len(timeline.retracted) < MAX_CHUNKS
    assert sum(chunk.count for chunk in timeline.chunks) == 2 * MAX_CHUNKS


def test_clients_do_not_learn_where_prompts_part():
    timeline = Timeline(1.0, diverged=Divergence(4038, 6758, "X"))
    assert "4038" not in json.dumps(timeline.to_wire())


# -- who sees it ----------------------------------------------------------------------------------


class TimedManager(ScriptedManager):
    """Gives a timeline with the last delta of each request that asks for one."""

    def answer(self, request: GenerateRequest) -> list[Delta]:
        deltas = super().answer(request)
        if request.timings:
            now = request.received
            found = Timeline(sent=now, arrived=now, admitted=now, first_token=now, finished=now)
            deltas[-1] = Delta(
                *(getattr(deltas[-1], name) for name in Delta.__struct_fields__[:-1]), found
            )
        return deltas


def server(**options):
    config = Config.from_flat({"served_model_name": "tiny", "model_path": "/m/tiny"} | options)
    manager = TimedManager(config)
    return TestClient(build_app(manager, config, manager.info)), manager


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def events(answer):
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_a_client_gets_timings_if_it_asks():
    client, manager = server()
    body = {"text": "Hello", "sampling_params": {"max_new_tokens": 2}}
    plain = client.post("/generate", json=body)
    assert "timings" not in plain.text and not manager.seen[-1].timings
    found = client.post("/generate", json=body | {"return_timings": True}).json()
    timings = found["meta_info"]["timings"]
    stages = [timings[name] for name in STAGES[:-1]]
    assert min(stages) >= 0 and sum(stages) == pytest.approx(timings["total"], abs=1e-5)
    for path, extra in (("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"})):
        asked = extra | {"max_tokens": 2, "return_timings": True}
        answer = client.post(path, json=asked)
        assert answer.json()["choices"][0]["timings"]["total"] > 0
        assert "x-headrace-ignored" not in answer.headers
        *_, last = events(client.post(path, json=asked | {"stream": True}))
        assert last["choices"][0]["timings"].keys() == timings.keys()
    assert manager.observer._open == {}


def test_the_header_asks_on_every_route():
    client, manager = server()
    asks = {"x-headrace-timings": "1"}
    anthropic = CHAT | {"max_tokens": 2, "model": "tiny"}
    for path, body in (
        ("/v1/messages", anthropic),
        ("/api/chat", CHAT | {"model": "tiny", "stream": False}),
        ("/v1/chat/completions", CHAT | {"n": 2}),
    ):
        answer = client.post(path, json=body, headers=asks)
        found = json.loads(answer.headers["x-headrace-timings"])
        found = found if isinstance(found, list) else [found]
        assert len(found) == body.get("n", 1) and all("queue" in one for one in found), path
    answer = client.post("/v1/chat/completions", json=CHAT, headers={"x-headrace-timings": "0"})
    assert "x-headrace-timings" not in answer.headers and "timings" not in answer.text
    assert not manager.seen[-1].timings


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_has_a_line_for_each_request(form, caplog):
    client, manager = server(enable_request_time_stats_logging=True, log_requests_format=form)
    with caplog.at_level(logging.INFO, "headrace.timings"):
        answer = client.post("/generate", json={"text": "a secret", "rid": "r1"})
    assert "timings" not in answer.text  # the client did not ask
    (line,) = [r.getMessage() for r in caplog.records if r.name == "headrace.timings"]
    assert "r1" in line and "secret" not in line and manager.observer._open == {}
    if form == "json":
        assert json.loads(line)["timings"].keys() >= {*STAGES, "total"}
    else:
        assert line.startswith("Req Time Stats(rid=r1, input len=") and "queue_duration=" in line


# -- spans ----------------------------------------------------------------------------------------


def seen(timeline=WHOLE, finish="stop"):
    delta = Delta("r1", finish=FinishReason(finish, message="gone"), prompt_tokens=48)
    return Seen(timeline, GenerateRequest("r1"), delta, "tiny")


def test_spans_are_the_stages_of_the_clients_trace():
    memory = InMemorySpanExporter()
    tracer = Tracer(memory, "svc", batches=False)
    timeline = Timeline(1.0, 1.5, 1.75, 2.0, 3.0, 7.0, 7.25, 7.5, 8.0, retracted=[4.0])
    timeline.ran(2.5, 0.5, 0, 32, 48)
    timeline.ran(3.0, 0.5, 32, 16, 48)
    timeline.diverged = Divergence(16, 48, "other")
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    tracer.trace(seen(timeline), {"traceparent": f"00-{trace_id}-{parent}-01"})
    spans = {span.name: span for span in memory.get_finished_spans()}
    root = spans.pop("llm_request")
    assert f"{root.context.trace_id:032x}" == trace_id and f"{root.parent.span_id:016x}" == parent
    assert root.resource.attributes["service.name"] == "svc"
    assert (root.end_time - root.start_time) == pytest.approx(7e9, abs=10)
    assert root.attributes["gen_ai.usage.prompt_tokens"] == 48
    assert root.attributes["gen_ai.latency.time_to_first_token"] == 2.0
    assert {event.name for event in root.events} == {"retracted", "prefix diverged"}
    assert list(spans) == [*STAGES[:3], "prefill_chunk", *STAGES[3:]]
    assert spans["prefill_chunk"].parent.span_id == spans["prefill"].context.span_id
    assert {spans[name].parent.span_id for name in STAGES} == {root.context.span_id}
    processes = [spans[name].attributes["headrace.process"] for name in STAGES]
    assert processes == ["main"] * 2 + ["scheduler"] * 3 + ["detokenizer"] + ["main"] * 2
    ends = [spans[name].end_time for name in STAGES]
    assert [spans[name].start_time for name in STAGES] == [root.start_time, *ends[:-1]]


def test_an_unsampled_trace_is_not_sent_and_an_abort_is_an_error():
    memory = InMemorySpanExporter()
    tracer = Tracer(memory, "svc", batches=False)
    tracer.trace(seen(), {"traceparent": f"00-{'1' * 32}-{'2' * 16}-00"})
    assert memory.get_finished_spans() == ()
    tracer.trace(seen(finish="abort"), {"traceparent": "garbage"})
    *_, root = memory.get_finished_spans()
    assert not root.status.is_ok and root.status.description == "gone" and root.parent is None


def test_endpoints():
    assert "grpc" in type(exporter_for("localhost:4317")).__module__
    assert ".http." in type(exporter_for("http://localhost:4318/v1/traces")).__module__
    for wrong in ("ftp://x/", "", "http://"):
        with pytest.raises(BadRequest, match="otlp-traces-endpoint"):
            exporter_for(wrong)


def test_without_the_packages_the_start_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    options = Config.from_flat({"enable_trace": True}).observe
    with pytest.raises(BadRequest, match=r"headrace\[otel\]"):
        open_tracer(options)
    assert open_tracer(Config().observe) is None


def test_the_detokenizer_marks_the_end_of_the_text():
    from headrace.scheduler.commit import stream_start
    from headrace.scheduler.request import Request
    from headrace.text.tokenizer import Tokenizer
    from tests.support.tokenizers import byte_level_bpe

    manager = DetokenizerManager(Tokenizer(byte_level_bpe()))
    start = stream_start(Request(spec("a", [5]), 0, 0.0, None))
    delta = Delta("a", [6], finish=FinishReason("length"), start=start, timeline=Timeline(1.0))
    (done,) = manager.advance(Deltas([delta])).items
    assert done.timeline.text_done > 0
