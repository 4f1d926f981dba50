"""More than there is room for: shares of tenants, ends of patience, full queues, draining."""

from collections import Counter

import msgspec
import pytest

from headrace.core.config import Config
from headrace.core.deadline import deadline
from headrace.core.errors import BadRequest
from headrace.core.messages import Control
from headrace.core.tenant import Tenant, caller
from headrace.frontend.requests import owned
from headrace.server.deadlines import read_seconds
from tests.pure.test_scheduler import spec
from tests.pure.test_scheduler_properties import Client, make_scheduler
from tests.pure.test_security import site


def of(tenant: str, rid: str, prompt=5, most=4, weight=1.0, **fields):
    return spec(rid, prompt, most, tenant=tenant, weight=weight, **fields)


def served(scheduler, client, steps: int) -> Counter:
    """Tokens made for each tenant in so many steps."""
    for _ in range(steps):
        scheduler.step()
        client.pump()
    made = Counter()
    for rid, tokens in client.out.items():
        made[rid.partition(":")[0]] += len(tokens)
    return made


# -- shares -----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_tenants_share_by_weight_whatever_they_ask(policy, weight):
    scheduler = make_scheduler(rows=2, pages=200, schedule_policy=policy)
    client = Client(scheduler)
    for index in range(200):  # ten of the loud one for each of the quiet one
        scheduler.submit(of("loud", f"loud:{index}", most=8))
        if index % 10 == 0:
            for own in range(8):
                scheduler.submit(of("quiet", f"quiet:{index}-{own}", most=8, weight=weight))
    made = served(scheduler, client, 400)
    assert made["loud"] + made["quiet"] > 500
    assert made["quiet"] / made["loud"] == pytest.approx(weight, rel=0.1)


def test_who_was_away_saved_nothing_up():
    scheduler = make_scheduler(rows=1, pages=200)
    client = Client(scheduler)
    for index in range(60):
        scheduler.submit(of("a", f"a:{index}", most=4))
    served(scheduler, client, 150)
    before = served(scheduler, client, 0)["a"]
    for index in range(40):
        scheduler.submit(of("b", f"b:{index}", most=4))
    made = served(scheduler, client, 150)
    assert made["b"] == pytest.approx(made["a"] - before, abs=9)


def test_one_tenant_keeps_the_order_of_arrival():
    scheduler = make_scheduler(rows=1, pages=200)
    client = Client(scheduler)
    for index in range(9):
        scheduler.submit(of("a", f"a:{index}", most=2 + index % 3))
    client.run()
    assert list(client.finish) == [f"a:{index}" for index in range(9)]


def test_urgency_comes_before_shares():
    scheduler = make_scheduler(rows=1, pages=200, enable_priority_scheduling=True)
    client = Client(scheduler)
    for index in range(4):
        scheduler.submit(of("a", f"a:{index}", priority=5))
        scheduler.submit(of("b", f"b:{index}", priority=1))
    client.run()
    assert [rid[0] for rid in client.finish] == list("aaaabbbb")


def test_accounts_are_forgotten():
    scheduler = make_scheduler(rows=2, pages=100)
    client = Client(scheduler)
    for index in range(30):
        scheduler.submit(of(f"t{index}", f"t{index}:0"))
    client.run()
    assert scheduler.planner.queue.shares._accounts == {}
    assert scheduler.planner.queue.tokens == 0


# -- patience ---------------------------------------------------------------------------------


def test_waiting_ends():
    # The clock of these schedulers goes on by a millisecond each time it is read.
    scheduler = make_scheduler(rows=1, pages=200, req_waiting_timeout=0.05)
    client = Client(scheduler)
    for index in range(5):
        scheduler.submit(spec(str(index), 5, 40))
    client.run()
    assert client.finish["0"].type == "length"
    assert [client.finish[rid].status for rid in "1234"] == [503] * 4
    assert "waited more than 0.05 s" in client.finish["4"].message


def test_running_ends_after_its_own_time():
    scheduler = make_scheduler(rows=1, pages=400, req_running_timeout=0.3)
    client = Client(scheduler)
    for index in range(4):
        scheduler.submit(spec(str(index), 5, 20))
    scheduler.submit(spec("long", 5, 1000))
    client.run()
    assert [client.finish[str(index)].type for index in range(4)] == ["length"] * 4
    assert client.finish["long"].status == 503 and 20 < len(client.out["long"]) < 1000


