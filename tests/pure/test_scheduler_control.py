"""Pauses, sessions and traces of a scheduler with the runner that knows every token."""

import json

import msgspec
import numpy as np
import pytest

from headrace.core.errors import BadRequest, Overloaded
from headrace.core.messages import AbortRequest, Control, LogprobSpec, SessionParams
from headrace.scheduler import sessions, trace
from headrace.scheduler.control import PAUSE_MODES
from headrace.scheduler.sessions import Sessions
from tests.pure.test_scheduler import run, spec
from tests.pure.test_scheduler_properties import Client, expected, make_scheduler


def ask(scheduler, verb, **args):
    """The reply to a control message; deltas that come with it are left out."""
    scheduler.submit(Control(9, verb, args))
    (reply,) = scheduler._replies
    scheduler._replies = []
    return reply


def in_session(rid, prompt, after="", most=3, **fields):
    return spec(rid, prompt, most, session=SessionParams("s", after, **fields))


def context(scheduler, rid):
    return scheduler.sessions._sessions["s"].nodes[rid].tokens.tolist()


# -- pause ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", PAUSE_MODES)
@pytest.mark.parametrize("overlap", [True, False])
def test_pause_loses_nothing(mode, overlap):
    scheduler = make_scheduler(pages=100, disable_overlap_schedule=not overlap)
    client = Client(scheduler)
    specs = [spec(str(i), [i] * 9, most=12, stream=True) for i in range(4)]
    for item in specs:
        scheduler.submit(item)
    for _ in range(5):
        scheduler.step()
    reply = ask(scheduler, "pause", mode=mode)
    assert reply.ok and reply.data["num_paused_requests"] == (0 if mode == "abort" else 4)
    assert scheduler.reporter.stats().paused == (4 if mode == "in_place" else 0)
    late = spec("late", [7] * 5)
    scheduler.submit(late)
    client.pump()
    seen = {rid: len(out) for rid, out in client.out.items()}
    assert not scheduler.step() and ask(scheduler, "ping").data == {"paused": True}
    client.pump()
    assert {rid: len(out) for rid, out in client.out.items()} == seen
    assert ask(scheduler, "continue").ok and ask(scheduler, "ping").data == {}
    client.run()
    scheduler.check()
    assert client.out["late"] == expected(late)
    for item in specs:
        if mode == "abort":
            assert client.finish[item.rid].message == "Aborted by a pause of the server."
        else:
            assert client.out[item.rid] == expected(item)
            assert client.last[item.rid].retractions == (mode == "retract")


def test_abort_and_flush_during_a_pause():
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    for item in (spec("a", 12, 30), spec("b", 12, 30)):
        scheduler.submit(item)
    for _ in range(4):
        scheduler.step()
    ask(scheduler, "pause", mode="in_place")
    assert "2 requests run" in ask(scheduler, "flush_cache").message
    scheduler.submit(AbortRequest("a"))
    ask(scheduler, "pause", mode="retract")
    assert ask(scheduler, "flush_cache").ok and scheduler.space.cache.held == 0
    assert scheduler.space.pool.free == scheduler.space.pool.count
    ask(scheduler, "continue")
    client.run()
    assert client.finish["a"].type == "abort" and client.out["b"] == expected(spec("b", 12, 30))


def test_unknown_mode_and_slow_down_are_refused():
    scheduler = make_scheduler()
    reply = ask(scheduler, "pause", mode="stop")
    assert not reply.ok and "abort, retract, in_place" in reply.message
    assert not scheduler.planner.paused
    assert "0 to 10 s" in ask(scheduler, "slow_down", seconds=11.0).message
    assert ask(scheduler, "slow_down", seconds=0.001).ok and scheduler.slow_down == 0.001
    run(scheduler, spec("a", 5))
    assert ask(scheduler, "slow_down", seconds=None).ok and scheduler.slow_down == 0.0


