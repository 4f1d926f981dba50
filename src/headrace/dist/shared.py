"""Groups and links of ranks on one machine: one piece of memory that all of them map.

    memory   boards, one for each stage    what the ranks of a stage exchange (csrc/kernels)
             pipes, one from each rank to its successor in the next stage

Nothing in it names a process. Invariant: a fresh memory is zero, and all ranks begin with a fresh
one. Needs the native kernels.
"""

import mmap
import os
from ctypes import addressof, c_char

import torch
from torch import Tensor

from headrace.dist.topology import Cut, Grid, Place
from headrace.ops.cpu import collective
from headrace.ops.cpu.collective import LINE, PIPE_BLOCKS, Team

SLOT = BLOCK = 1 << 20
PIPE_BYTES = 2 * LINE + PIPE_BLOCKS * BLOCK


class SharedGroup:
    """The ranks of one stage; `board` is where the board is, in memory that is kept mapped."""

    recordable = True

    def __init__(self, rank: int, size: int, board: int, memory: mmap.mmap) -> None:
        self.rank, self.size = rank, size
        self._memory = memory
        self._team = Team(board, SLOT, rank, size)

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return collective.all_reduce(tensor, self._team, dtype or tensor.dtype)

    def all_gather(self, tensor: Tensor, cut: Cut) -> Tensor:
        spans = tuple((span.source, span.target, span.count) for span in cut.spans)
        return collective.all_gather(tensor, self._team, spans, cut.full)


class SharedLink:
    """One pipe, used from one end."""

    def __init__(self, pipe: int, memory: mmap.mmap) -> None:
        self._pipe, self._memory = pipe, memory

    def send(self, tensor: Tensor) -> None:
        collective.send(tensor, self._pipe, BLOCK)

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        return collective.receive(shape, dtype, self._pipe, BLOCK)


class SharedMemory:
    """The memory of a team in this process. `fd` is a file of at least `memory_bytes(grid)`."""

    def __init__(self, fd: int, grid: Grid) -> None:
        self._grid = grid
        self._memory = mmap.mmap(fd, memory_bytes(grid))
        self._address = addressof(c_char.from_buffer(self._memory))

    def group(self, place: Place) -> SharedGroup:
        board = self._address + place.pp_rank * board_bytes(self._grid)
        return SharedGroup(place.tp_rank, self._grid.tp, board, self._memory)

    def link(self, place: Place) -> SharedLink:
        """From this place to its successor."""
        boards = self._grid.pp * board_bytes(self._grid)
        return SharedLink(self._address + boards + place.rank * PIPE_BYTES, self._memory)


def make_memory(grid: Grid) -> int:
    """The descriptor of a fresh memory for a team; it takes room only where it is used."""
    fd = os.memfd_create("headrace")
    os.ftruncate(fd, memory_bytes(grid))
    return fd


def memory_bytes(grid: Grid) -> int:
    return grid.pp * board_bytes(grid) + (grid.pp - 1) * grid.tp * PIPE_BYTES


def board_bytes(grid: Grid) -> int:
    """Of one stage."""
    return grid.tp * (LINE + 2 * SLOT)
