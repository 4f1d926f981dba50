"""Ranks as threads of one process, over the collectives that real ranks use."""

import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from headrace.dist import shared
from headrace.dist.shared import SharedGroup, SharedMemory, make_memory
from headrace.dist.topology import Grid, Shard
from headrace.layers.build import Split, Stage
from headrace.ops.cpu.collective import LINE

T = TypeVar("T")

# Added to the counters of a rank that failed, so that nobody waits for it.
_BEYOND = 1 << 30


def run_ranks(size: int, work: Callable[[SharedGroup], T]) -> list[T]:
    """`work(group)` on each rank at once; the results in rank order."""
    return run_grid(Grid(tp=size), lambda group, split: work(group))


def run_grid(grid: Grid, work: Callable[[SharedGroup, Split], T], *, units: int = 0) -> list[T]:
    """`work(group, split)` on each rank of all stages at once; the results in rank order."""
    fd = make_memory(grid)
    try:
        memory = SharedMemory(fd, grid)

        def one(rank: int) -> T:
            torch.set_num_threads(1)
            place = grid.place(rank)
            before = memory.link(grid.place(rank - grid.tp)) if place.pp_rank else None
            after = memory.link(place) if place.pp_rank < grid.pp - 1 else None
            stage = Stage(Shard(place.pp_rank, grid.pp), before, after)
            try:
                return work(memory.group(place), Split(stage, grid.ep, units))
            except BaseException:
                _release(fd, grid)
                raise

        with ThreadPoolExecutor(grid.size) as pool:
            return [future.result() for future in [pool.submit(one, r) for r in range(grid.size)]]
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
