"""Channels deliver typed messages once and in order; folders of sockets are private and vanish."""

import asyncio
import os
import stat
import threading

import msgspec
import pytest

from headrace.core.messages import (
    AbortRequest,
    Control,
    Delta,
    Deltas,
    FinishReason,
    GenerateRequest,
    Inbound,
    LogprobSpec,
    Outbound,
    SamplingParams,
    SchedulerStats,
    StreamStart,
    TokenLogprobs,
    pack_ids,
)
from headrace.ipc.address import AddressFolder, sweep
from headrace.ipc.channels import Receiver, Sender, key_of

REQUEST = GenerateRequest(
    rid="r1",
    ids=pack_ids([1, 2, 3]),
    sampling=SamplingParams(temperature=0.5, stop=("a", "b"), logit_bias={3: -1.5}, seed=2**63 - 1),
    stream=True,
    logprobs=LogprobSpec(0, 2, (5, 6)),
    namespace="salt",
    group="r1",
    sample_index=2,
    received=1.25,
)
DELTA = Delta(
    "r1",
    ids=[7, 8],
    text="é",
    finish=FinishReason("stop", matched="b"),
    logprobs=TokenLogprobs([7, 8], [-0.5, None], [[(7, -0.5)], None], []),
    start=StreamStart(pack_ids([3]), stop=("a",)),
)


@pytest.fixture
def folder(tmp_path):
    made = AddressFolder(tmp_path)
    yield made
    made.remove()


@pytest.fixture
def channel(folder):
    receiver = Receiver(folder.addresses.scheduler, Inbound | Outbound)
    sender = Sender(folder.addresses.scheduler)
    yield sender, receiver
    sender.close()
    receiver.close()


@pytest.mark.parametrize(
    "message",
    [
        REQUEST,
        AbortRequest("r", prefix=True),
        Control(7, "flush_cache"),
        Deltas([DELTA, Delta("x")], SchedulerStats(running=3, gen_throughput=1.5)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_every_message_arrives_as_it_was(channel, message):
    sender, receiver = channel
    sender.send(message)
    assert receiver.take(5000) == [message]


def test_take_drains_in_order_and_waits_only_for_the_first(channel):
    sender, receiver = channel
    assert receiver.take(0) == []
    sent = [Control(i, "ping") for i in range(500)]
    for message in sent:
        sender.send(message)
    taken = receiver.take(None)
    while len(taken) < len(sent):
        taken += receiver.take(5000)
    assert taken == sent


def test_take_without_timeout_wakes_up_for_a_message(channel):
    sender, receiver = channel
    thread = threading.Timer(0.05, sender.send, [Control(1, "ping")])
    thread.start()
    assert receiver.take(None) == [Control(1, "ping")]
    thread.join()


def test_sender_may_come_before_the_receiver(folder):
    sender = Sender(folder.addresses.tokenizer)
    sender.send(Control(1, "ping"))
    receiver = Receiver(folder.addresses.tokenizer, Inbound)
    assert receiver.take(5000) == [Control(1, "ping")]
    sender.close()
    receiver.close()


async def test_listen_calls_back_on_the_loop(channel):
    sender, receiver = channel
    heard: list = []
    enough = asyncio.Event()

    def handle(messages):
        heard.extend(messages)
        if len(heard) == 300:
            enough.set()

    sender.send(Control(0, "ping"))
    receiver.listen(asyncio.get_running_loop(), handle)
    for i in range(1, 300):
        sender.send(Control(i, "ping"))
        if i % 50 == 0:
            await asyncio.sleep(0.001)
    async with asyncio.timeout(30):
        await enough.wait()
    assert [message.id for message in heard] == list(range(300))


def test_what_is_no_message_is_refused(channel):
    sender, receiver = channel
    for wrong in ({"any": "object"}, ["GenerateRequest", 5], ["Nothing"], "text"):
        sender.send(wrong)
        with pytest.raises(msgspec.ValidationError):
            receiver.take(5000)


def test_folder_is_private_and_goes_away(folder, channel):
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert stat.S_ISSOCK((folder.path / "scheduler").stat().st_mode)
    assert str(os.getpid()) in folder.path.name
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_sweep_takes_only_what_dead_servers_left(tmp_path):
    living = AddressFolder(tmp_path)
    dead = tmp_path / "headrace-4194999-abcd"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "scheduler").touch()
    reused = tmp_path / f"headrace-{os.getpid()}-old"
    reused.mkdir()
    (reused / "lock").touch()
    os.utime(reused, (1, 1))
    in_the_making = tmp_path / f"headrace-{os.getpid()}-new"
    in_the_making.mkdir()
    other = tmp_path / "something-else"
    other.mkdir()
    assert sorted(sweep(tmp_path)) == sorted([dead, reused])
    assert living.path.exists() and in_the_making.exists() and other.exists()
    living.remove()


def test_start_sweeps(tmp_path):
    dead = tmp_path / "headrace-4194999-abcd"
    dead.mkdir()
    (dead / "lock").touch()
    folder = AddressFolder(tmp_path)
    assert not dead.exists()
    folder.remove()


def test_sweep_leaves_links_alone(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "lock").touch()
    base = tmp_path / "base"
    base.mkdir()
    (base / "headrace-4194999-link").symlink_to(outside)
    assert sweep(base) == []
    assert (outside / "lock").exists()


def test_over_a_network_only_those_with_the_key_are_heard():
    """The message of who has another one, or none, is not the one that comes."""
    receiver = Receiver("tcp://127.0.0.1:*", str, key_of("ours"))
    senders = [Sender(receiver.address, key_of("theirs")), Sender(receiver.address)]
    senders += [Sender(receiver.address, key_of("ours"))]
    for index, sender in enumerate(senders):
        sender.send(f"from {index}")
    assert receiver.take(5000) == ["from 2"]
    assert receiver.take(200) == []
    for sender in senders:
        sender.close()
    receiver.close()


def test_socket_paths_fit_a_unix_socket(monkeypatch, tmp_path):
    deep = tmp_path / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    folder = AddressFolder()
    try:
        assert deep not in folder.path.parents
        receiver = Receiver(folder.addresses.detokenizer, Inbound)
        receiver.close()
    finally:
        folder.remove()
