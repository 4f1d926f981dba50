"""Pauses, sessions and profiles of a real engine."""

import json
import threading
from pathlib import Path

import pytest

from headrace.core.errors import BadRequest, HeadraceError
from headrace.engine.engine import Engine
from tests.pure.test_scheduler_control import check_trace

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    options = {"max_total_tokens": 4096, "detokenizer_worker_num": 2, "log_level": "warning"}
    with Engine(profile_dir=str(folder), **options) as made:
        yield made


STREAMS = [
    GREEDY | {"max_new_tokens": 150},
    {"temperature": 1.0, "seed": 7, "max_new_tokens": 150, "ignore_eos": True},
    {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0.5, "seed": 8, "max_new_tokens": 120},
    {"temperature": 1.0, "seed": 9, "max_new_tokens": 60, "regex": "([a-z]{3} ){30}"},
]


def slow_down(engine, seconds):
    """With slow steps no stream can end before it is paused, however slow the test is."""
    engine._thread.run(engine._manager.control("slow_down", seconds=seconds))


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_changes_no_token(engine, mode):
    def start(sampling, **fields):
        fields |= {"return_logprob": True, "top_logprobs_num": 2}
        return engine.generate("The mill wheel", sampling, **fields)

    alone = [start(sampling) for sampling in STREAMS]
    slow_down(engine, 0.02)
    streams = [start(sampling, stream=True) for sampling in STREAMS]
    begun = [next(stream) for stream in streams]
    engine.pause_generation(mode)
    late: list = []
    thread = threading.Thread(target=lambda: late.append(engine.generate("Hello", GREEDY)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not late
    slow_down(engine, 0.0)
    engine.continue_generation()
    ends = [[first, *stream][-1] for first, stream in zip(begun, streams, strict=True)]
    thread.join()
    assert max(end["meta_info"]["num_retractions"] for end in ends) == (mode == "retract")
    for end, whole in zip(ends, alone, strict=True):
        assert end["output_ids"] == whole["output_ids"] and end["text"] == whole["text"]
        for name in ("output_token_logprobs", "output_top_logprobs", "finish_reason"):
            assert end["meta_info"][name] == whole["meta_info"][name], "bit by bit"
    assert late[0]["output_ids"] == engine.generate("Hello", GREEDY)["output_ids"]


def test_a_pause_may_end_everything(engine):
    slow_down(engine, 0.02)
    stream = engine.generate("The mill wheel", GREEDY | {"max_new_tokens": 400}, stream=True)
    next(stream)
    engine.pause_generation()
    slow_down(engine, 0.0)
    assert [item for item in stream][-1]["meta_info"]["finish_reason"]["type"] == "abort"
    engine.continue_generation()
    assert engine.flush_cache()


def test_a_session_equals_the_whole_prompt(engine):
    id = engine.open_session(1000)
    first = engine.generate("The mill wheel", GREEDY, session_params={"id": id})
    after = first["meta_info"]["id"]
    more = engine.tokenize(" turns", add_special_tokens=False)
    params = {"id": id, "rid": after}
    second = engine.generate(input_ids=more, sampling_params=GREEDY, session_params=params)
    whole = engine.tokenize("The mill wheel") + first["output_ids"] + more
    assert second["meta_info"]["prompt_tokens"] == len(whole)
    assert second["meta_info"]["cached_tokens"] > 0
    plain = engine.generate(input_ids=whole, sampling_params=GREEDY)
    assert second["output_ids"] == plain["output_ids"]
    engine.close_session(id)
    with pytest.raises(HeadraceError, match="no session"):
        engine.generate("x", GREEDY, session_params={"id": id})


def test_a_profile_is_a_trace(engine):
    path = engine.start_profile("run")
    engine.generate(["a", "b"], GREEDY)
    assert engine.stop_profile() == path
    text = Path(path).read_text()
    check_trace(text)
    events = json.loads(text)["traceEvents"]
    assert {"plan", "launch", "run", "commit", "send"} <= {event["name"] for event in events}
    assert any(e["name"] == "run" and e["args"]["decode_requests"] == 2 for e in events)
    with pytest.raises(BadRequest):
        engine.stop_profile()


def test_wrong_arguments_do_no_harm(engine):
    for wrong in (
        lambda: engine.open_session("many"),
        lambda: engine.start_profile(num_steps="all"),
        lambda: engine.pause_generation(None),
    ):
        with pytest.raises(BadRequest):
            wrong()
    assert len(engine.generate("a", GREEDY)["output_ids"]) == 24


def test_a_session_is_filled_not_overfilled(engine):
    id = engine.open_session()
    longest = engine.get_server_info()["max_req_input_len"] + 1
    first = engine.generate(
        input_ids=[20] * (longest - 90), sampling_params=GREEDY, session_params={"id": id}
    )
    params = {"id": id, "rid": first["meta_info"]["id"]}
    fill = GREEDY | {"max_new_tokens": None}
    meta = engine.generate(input_ids=[30, 31], sampling_params=fill, session_params=params)
    assert meta["meta_info"]["prompt_tokens"] == longest - 90 + 24 + 2
    assert meta["meta_info"]["completion_tokens"] == 64
    params["drop_previous_output"] = True
    dropped = engine.generate(input_ids=[30], sampling_params=GREEDY, session_params=params)
    assert dropped["meta_info"]["prompt_tokens"] == longest - 90 + 1
    engine.close_session(id)