def test_arguments_of_the_wrong_type_are_refused():
    scheduler = make_scheduler()
    for verb, args in (
        ("slow_down", {"seconds": "1"}),
        ("open_session", {"capacity": None}),
        ("start_profile", {"folder": "x", "num_steps": 1.5}),
        ("pause", {"mode": 1}),
        ("ping", {"other": 1}),
        ("close_session", {}),
    ):
        reply = ask(scheduler, verb, **args)
        assert not reply.ok and reply.data == {"status": 400}, verb
    assert not scheduler.planner.paused and not scheduler.trace.on


# -- sessions ---------------------------------------------------------------------------------


def test_a_session_goes_on_where_it_was():
    scheduler = make_scheduler(pages=100, page_size=4)
    assert ask(scheduler, "open_session", session_id="s").data == {"session_id": "s"}
    first = run(scheduler, in_session("a", [1, 2, 3, 4, 5]))
    before = [1, 2, 3, 4, 5, *first.out["a"]]
    client = run(scheduler, in_session("b", [6, 7], "a"))
    assert client.out["b"] == expected(spec("b", [*before, 6, 7], 3))
    assert client.last["b"].prompt_tokens == 10
    assert client.last["b"].cached_tokens == 4, "the prefix was kept"
    client = run(scheduler, in_session("c", [6, 8], "a", offset=2))
    assert context(scheduler, "c") == [1, 2, 6, 8, *client.out["c"]]
    client = run(scheduler, in_session("d", [9], "a", offset=-1))
    assert context(scheduler, "d") == [*before[:-1], 9, *client.out["d"]]
    run(scheduler, in_session("e", [9], "a", drop_previous_output=True))
    assert context(scheduler, "e")[:6] == [1, 2, 3, 4, 5, 9]
    run(scheduler, in_session("f", [3]))
    assert context(scheduler, "f")[0] == 3 and len(context(scheduler, "f")) == 4


def test_replace_drops_what_followed():
    scheduler = make_scheduler(pages=100)
    ask(scheduler, "open_session", session_id="s")
    run(scheduler, in_session("a", [1]))
    run(scheduler, in_session("b", [2], "a"))
    run(scheduler, in_session("c", [2], "b"))
    run(scheduler, in_session("d", [4], "a", replace=True))
    nodes = scheduler.sessions._sessions["s"].nodes
    assert set(nodes) == {"a", "d"}
    client = run(scheduler, in_session("e", [4], "c"))
    assert "no request 'c'" in client.finish["e"].message
    run(scheduler, in_session("f", [4], replace=True))
    assert set(nodes) == {"f"}
    assert scheduler.sessions._tokens == len(context(scheduler, "f"))
    ask(scheduler, "close_session", session_id="s")
    assert scheduler.sessions._tokens == 0


def test_replace_ends_what_runs():
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    ask(scheduler, "open_session", session_id="s")
    scheduler.submit(in_session("a", [1, 2], most=40))
    for _ in range(4):
        scheduler.step()
    scheduler.submit(in_session("b", [5], "a"))
    scheduler.submit(in_session("c", [6], "a", replace=True))
    client.run()
    scheduler.check()
    assert "has not ended" in client.finish["b"].message and client.finish["b"].status == 400
    assert client.finish["a"].message == "Replaced by another of its session."
    assert context(scheduler, "c") == [1, 2, *client.out["a"], 6, *client.out["c"]]


def test_sessions_refuse():
    scheduler = make_scheduler(pages=100, max_sessions=1)
    client = run(scheduler, in_session("x", [1]))
    assert "no session 's'" in client.finish["x"].message
    ask(scheduler, "open_session", session_id="s", capacity=6)
    assert "open already" in ask(scheduler, "open_session", session_id="s").message
    full = ask(scheduler, "open_session")
    assert not full.ok and full.data == {"status": 503}
    client = run(scheduler, in_session("a", [1, 2, 3, 4, 5, 6, 7]), in_session("b", [1, 2]))
    assert "capacity_of_str_len" in client.finish["a"].message
    assert client.finish["b"].type == "length"
    client = run(scheduler, in_session("c", [1], "b", offset=9))
    assert "5 tokens came before" in client.finish["c"].message
    client = run(scheduler, in_session("b", [1]))
    assert "in use" in client.finish["b"].message
    assert not ask(scheduler, "close_session", session_id="other").ok


