"""The stream meter against streams written with the standard json module."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.bench.stream import Sample, StreamMeter, error_message

TRAP = 'say "completion_tokens":99, "content":"x" \u00e9\u4e16'


def sse(*events: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)


DONE = b"data: [DONE]\n\n"


def native_event(text: str, ids: list[int], count: int, reason: object = None) -> dict[str, object]:
    meta = {"id": "r", "finish_reason": reason, "prompt_tokens": 7, "weight_version": "default"}
    meta |= {"completion_tokens": count, "cached_tokens": 3}
    return {"text": text, "output_ids": ids, "meta_info": meta}


LENGTH = {"type": "length", "length": 3}


def run(native: bool, *reads: tuple[float, bytes], end: float = 9.0) -> Sample:
    meter = StreamMeter(native, keep_text=True)
    for now, data in reads:
        meter.feed(now, data)
    return meter.finish(0.0, end)


CUMULATIVE = [
    native_event(TRAP, [1], 1),
    native_event(TRAP + " b", [1, 2], 2),
    native_event(TRAP + " b c", [1, 2, 3], 3, LENGTH),
]
INCREMENTAL = [
    native_event(TRAP, [1], 1),
    native_event(" b", [2], 2),
    native_event(" c", [3], 3, LENGTH),
]


@pytest.mark.parametrize("events", [CUMULATIVE, INCREMENTAL], ids=["cumulative", "incremental"])
def test_native_stream(events: list[dict[str, object]]) -> None:
    reads = [(1.0, sse(events[0])), (1.5, sse(events[1])), (1.75, sse(events[2]) + DONE)]
    sample = run(True, *reads, end=2.0)
    assert sample.ok, sample.error
    assert (sample.prompt_tokens, sample.output_tokens, sample.cached_tokens) == (7, 3, 3)
    assert (sample.ttft, sample.e2e, sample.tpot) == (1.0, 2.0, 0.375)
    assert sample.itl == sample.gaps == [0.5, 0.25]
    assert sample.chunks == 3 and sample.counted
    assert sample.text == TRAP + " b c"


def test_tokens_of_one_chunk_share_its_gap() -> None:
    first = sse(native_event("a", [1], 1))
    later = sse(native_event("a b c d", [1, 2, 3, 4], 4), native_event("", [], 5, LENGTH))
    sample = run(True, (1.0, first), (3.0, later + DONE))
    assert sample.gaps == [2.0]
    assert sample.itl == [0.5] * 4
    assert sample.tpot == 0.5
    assert sample.chunks == 2


def test_tokens_of_the_first_chunk_are_not_decode_time() -> None:
    first = sse(native_event("a b", [1, 2], 2))
    last = sse(native_event("a b c", [1, 2, 3], 3, LENGTH))
    sample = run(True, (1.0, first), (2.0, last + DONE))
    assert sample.tpot == 1.0
    assert sample.itl == [1.0]


def test_single_chunk_has_no_time_per_token() -> None:
    sample = run(True, (1.0, sse(native_event("a", [1], 1, LENGTH)) + DONE))
    assert sample.ok and sample.tpot is None and sample.itl == []


def chat_event(delta: dict[str, object], reason: str | None = None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {"id": "c", "object": "chat.completion.chunk", "choices": [choice], "usage": None}


def usage_event(output: int) -> dict[str, object]:
    details = {"cached_tokens": 2}
    usage = {"prompt_tokens": 5, "completion_tokens": output, "prompt_tokens_details": details}
    return {"id": "c", "choices": [], "usage": usage}


def test_chat_stream_counts_reasoning_and_no_empty_delta() -> None:
    sample = run(
        False,
        (0.5, sse(chat_event({"role": "assistant", "content": ""}))),
        (1.0, sse(chat_event({"reasoning_content": "hm", "content": None}))),
        (2.0, sse(chat_event({"content": TRAP}))),
        (2.5, sse(chat_event({}, "stop"), usage_event(2)) + DONE),
    )
    assert sample.ok, sample.error
    assert sample.ttft == 1.0
    assert sample.itl == [1.0]
    assert (sample.prompt_tokens, sample.output_tokens, sample.cached_tokens) == (5, 2, 2)
    assert sample.text == "hm" + TRAP


def test_tool_call_deltas_are_output() -> None:
    call = {"index": 0, "function": {"name": "f", "arguments": ""}}
    sample = run(
        False,
        (1.0, sse(chat_event({"content": None, "tool_calls": [call]}))),
        (2.0, sse(chat_event({}, "tool_calls"), usage_event(1)) + DONE),
    )
    assert sample.ok and sample.ttft == 1.0


def completion_event(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}


def test_openai_chunks_with_several_tokens_are_spread_by_usage() -> None:
    sample = run(
        False,
        (1.0, sse(completion_event("a b"))),
        (2.0, sse(completion_event("c d"))),
        (4.0, sse(completion_event("e f"), completion_event("", "length"), usage_event(6)) + DONE),
    )
    assert sample.output_tokens == 6 and sample.chunks == 3
    assert sample.gaps == [1.0, 2.0]
    assert sample.itl == [0.5, 1.0]
    assert sample.tpot == 0.75


def test_missing_usage_is_told() -> None:
    sample = run(False, (1.0, sse(completion_event("a"), completion_event("b", "stop")) + DONE))
    assert sample.ok and sample.output_tokens == 2 and not sample.counted


def test_crlf_comments_and_event_names() -> None:
    data = b": ping\n\n" + sse(completion_event("a", "stop"), usage_event(1)) + DONE
    named = data.replace(b"data: {", b"event: x\ndata: {").replace(b"\n", b"\r\n")
    sample = run(False, (1.0, named))
    assert sample.ok and sample.output_tokens == 1


def test_last_event_without_blank_line() -> None:
    data = sse(completion_event("a", "stop"), usage_event(1)) + b"data: [DONE]"
    assert run(False, (1.0, data)).ok


ERROR = {"error": {"message": "out of pages", "type": "x", "code": 500}}
ABORT = {"type": "abort", "message": "shutting down"}


@pytest.mark.parametrize(
    ("native", "data", "error"),
    [
        (True, sse(native_event("a", [1], 1), ERROR) + DONE, "out of pages"),
        (False, sse(completion_event("a"), ERROR) + DONE, "out of pages"),
        (True, sse(native_event("a", [1], 1, ABORT)) + DONE, "aborted: shutting down"),
        (False, sse(completion_event("a", "abort")) + DONE, "aborted: the server gave no reason"),
        (True, sse(native_event("a", [1], 1)) + DONE, "ended before"),
        (False, sse(completion_event("a", "stop")), "ended before"),
        (True, b'{"text": "not streamed"}', "no server-sent events"),
        (True, b"", "empty body"),
    ],
)
def test_failed_answers(native: bool, data: bytes, error: str) -> None:
    sample = run(native, (1.0, data))
    assert not sample.ok
    assert error in sample.error


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_reads_may_split_anywhere(data: st.DataObject) -> None:
    events = data.draw(st.sampled_from([CUMULATIVE, INCREMENTAL]))
    stream = sse(*events) + DONE
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    bounds = [0, *cuts, len(stream)]
    pieces = (stream[a:b] for a, b in itertools.pairwise(bounds))
    reads = [(float(now), piece) for now, piece in enumerate(pieces)]
    sample = run(True, *reads, end=100.0)
    assert sample.ok, sample.error
    assert sample.output_tokens == 3
    assert sample.text == TRAP + " b c"
    assert sum(sample.gaps) == pytest.approx(sum(sample.itl))
    assert sample.chunks == len(sample.gaps) + 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "too long"}}', "too long"),
        (b'{"object": "error", "message": "bad temperature"}', "bad temperature"),
        (b'{"error": "Unauthorized"}', "Unauthorized"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>no</html>", "<html>no</html>"),
        (b"\xff", "\ufffd"),
    ],
)
def test_error_message(body: bytes, message: str) -> None:
    assert error_message(body) == message
