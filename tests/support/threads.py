"""Ranks as threads of one process, over the collectives that real ranks use."""

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from headrace.core.config import Config
from headrace.dist import shared
from headrace.dist.shared import SharedGroup, SharedMemory, make_memory
from headrace.dist.topology import Grid
from headrace.layers.build import Split
from headrace.ops.cpu.collective import LINE
from headrace.runner.seat import seat_in

T = TypeVar("T")


class Part:
    """A model, or a stage of one, whose logits are then nothing."""

    def __init__(self, model: Any) -> None:
        self.forward, self.state_specs = model.forward, model.state_specs
        self.last = model.stage.last
        self._logits = model.logits

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits(hidden) if self.last else hidden[:, :0]


# Added to the counters of a rank that failed, so that nobody waits for it.
_BEYOND = 1 << 30


def run_ranks(size: int, work: Callable[[SharedGroup], T]) -> list[T]:
    """`work(group)` on each rank at once; the results in rank order."""
    return run_grid(Grid(tp=size), lambda group, split: work(group))


def run_grid(grid: Grid, work: Callable[[SharedGroup, Split], T], *, units: int = 0) -> list[T]:
    """`work(group, split)` on each rank of all stages at once; the results in rank order."""
    sizes = {"tp_size": grid.tp, "pp_size": grid.pp, "ep_size": grid.ep}
    config = Config.from_flat({**sizes, "deterministic_tp": units})
    fd = make_memory(grid)
    memory = SharedMemory(fd, grid)

    def one(rank: int) -> T:
        torch.set_num_threads(1)
        seat = seat_in(memory, grid.place(rank), config)
        assert isinstance(seat.group, SharedGroup)
        try:
            return work(seat.group, seat.split)
        except BaseException:
            _release(fd, grid)
            raise

    try:
        with ThreadPoolExecutor(grid.size) as pool:
            return list(pool.map(one, range(grid.size)))
    finally:
        os.close(fd)


def _release(fd: int, grid: Grid) -> None:
    """Let everybody go on, with whatever is there."""
    boards = [shared.board_bytes(grid) * stage for stage in range(grid.pp)]
    lines = [board + rank * LINE for board in boards for rank in range(grid.tp)]
    pipes = range(shared.board_bytes(grid) * grid.pp, shared.memory_bytes(grid), shared.PIPE_BYTES)
    for place in (*lines, *pipes, *(pipe + LINE for pipe in pipes)):
        (count,) = struct.unpack("I", os.pread(fd, 4, place))
        if count < _BEYOND:
            os.pwrite(fd, struct.pack("I", count + _BEYOND), place)