def test_a_failed_request_leaves_no_trace_in_its_session():
    scheduler = make_scheduler(pages=10, page_size=4)
    ask(scheduler, "open_session", session_id="s")
    client = run(scheduler, in_session("a", 39, most=30))
    assert client.finish["a"].status == 400
    assert scheduler.sessions._sessions["s"].nodes == {}


def test_a_refused_replacement_drops_nothing():
    scheduler = make_scheduler(pages=100)
    ask(scheduler, "open_session", session_id="s", capacity=12)
    run(scheduler, in_session("a", [1]), in_session("b", [2]))
    run(scheduler, in_session("c", [2], "a"))
    client = run(scheduler, in_session("d", [4] * 12, "a", replace=True))
    assert "capacity_of_str_len" in client.finish["d"].message
    assert set(scheduler.sessions._sessions["s"].nodes) == {"a", "b", "c"}


def test_another_request_of_one_name_harms_nobody():
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    ask(scheduler, "open_session", session_id="s")
    scheduler.submit(in_session("a", [1, 2], most=9))
    scheduler.step()
    node = scheduler.sessions._sessions["s"].nodes["a"]
    thief = in_session("a", [3])
    scheduler.submit(msgspec.structs.replace(thief, origin=2))
    (delta,) = scheduler.committer.deltas
    assert delta.origin == 2 and "in use" in delta.finish.message
    scheduler.committer.deltas = []
    assert scheduler.sessions._sessions["s"].nodes["a"] is node
    client.run()
    assert context(scheduler, "a") == [1, 2, *client.out["a"]] and len(client.out["a"]) == 9


def test_an_aborted_request_can_be_gone_on_from():
    scheduler = make_scheduler(pages=100, page_size=4)
    client = Client(scheduler)
    ask(scheduler, "open_session", session_id="s")
    scheduler.submit(in_session("a", 9, most=40))
    for _ in range(8):
        scheduler.step()
    scheduler.submit(AbortRequest("a"))
    scheduler.submit(in_session("b", [5], "a"))
    client.run()
    before = [*range(9), *client.out["a"]]
    assert 9 < len(before) < 49 and client.last["b"].cached_tokens >= 8
    assert client.out["b"] == expected(spec("b", [*before, 5], 3))


@pytest.mark.parametrize("reopened", [False, True])
def test_what_runs_survives_the_end_of_its_session(reopened):
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    ask(scheduler, "open_session", session_id="s")
    scheduler.submit(in_session("a", [1, 2], most=9))
    scheduler.step()
    assert ask(scheduler, "close_session", session_id="s").ok
    if reopened:
        ask(scheduler, "open_session", session_id="s")
    client.run()
    assert client.out["a"] == expected(spec("a", [1, 2], 9))
    assert scheduler.sessions._tokens == 0
    assert not reopened or scheduler.sessions._sessions["s"].nodes == {}


def test_a_session_request_may_fill_the_context():
    scheduler = make_scheduler(pages=10, page_size=4)
    ask(scheduler, "open_session", session_id="s")
    run(scheduler, in_session("a", 9, most=6))
    client = run(scheduler, in_session("b", [1], "a", most=39, fill=True))
    assert client.last["b"].prompt_tokens == 16 and len(client.out["b"]) == 24
    client = run(scheduler, in_session("c", [1], "b", most=39, fill=True))
    assert "needs 42 tokens" in client.finish["c"].message


def test_prompt_logprobs_of_a_session_are_of_its_own_prompt():
    scheduler = make_scheduler(pages=100)
    ask(scheduler, "open_session", session_id="s")
    run(scheduler, in_session("a", 9))
    for start, tokens in ((0, [6, 7, 8]), (1, [7, 8])):
        more = in_session(f"b{start}", [6, 7, 8], "a")
        more = msgspec.structs.replace(more, logprobs=LogprobSpec(start=start))
        found = run(scheduler, more).input_logprobs[more.rid]
        assert found.tokens == tokens and len(found.values) == len(tokens)


