"""Several frontends and detokenizers: who gets what, and that metrics are of all."""

import asyncio

import pytest

from headrace.core.config import Config
from headrace.core.errors import BadRequest
from headrace.core.messages import (
    AbortRequest,
    ControlReply,
    Delta,
    Deltas,
    SchedulerStats,
)
from headrace.core.resolve import check_workers
from headrace.engine.launch import launch, roles
from headrace.frontend import peers
from headrace.frontend.detokenizer import DetokenizerManager
from headrace.frontend.peers import to_values, total
from headrace.frontend.router import ByRequest, MultiTokenizerRouter
from headrace.frontend.tokenizer_manager import TokenizerManager
from headrace.ipc.address import AddressFolder
from headrace.metrics.record import RequestMetrics
from tests.pure.test_scheduler import run, spec
from tests.pure.test_scheduler_properties import Client, make_scheduler
from tests.support.fake_scheduler import LIMITS, config, model_info

STATS = SchedulerStats(running=3)


class Box(list):
    """A sender that keeps what is sent."""

    send = list.append


def test_news_goes_to_who_asked_and_counters_to_all():
    boxes = [Box(), Box(), Box()]
    router = MultiTokenizerRouter(boxes)
    mine, other, more = Delta("a", origin=1), Delta("b", origin=2), Delta("c", origin=1)
    router.send(Deltas([mine, other, more]))
    assert boxes == [[], [Deltas([mine, more])], [Deltas([other])]]
    router.send(Deltas([other], STATS))
    assert [box[-1] for box in boxes] == [
        Deltas([], STATS),
        Deltas([], STATS),
        Deltas([other], STATS),
    ]
    router.send(ControlReply(1, origin=2))
    assert boxes[2][-1] == ControlReply(1, origin=2)


def test_all_news_of_a_request_takes_one_way():
    boxes = [Box(), Box()]
    outlet = ByRequest(boxes)
    for step in range(3):
        outlet.send(Deltas([Delta(str(rid), ids=[step]) for rid in range(20)], STATS))
    assert all(len(box) == 3 for box in boxes)
    for box in boxes:
        assert box[0].items and [d.rid for d in box[0].items] == [d.rid for d in box[2].items]
    seen = [delta.rid for box in boxes for delta in box[0].items]
    assert sorted(map(int, seen)) == list(range(20))
    outlet.send(Deltas([], STATS))
    assert [len(box) for box in boxes] == [4, 3]
    assert all(part.stats == STATS for part in boxes[0]), "the last counters come last"
    assert all(part.stats is None for part in boxes[1])


def test_a_rid_is_unique_among_frontends():
    scheduler = make_scheduler(pages=100)
    client = Client(scheduler)
    scheduler.submit(spec("same", 9, 20, origin=1))
    for _ in range(3):
        scheduler.step()
    scheduler.submit(spec("same", 9, 20, origin=2))
    deltas = [delta for message in scheduler.take() for delta in message.items]
    refused = [delta for delta in deltas if delta.finish is not None]
    assert [(delta.origin, delta.finish.status) for delta in refused] == [(2, 400)]
    scheduler.submit(AbortRequest("same", origin=2))
    assert len(scheduler.planner.running) == 1, "the other's request is not touched"
    scheduler.submit(AbortRequest("sa", prefix=True))
    client.run()
    scheduler.check()
    assert client.finish["same"].type == "abort"
    assert run(scheduler, spec("same", 9, 2, origin=2)).finish["same"].type == "length"


def test_detokenizer_tells_frontends_apart():
    passed = DetokenizerManager(None).advance(Deltas([Delta("a", ids=[1], origin=3)]))
    assert passed.items[0].origin == 3


def test_metrics_add_up():
    parts = []
    for requests in (2, 5):
        metrics = RequestMetrics()
        metrics.requests = requests
        metrics.e2e_latency.observe(0.3, requests)
        parts.append(to_values(metrics))
    found = total(parts)
    assert found.requests == 7 and sum(found.e2e_latency.counts) == 7
    assert found.e2e_latency.sum == pytest.approx(2.1)


async def test_frontends_ask_each_other(tmp_path, monkeypatch):
    folder = AddressFolder(tmp_path)
    options = config(tokenizer_worker_num=2)
    made = [
        TokenizerManager(options, model_info(), None, None, folder.addresses, origin=origin)
        for origin in (1, 2)
    ]
    for origin, manager in enumerate(made, 1):
        await manager.start()
        manager.open(LIMITS)
        manager.metrics.requests = origin
    assert (await made[0].peers.metrics(made[0].metrics)).requests == 3
    assert (await made[1].peers.metrics(made[1].metrics)).requests == 3
    made[0].peers.tell_logging({"log_requests": True, "log_requests_level": 0})
    async with asyncio.timeout(30):
        while not made[1].log.on:
            await asyncio.sleep(0.005)
    monkeypatch.setattr(peers, "_PATIENCE", 0.05)
    await made[1].close()
    made[0].metrics.requests += 1
    assert (await made[0].peers.metrics(made[0].metrics)).requests == 4, "the other's stay"
    await made[0].close()
    folder.remove()


def test_roles_and_refusals():
    serve = Config.from_flat({"tokenizer_worker_num": 2, "detokenizer_worker_num": 2}).serve
    assert roles(serve) == ["scheduler", "detokenizer", "detokenizer-1", "http-1", "http-2"]
    assert roles(Config().serve) == ["scheduler", "detokenizer"]
    with pytest.raises(BadRequest, match="for servers"):
        launch(Config.from_flat({"tokenizer_worker_num": 2}))


def test_a_store_of_one_process_is_refused():
    for name, value in (("enable_response_store", True), ("batch_store", "x.db")):
        check_workers(Config.from_flat({name: value}).serve)
        with pytest.raises(BadRequest, match="tokenizer-worker-num 1"):
            check_workers(Config.from_flat({name: value, "tokenizer_worker_num": 2}).serve)
