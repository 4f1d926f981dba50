"""What a dashboard is told by the scheduler, against the tree and the pool themselves."""

import msgspec
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.outline import OutlineNode, outline, shared_pages
from headrace.cache.radix import RadixCache
from headrace.core.messages import Control, ControlReply
from headrace.scheduler.watch import REMEMBERED, StepLog
from tests.pure.test_scheduler import run, spec
from tests.pure.test_scheduler_properties import Client, make_scheduler


def watch(scheduler, since=0):
    """The answer to "watch", over the wire and back."""
    scheduler.submit(Control(1, "watch", {"since": since}))
    (reply,) = [m for m in scheduler.take() if isinstance(m, ControlReply)]
    return msgspec.msgpack.decode(msgspec.msgpack.encode(reply), type=ControlReply).data


def steps_of(data):
    return [dict(zip(data["fields"], step, strict=True)) for step in data["steps"]]


def test_steps_say_what_they_were_made_of():
    scheduler = make_scheduler(page_size=4, pages=100, chunked_prefill_size=16)
    run(scheduler, spec("a", 30, 5))
    steps = steps_of(watch(scheduler))
    assert [(s["prefill"], s["decode"], s["cached"]) for s in steps[:3]] == [
        (16, 0, 0), (14, 0, 0), (0, 1, 0),
    ]  # fmt: skip
    assert [s["at"] for s in steps] == sorted(s["at"] for s in steps)
    last = steps[-1]["step"]
    assert watch(scheduler, since=last)["steps"] == []
    run(scheduler, spec("b", 30, 5))
    fresh = steps_of(watch(scheduler, since=last))
    assert (fresh[0]["step"], fresh[0]["cached"]) == (last + 1, 28)


def test_steps_in_flight_are_not_told_yet():
    log = StepLog()
    for number in range(1, REMEMBERED + 11):
        log.launched(number, number * 0.5, 1, 2, 3)
    log.ended(1, 0.25)
    steps = log.since(0, 1)
    assert len(steps) == REMEMBERED - 1
    assert steps[-1] == [REMEMBERED + 9, (REMEMBERED + 9) * 0.5, 0.25, 1, 2, 3]


def test_pages_and_tree_while_requests_share_a_prefix():
    scheduler = make_scheduler(page_size=4, pages=100, chunked_prefill_size=512)
    prompt = list(range(40))
    client = Client(scheduler)
    for rid in range(3):
        scheduler.submit(spec(str(rid), [*prompt, *[rid] * 8], 20))
    for _ in range(9):
        scheduler.step()
    data = watch(scheduler)
    pages = data["pages"]
    assert pages["shared"] == 10
    assert pages["free"] + pages["unused"] + pages["locked"] + pages["private"] == pages["total"]
    root, *leaves = [OutlineNode(*node) for node in data["tree"]]
    assert (root.parent, root.tokens, root.locks, root.ids) == (-1, 40, 3, prompt[:12])
    assert [(leaf.parent, leaf.tokens, leaf.locks) for leaf in leaves] == [(0, 8, 1)] * 3
    client.run()
    pages = watch(scheduler)["pages"]
    assert pages["shared"] == pages["locked"] == pages["private"] == 0 < pages["unused"]


def test_without_a_prefix_cache_there_is_no_tree():
    scheduler = make_scheduler(radix=False)
    run(scheduler, spec("a", 20))
    data = watch(scheduler)
    assert data["tree"] == [] and data["pages"]["free"] == data["pages"]["total"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=20),
    st.integers(1, 30),
    st.sets(st.integers(0, 19)),
)
def test_outline_is_a_true_part_of_the_tree(prompts, limit, locked):
    """Parents come first, nothing in use is left out for something unused, counts add up."""
    cache, pages = RadixCache(1), iter(range(1 << 20))
    for index, prompt in enumerate(prompts):
        tokens = np.array(prompt, np.int32)
        found = cache.insert("", tokens, [next(pages) for _ in prompt], 0)
        if index in locked:
            cache.lock(found.node)
    everything = list(cache.nodes())
    nodes = outline(cache, limit)
    assert len(nodes) == min(limit, len(everything))
    assert all(node.parent < index for index, node in enumerate(nodes))
    most_used = sorted((node.locks for node in everything), reverse=True)
    assert sorted((node.locks for node in nodes), reverse=True) == most_used[: len(nodes)]
    if len(nodes) == len(everything):
        assert sum(node.tokens for node in nodes) == cache.held
        assert not any(node.hidden for node in nodes)
    assert shared_pages(cache) == sum(len(n.pages) for n in everything if n.locks > 1)


def test_where_a_prompt_left_another_is_told(caplog):
    import dataclasses
    import logging

    from headrace.scheduler.commit import DEFAULT_OUTPUT
    from headrace.scheduler.report import Reporter
    from tests.pure.test_scheduler import run, spec
    from tests.pure.test_scheduler_properties import make_scheduler

    scheduler = make_scheduler(pages=100, page_size=4)
    rules = dataclasses.replace(DEFAULT_OUTPUT, log_cache_divergence=8)
    scheduler.reporter = Reporter(scheduler.planner, scheduler.committer, rules, scheduler.clock)
    prompt = list(range(30))
    with caplog.at_level(logging.INFO):
        run(scheduler, spec("a", prompt))
        assert "diverged" not in caplog.text
        other = [*prompt[:22], 99, *prompt[23:]]
        client = run(scheduler, spec("b", other, timings=True))
        run(scheduler, spec("c", [*prompt[:6], 99, 98, 97]))  # too little in common
        run(scheduler, spec("d", other, namespace="salt"))
    lines = [r.getMessage() for r in caplog.records if "diverged" in r.getMessage()]
    assert lines == ["Cache: the prompt of request b diverged at token 22 of 30 from request a"]
    found = client.last["b"].timeline.diverged
    assert (found.at, found.length, found.rid) == (22, 30, "a")
