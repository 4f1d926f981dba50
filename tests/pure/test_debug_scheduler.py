"""/debug/scheduler: pictures in shared memory, whole ones only, at a bounded rate and cost."""

import os
import struct
import threading

import msgspec
import pytest
from starlette.testclient import TestClient

from headrace.core.config import Config
from headrace.engine.snapshots import Snapshots
from headrace.frontend.outlook import Outlook
from headrace.ipc import snapshot
from headrace.ipc.snapshot import SnapshotReader, SnapshotWriter, path_in
from headrace.scheduler import overview
from headrace.server.app import build_app
from tests.pure.test_scheduler import spec
from tests.pure.test_scheduler_properties import Client, make_scheduler
from tests.support.scripted_manager import ScriptedManager


def test_the_newest_whole_picture_is_read(tmp_path):
    path = tmp_path / "s"
    reader = SnapshotReader(path)
    assert reader.read() is None
    writer = SnapshotWriter(path)
    assert reader.read() is None
    for data in (b"one", b"two" * 1000, b"", b"three"):
        assert writer.write(data)
        assert reader.read() == data
    assert not writer.write(bytes(snapshot.SLOT_BYTES + 1)) and reader.read() == b"three"
    again = SnapshotWriter(path)  # the process after a crash
    assert reader.read() == b"three"
    again.write(b"four")
    assert reader.read() == b"four"
    assert os.stat(path).st_mode & 0o777 == 0o600


def test_a_writer_that_died_halfway_leaves_the_picture_before(tmp_path):
    path = tmp_path / "s"
    writer = SnapshotWriter(path)
    writer.write(b"a" * 100)
    writer.write(b"b" * 100)
    at = snapshot._slots()[1]  # where the third would go
    writer._map[at + snapshot._HEADER.size : at + snapshot._HEADER.size + 50] = b"c" * 50
    assert SnapshotReader(path).read() == b"b" * 100
    struct.pack_into("<Q", writer._map, at, 3)
    assert SnapshotReader(path).read() == b"b" * 100


def test_a_reader_never_sees_a_torn_picture(tmp_path):
    writer, reader = SnapshotWriter(tmp_path / "s"), SnapshotReader(tmp_path / "s")
    writer.write(bytes(5000))
    ended = threading.Event()

    def write():
        for i in range(2000):
            writer.write(bytes([i % 256]) * (1000 + i))
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    reads = 0
    while not ended.is_set():
        found = reader.read()
        if found is not None:  # overtaken again and again: no picture rather than a wrong one
            reads += 1
            assert len(set(found)) == 1
    thread.join()
    assert reads and reader.read() == bytes([1999 % 256]) * 2999


def test_an_overview_names_who_runs_and_who_waits():
    scheduler = make_scheduler(rows=2, pages=100, page_size=4)
    client = Client(scheduler)
    assert overview.overview(scheduler)["last_step"] == {}
    for i in range(4):
        scheduler.submit(spec(f"r{i}", [i] * 20, most=30, stream=True))
    for _ in range(9):
        scheduler.step()
    found = overview.overview(scheduler)
    rows = [dict(zip(found["fields"], row, strict=True)) for row in found["running"]]
    assert [row["rid"] for row in rows] == ["r0", "r1"]
    assert (found["running_total"], found["waiting_total"]) == (2, 2)
    for row in rows:
        assert row["prompt"] == 20 and 0 < row["output"] < 30 and row["age"] > row["queued"] > 0
        assert row["pages"] * 4 >= row["computed"] > 20 - 1
    assert [row[0] for row in found["waiting"]] == ["r2", "r3"]
    assert found["inflight"][0]["rows"] == 2 and found["steps"] >= found["last_step"]["step"]
    pages = dict(found["pages"])
    assert pages.pop("size") == 4 and pages.pop("total") == sum(pages.values()) == 100
    assert found["radix"]["namespaces"] == 1 and found["radix"]["prompt_tokens"] == 40
    msgspec.msgpack.encode(found)
    client.run()
    assert overview.overview(scheduler)["running"] == []
    assert overview.overview(make_scheduler(radix=False))["radix"] is None


def test_an_overview_is_bounded():
    scheduler = make_scheduler(rows=1)
    for i in range(3 * overview.MOST):
        scheduler.submit(spec("r" * 200 + str(i), 5))
    scheduler.step()
    found = overview.overview(scheduler)
    assert found["waiting_total"] == 3 * overview.MOST - 1
    assert len(found["waiting"]) == overview.MOST
    assert len(msgspec.msgpack.encode(found)) < snapshot.SLOT_BYTES


class Subject:
    """A scheduler whose pictures are counted."""

    idle, arrivals, pictures = False, 0, 0

    def overview(self):
        self.pictures += 1
        return {"at": 0.0, "fields": [], "running": [], "waiting": []}


def test_pictures_are_taken_at_a_bounded_rate(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("headrace.engine.snapshots.time.monotonic", lambda: now[0])
    subject, snapshots = Subject(), Snapshots(str(tmp_path))
    for _ in range(1000):  # a second of steps of a millisecond
        snapshots.update(subject)
        now[0] += 0.001
    assert 9 <= subject.pictures <= 11
    subject.pictures, subject.arrivals = 0, 1
    for _ in range(50):
        snapshots.update(subject)
        now[0] += 0.001
    assert subject.pictures == 1
    subject.idle = True
    snapshots.update(subject)
    assert subject.pictures == 2
    assert Outlook(str(tmp_path)).look()["process"]["pid"] == os.getpid()


def test_without_room_there_are_no_pictures(tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    subject = Subject()
    Snapshots(str(tmp_path)).update(subject)
    assert subject.pictures == 0 and "No space left" in caplog.text
    assert SnapshotReader(path_in(str(tmp_path))).read() is None


def test_the_route_answers_from_shared_memory(tmp_path):
    config = Config.from_flat({"served_model_name": "tiny", "api_key": "k"})
    manager = ScriptedManager(config)
    manager.outlook = Outlook(str(tmp_path))
    client = TestClient(build_app(manager, config, manager.info), headers={"x-api-key": "k"})
    assert client.get("/debug/scheduler", headers={"x-api-key": ""}).status_code == 401
    assert client.get("/debug/scheduler").status_code == 503
    scheduler = make_scheduler(rows=1)
    scheduler.submit(spec("secret-free", 5))
    scheduler.step()
    Snapshots(str(tmp_path)).update(scheduler)
    found = client.get("/debug/scheduler").json()
    assert found["running"][0]["rid"] == "secret-free" and 0 <= found["age"] < 60
    assert found["process"]["state"][0] in "RSD"
    data = msgspec.msgpack.decode(SnapshotReader(path_in(str(tmp_path))).read())
    SnapshotWriter(path_in(str(tmp_path))).write(msgspec.msgpack.encode({**data, "pid": 2**22 + 1}))
    assert client.get("/debug/scheduler").json()["process"]["state"] == "gone"


@pytest.mark.parametrize("rows", [64])
def test_a_picture_is_cheap(rows):
    import time

    scheduler = make_scheduler(rows=rows, pages=4000, page_size=4, chunked_prefill_size=2000)
    for i in range(2 * rows):
        scheduler.submit(spec(f"request-{i}", [i] * 20, most=30))
    for _ in range(4):
        scheduler.step()
    encode = msgspec.msgpack.Encoder().encode
    best = min(_timed(lambda: encode(overview.overview(scheduler)), time) for _ in range(20))
    assert best < 0.005  # 100 times what it takes on a quiet machine would still be 5 %


def _timed(work, time):
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