def test_idle_sessions_are_closed(monkeypatch):
    now = [0.0]
    found = Sessions(2, 10.0, lambda: now[0])
    found.open("a", 0, None)
    found.open("b", 0, 100.0)
    with pytest.raises(Overloaded):
        found.open("c", 0, None)
    now[0] = 50.0
    found.open("c", 0, None)
    assert len(found) == 2
    with pytest.raises(BadRequest, match="no session 'a'"):
        found.close("a")
    monkeypatch.setattr(sessions, "MAX_TOKENS", 3)
    request = spec("r", [1, 2, 3, 4], session=SessionParams("b"))
    with pytest.raises(Overloaded, match="no room"):
        found.extend(request, 100)


# -- traces -----------------------------------------------------------------------------------


def test_a_trace_has_every_step(tmp_path):
    scheduler = make_scheduler(pages=100)
    path = ask(scheduler, "start_profile", folder=str(tmp_path), name="one").data["path"]
    assert not ask(scheduler, "start_profile", folder=str(tmp_path)).ok
    run(scheduler, spec("a", 20, 6), spec("b", np.arange(9).tolist(), 6))
    assert ask(scheduler, "stop_profile").data == {"path": path}
    events = json.loads((tmp_path / "one.trace.json").read_text())["traceEvents"]
    steps = [event for event in events if event["name"] == "run"]
    assert [event["args"]["step"] for event in steps] == list(range(1, len(steps) + 1))
    assert sum(event["args"]["new_requests"] for event in steps) == 2
    assert sum(event["args"]["prefill_tokens"] for event in steps) >= 20
    for name in ("plan", "launch", "commit"):
        assert sum(event["name"] == name for event in events) == len(steps)
    check_trace((tmp_path / "one.trace.json").read_text())
    assert not ask(scheduler, "stop_profile").ok


def check_trace(text: str) -> None:
    """What the Trace Event Format asks of complete, counter and metadata events."""
    events = json.loads(text)["traceEvents"]
    ends: dict[tuple[int, int], float] = {}
    for event in events:
        assert event["ph"] in "XCM" and isinstance(event["name"], str)
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
        if event["ph"] == "M":
            assert event["name"] == "thread_name" and isinstance(event["args"]["name"], str)
    for event in sorted((e for e in events if e["ph"] == "X"), key=lambda e: e["ts"]):
        track = event["pid"], event["tid"]
        assert event["dur"] >= 0 and event["ts"] >= ends.get(track, 0.0) - 1.0, "spans overlap"
        ends[track] = event["ts"] + event["dur"]


def test_a_trace_ends_by_itself(tmp_path, monkeypatch):
    scheduler = make_scheduler(pages=100)
    ask(scheduler, "start_profile", folder=str(tmp_path), name="few", start_step=3, num_steps=2)
    run(scheduler, spec("a", 5, 12))
    events = json.loads((tmp_path / "few.trace.json").read_text())["traceEvents"]
    steps = [event["args"]["step"] for event in events if event["name"] == "run"]
    assert steps[:2] == [3, 4] and len(steps) <= 3
    monkeypatch.setattr(trace, "MAX_EVENTS", 20)
    ask(scheduler, "start_profile", folder=str(tmp_path), name="full")
    run(scheduler, spec("b", 5, 30))
    events = json.loads((tmp_path / "full.trace.json").read_text())["traceEvents"]
    assert len(events) < 40


def test_traces_refuse(tmp_path):
    scheduler = make_scheduler()
    for args in ({"name": "../evil"}, {"name": "a/b"}, {"num_steps": 0}, {"start_step": -1}):
        assert not ask(scheduler, "start_profile", folder=str(tmp_path), **args).ok
    assert not scheduler.trace.on
    (tmp_path / "file").write_text("")
    ask(scheduler, "start_profile", folder=str(tmp_path / "file"), name="x")
    assert "cannot be written" in ask(scheduler, "stop_profile").message
