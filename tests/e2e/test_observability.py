"""A server with everything on: spans over OTLP, timings, other names, a stuck scheduler."""

import json
import os
import re
import signal
import threading
import urllib.request
from concurrent import futures
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from tests.support.servers import Server, wait_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """An OTLP collector for HTTP that keeps what it gets."""

    def __init__(self) -> None:
        collector = self
        self.spans = []
        self.services = set()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                data = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    import gzip

                    data = gzip.decompress(data)
                collector.take(ExportTraceServiceRequest.FromString(data))
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            self.services.add(names["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def collector():
    made = Collector()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, collector):
    arguments = (
        "--enable-trace", "--otlp-service-name", "mill", "--metrics-compat", "vllm",
        "--otlp-traces-endpoint", f"http://127.0.0.1:{collector.port}/v1/traces",
        "--enable-request-time-stats-logging", "--log-requests", "--log-requests-level", "1",
        "--log-requests-format", "json", "--chunked-prefill-size", "64",
        "--log-cache-divergence", "32",
    )  # fmt: skip
    environment = {"OTEL_BSP_SCHEDULE_DELAY": "100"}
    base = tmp_path_factory.mktemp("server")
    with Server(base, *arguments, **environment) as running:
        yield running.wait_ready()


def get(server, path):
    with urllib.request.urlopen(server.url + path, timeout=120) as response:
        return response.read().decode()


def test_a_request_leaves_the_spans_of_all_processes(server, collector):
    body = {
        "input_ids": [i % 200 + 5 for i in range(150)],
        "sampling_params": {"max_new_tokens": 8, "ignore_eos": True},
        "rid": "traced",
        "return_timings": True,
    }
    request = urllib.request.Request(
        server.url + "/generate",
        data=json.dumps(body).encode(),
        headers={
            "content-type": "application/json",
            "traceparent": f"00-{TRACE}-{PARENT}-01",
        },
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        timings = json.load(response)["meta_info"]["timings"]
    assert [chunk["tokens"] for chunk in timings["prefill_chunks"]] == [64, 64, 22]

    def ours():
        found = [span for span in collector.spans if span.trace_id.hex() == TRACE]
        return found if any(span.name == "llm_request" for span in found) else None

    spans = wait_for(ours)
    assert collector.services == {"mill"}
    (root,) = [span for span in spans if span.name == "llm_request"]
    assert root.parent_span_id.hex() == PARENT
    attributes = {a.key: a.value for a in root.attributes}
    assert attributes["gen_ai.request.id"].string_value == "traced"
    assert attributes["gen_ai.usage.completion_tokens"].int_value == 8
    assert sum(span.name == "prefill_chunk" for span in spans) == 3
    by_process = {
        attribute.value.string_value
        for span in spans
        for attribute in span.attributes
        if attribute.key == "headrace.process"
    }
    assert by_process == {"main", "scheduler", "detokenizer"}
    for span in spans:
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    length = (root.end_time_unix_nano - root.start_time_unix_nano) / 1e9
    assert timings["total"] <= length < timings["total"] + 10


def test_the_log_tells_the_time_and_no_prompt(server):
    prompt = "The very secret prompt of " + "somebody " * 20
    for rid, end in (("first", "who left it "), ("second", "else entirely ")):
        body = {"text": prompt + 8 * end, "rid": rid, "sampling_params": {"max_new_tokens": 4}}
        with server.post("/generate", body) as response:
            output = json.load(response)["text"]

    def lines():
        found = [json.loads(line) for line in re.findall(r"\{.*\}$", server.text, re.M)]
        mine = [entry for entry in found if entry.get("rid") == "second"]
        return {entry["event"]: entry for entry in mine} if len(mine) == 3 else None

    found = wait_for(lines)
    assert set(found) == {"received", "finished", "timings"}
    assert found["finished"]["timings"]["total"] > 0
    diverged = found["timings"]["timings"]["diverged"]
    assert diverged["from"] == "first" and 32 <= diverged["at"] < diverged["of"]
    assert re.search(r"diverged at token \d+ of \d+ from request first", server.text)
    assert "secret" not in server.text and (not output.strip() or output not in server.text)


def test_metrics_have_both_names(server):
    text = get(server, "/metrics")
    for name in ("headrace_num_running_reqs", "vllm:num_requests_running"):
        assert re.search(rf"^{name}\{{[^}}]*\}} \d", text, re.M), name


def test_debug_scheduler_answers_while_the_scheduler_is_stopped(server):
    (scheduler,) = [p for name, p in server.children().items() if "scheduler" in name]
    body = {
        "text": "Once",
        "rid": "stuck",
        "stream": True,
        "sampling_params": {"max_new_tokens": 400, "ignore_eos": True},
    }
    server.post("/slow_down", {"forward_sleep_time": 0.02}).close()
    with server.post("/generate", body) as response, futures.ThreadPoolExecutor(1) as reader:
        response.readline()
        os.kill(scheduler.pid, signal.SIGSTOP)
        try:
            found = wait_for(
                lambda: (seen := json.loads(get(server, "/debug/scheduler")))["age"] > 0.5 and seen
            )
            assert found["process"]["pid"] == scheduler.pid
            assert found["process"]["state"].startswith("T")
            assert [row["rid"] for row in found["running"]] == ["stuck"]
            assert found["pages"]["private"] > 0 and found["steps"] > 0
        finally:
            os.kill(scheduler.pid, signal.SIGCONT)
        server.post("/slow_down", {"forward_sleep_time": 0}).close()
        reader.submit(response.read).result(60)
    idle = wait_for(lambda: not json.loads(get(server, "/debug/scheduler"))["running"])
    assert idle


def test_spans_go_over_grpc_too(monkeypatch):
    import grpc

    from headrace.core.messages import Delta, GenerateRequest
    from headrace.core.timeline import Timeline
    from headrace.metrics.spans import Seen, Tracer, exporter_for

    monkeypatch.delenv("http_proxy", raising=False)
    got = []

    def export(request, context):
        got.append(request)
        return ExportTraceServiceResponse()

    handler = grpc.method_handlers_generic_handler(
        "opentelemetry.proto.collector.trace.v1.TraceService",
        {
            "Export": grpc.unary_unary_rpc_method_handler(
                export,
                ExportTraceServiceRequest.FromString,
                ExportTraceServiceResponse.SerializeToString,
            )
        },
    )
    service = grpc.server(futures.ThreadPoolExecutor(1), handlers=(handler,))
    port = service.add_insecure_port("127.0.0.1:0")
    service.start()
    try:
        tracer = Tracer(exporter_for(f"127.0.0.1:{port}"), "svc")
        marks = Timeline(1.0, 1.5, 1.75, 2.0, 3.0, 7.0, 7.25, 7.5, 8.0)
        tracer.trace(Seen(marks, GenerateRequest("r"), Delta("r"), "m"), {})
        tracer.close()
    finally:
        service.stop(None)
    names = {
        s.name for r in got for res in r.resource_spans for sc in res.scope_spans for s in sc.spans
    }
    assert "llm_request" in names and "detokenize" in names
