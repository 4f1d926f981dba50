"""The barrier of a team: whoever has not loaded is named. (How teams serve: tests/e2e.)"""

from pathlib import Path

import pytest

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.hardware import Hardware
from headrace.core.model_info import read_model_info
from headrace.core.plan import Chunk, ChunkResult, StepPlan, StepResult
from headrace.core.resolve import resolve
from headrace.runner.team import Team, sampled
from tests.support.checkpoints import make_checkpoint

HARDWARE = Hardware(cores=2, memory_limit=4 << 30, memory_available=4 << 30)


def test_a_rank_that_does_not_load_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    info = read_model_info(tmp_path)
    config, _ = resolve(Config.from_flat({"tp_size": 2, "dist_timeout": 1}), info, HARDWARE)
    with pytest.raises(LoadError, match="rank 1 did not finish loading within 1 s of rank 0"):
        Team(config, info, HARDWARE, str(tmp_path))


def test_what_other_stages_learn() -> None:
    """The token after a chunk, and one more for each draft that was right."""
    plan = StepPlan(
        1, [Chunk(3, 0, 7), Chunk(5, 9, 1, draft=(4, 4)), Chunk(6, 0, 2, samples=False)]
    )
    result = StepResult([ChunkResult([11]), ChunkResult([4, 8]), ChunkResult([])])
    assert sampled(plan, result) == [(3, 7, 11), (5, 10, 4), (5, 11, 8)]