def test_clients_may_be_impatient():
    scheduler = make_scheduler(rows=1, pages=400)
    client = Client(scheduler)
    scheduler.submit(spec("first", 5, 100, within=0.1))
    scheduler.submit(spec("late", 5, 4, first_token_within=0.01))
    scheduler.submit(spec("calm", 5, 4, first_token_within=10.0, within=20.0))
    client.run()
    assert "x-request-timeout" in client.finish["first"].message
    assert "x-ttft-timeout" in client.finish["late"].message
    assert client.finish["calm"].type == "length"
    scheduler.check()


def test_deadlines_come_in_headers():
    client, manager = site()
    headers = {"x-request-timeout": "30", "x-ttft-timeout": "2.5"}
    for path, body in (
        ("/generate", {"text": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        assert client.post(path, json=body, headers=headers).status_code == 200
        assert (manager.seen[-1].within, manager.seen[-1].first_token_within) == (30.0, 2.5)
    client.post("/generate", json={"text": "a"})
    assert manager.seen[-1].within == 0.0
    wrong = client.post("/generate", json={"text": "a"}, headers={"x-ttft-timeout": "soon"})
    assert wrong.status_code == 400 and "x-ttft-timeout" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("value", [b"", b"-1", b"nan", b"inf", b"1e9", b"0", b"\xff"])
def test_wrong_seconds(value):
    with pytest.raises(BadRequest, match="seconds"):
        read_seconds("x-request-timeout", value)


# -- full, and at an end ----------------------------------------------------------------------


def test_a_queue_may_be_bounded_in_tokens():
    scheduler = make_scheduler(rows=1, pages=100, max_queued_tokens=20)
    client = Client(scheduler)
    for index in range(4):
        scheduler.submit(spec(str(index), 10, 8))
        scheduler.step()
    client.pump()
    assert {rid: reason.status for rid, reason in client.finish.items()} == {"3": 503}
    assert "20 prompt tokens (--max-queued-tokens)" in client.finish["3"].message
    client.run()
    scheduler.submit(spec("huge", 60, 8))  # alone it may be longer than the queue
    client.run()
    assert client.finish["huge"].type == "length"


def test_refused_clients_hear_when_to_come_back():
    scheduler = make_scheduler(rows=1, pages=100, max_queued_requests=10)
    client = Client(scheduler)
    for index in range(11):
        scheduler.submit(spec(str(index), 5, 40))
        scheduler.step()
    while len(client.finish) < 4:
        scheduler.step()
        client.pump()
    pace = scheduler.committer.pace
    each = pace.seconds_for(1)
    assert each > 0.0
    for index in range(10):
        scheduler.submit(spec(f"more{index}", 5, 40))
    client.pump()
    refused = [reason for reason in client.finish.values() if reason.status == 503]
    assert refused and all(1.0 <= reason.retry_after <= 300.0 for reason in refused)
    assert pace.seconds_for(4000) == pytest.approx(4000 * each)


def test_drain_finishes_what_is_here():
    scheduler = make_scheduler(rows=1, pages=100)
    client = Client(scheduler)
    scheduler.submit(spec("a", 5, 8))
    scheduler.submit(spec("b", 5, 8))
    scheduler.submit(Control(1, "drain"))
    scheduler.submit(spec("c", 5, 8))
    client.run()
    assert client.finish["a"].type == client.finish["b"].type == "length"
    assert client.finish["c"].status == 503
    scheduler.submit(Control(2, "drain", {"mode": "off"}))
    scheduler.submit(spec("d", 5, 8))
    client.run()
    assert client.finish["d"].type == "length"


def test_drain_over_http():
    client, manager = site()
    assert client.post("/drain", json={"timeout": 0}).json() == {
        "status": "ok",
        "draining": True,
        "left": 0,
    }
    manager.stats = msgspec.structs.replace(manager.stats, draining=1)
    assert client.get("/ready").status_code == 503
    assert client.post("/drain", json={"on": False}).json()["draining"] is False


def test_batches_compete_with_next_to_no_share():
    token = caller.set(Tenant("a", weight=2.0))
    try:
        line = owned(spec("x", 5, tenant="a/batch", weight=0.02), caller.get())
        assert (line.tenant, line.weight) == ("a/batch", 0.02)
        assert owned(spec("y", 5), caller.get()).weight == 2.0
        assert deadline.get().whole == 0.0
    finally:
        caller.reset(token)
    assert Config().schedule.max_queued_requests is None  # a server bounds it, an Engine does not
