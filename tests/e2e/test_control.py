"""Pauses, sessions and profiles of a real engine."""

import json
import threading

import pytest

from headrace.core.errors import BadRequest, HeadraceError
from headrace.engine.engine import Engine

pytestmark = pytest.mark.slow

GREEDY = {"temperature": 0.0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    with Engine(profile_dir=str(folder), max_total_tokens=4096, log_level="warning") as made:
        yield made


@pytest.mark.parametrize("mode", ["retract", "in_place"])
def test_a_pause_changes_no_token(engine, mode):
    long = GREEDY | {"max_new_tokens": 200}
    alone = engine.generate("The mill wheel", long)
    stream = engine.generate("The mill wheel", long, stream=True)
    next(stream)
    engine.pause_generation(mode)
    late: list = []
    thread = threading.Thread(target=lambda: late.append(engine.generate("Hello", GREEDY)))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive() and not late
    engine.continue_generation()
    *_, last = stream
    thread.join(20)
    assert last["output_ids"] == alone["output_ids"]
    assert late[0]["output_ids"] == engine.generate("Hello", GREEDY)["output_ids"]


def test_a_pause_may_end_everything(engine):
    stream = engine.generate("The mill wheel", GREEDY | {"max_new_tokens": 400}, stream=True)
    next(stream)
    engine.pause_generation()
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
    with open(path) as file:
        events = json.load(file)["traceEvents"]
    assert {"plan", "launch", "run", "commit", "send"} <= {event["name"] for event in events}
    assert any(e["name"] == "run" and e["args"]["decode_requests"] == 2 for e in events)
    with pytest.raises(BadRequest):
        engine.stop_profile()
