"""The barrier of a team: whoever has not loaded is named. (How teams serve: tests/e2e.)"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.hardware import Hardware
from headrace.core.model_info import read_model_info
from headrace.core.plan import Chunk, ChunkResult, StepPlan, StepResult
from headrace.core.ports import free_port
from headrace.core.resolve import resolve
from headrace.core.weight_options import ParallelOptions
from headrace.dist.topology import Grid
from headrace.runner.meeting import SECRET_VARIABLE, NetworkMeeting
from headrace.runner.team import Team, sampled
from tests.support.checkpoints import make_checkpoint

HARDWARE = Hardware(cores=2, memory_limit=4 << 30, memory_available=4 << 30)


def test_a_rank_that_does_not_load_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    info = read_model_info(tmp_path)
    config, _ = resolve(Config.from_flat({"tp_size": 2, "dist_timeout": 1}), info, HARDWARE)
    with pytest.raises(LoadError, match="rank 1 did not finish loading within 1 s of rank 0"):
        Team(config, info, HARDWARE, str(tmp_path))


@pytest.mark.parametrize("agreements", ["aa", "ab"])
def test_ranks_on_two_machines_meet_if_they_agree(agreements: str) -> None:
    """Over the loopback address, for messages and for sums; ranks as threads, in any order."""
    grid, where = Grid(tp=2, nodes=2), f"127.0.0.1:{free_port('127.0.0.1')}"

    def one(rank: int) -> tuple[list[str], list[float]]:
        torch.set_num_threads(1)
        options = ParallelOptions(tp_size=2, nnodes=2, dist_init_addr=where, dist_timeout=60)
        meeting = NetworkMeeting(options, rank, agreements[rank])
        inbox, outbox = meeting.inbox(str), meeting.outbox(1 - rank)
        outbox.send(f"from {rank}")
        news, place = inbox.take(30_000), grid.place(rank)
        sums = meeting.ways("", grid, place).group(place).all_reduce(torch.tensor([rank + 1.0]))
        inbox.close()
        outbox.close()
        return news, sums.tolist()

    with ThreadPoolExecutor(2) as pool:
        ranks = [pool.submit(one, rank) for rank in (1, 0)]
        if agreements == "ab":
            for rank in ranks:
                with pytest.raises(LoadError, match="has another model, other options or another"):
                    rank.result()
        else:
            assert [rank.result() for rank in ranks] == [(["from 0"], [3.0]), (["from 1"], [3.0])]


def test_other_machines_need_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    options = ParallelOptions(tp_size=2, nnodes=2, dist_init_addr="192.0.2.1:5000")
    with pytest.raises(LoadError, match="set HEADRACE_DIST_SECRET"):
        NetworkMeeting(options, 0, "")
    monkeypatch.setenv(SECRET_VARIABLE, "x")
    with pytest.raises(LoadError, match=r"--dist-init-addr 192\.0\.2\.1:5000: .*assign"):
        NetworkMeeting(options, 0, "")


def test_what_other_stages_learn() -> None:
    """The token after a chunk, and one more for each draft that was right."""
    plan = StepPlan(
        1, [Chunk(3, 0, 7), Chunk(5, 9, 1, draft=(4, 4)), Chunk(6, 0, 2, samples=False)]
    )
    result = StepResult([ChunkResult([11]), ChunkResult([4, 8]), ChunkResult([])])
    assert sampled(plan, result) == [(3, 7, 11), (5, 10, 4), (5, 11, 8)]
