"""A tensor-parallel group of threads in one process."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class _Meeting:
    def __init__(self, size: int) -> None:
        self.barrier = threading.Barrier(size, timeout=30)
        self.given: list[Tensor | None] = [None] * size


class ThreadGroup:
    """One rank of a group whose ranks are threads."""

    def __init__(self, rank: int, size: int, meeting: _Meeting) -> None:
        self.rank, self.size, self._meeting = rank, size, meeting

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return torch.stack(self._exchange(tensor)).sum(0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return torch.cat(self._exchange(tensor), dim=-1)

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        meeting = self._meeting
        meeting.given[self.rank] = tensor
        meeting.barrier.wait()
        tensors = [t for t in meeting.given if t is not None]
        meeting.barrier.wait()
        return tensors


def run_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """`work(group)` on each rank at once; the results in rank order."""
    meeting = _Meeting(size)

    def one(rank: int) -> T:
        torch.set_num_threads(1)
        try:
            return work(ThreadGroup(rank, size, meeting))
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
