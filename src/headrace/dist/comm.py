"""Collectives between the ranks of one group. Tensors only: no Python object crosses a rank.

Every rank must make the same calls in the same order. Does not know models or processes.
"""

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import ProcessGroupGloo

from headrace.dist.topology import Shard


class Group(Protocol):
    """Ranks that hold parts of the same tensors. Results are equal on all ranks."""

    rank: int
    size: int

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks; `tensor` may be overwritten."""
        ...

    def all_gather(self, tensor: Tensor) -> Tensor:
        """[..., n] of each rank -> [..., size * n], in rank order."""
        ...


class SoloGroup:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor


class LoneRank:
    """One rank of several whose others are elsewhere: it may load its part, not compute."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise RuntimeError("the other ranks are not there")

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise RuntimeError("the other ranks are not there")


class GlooGroup:
    """Ranks in processes (or threads) on CPUs, over gloo.

    Owns its own process group instead of torch's global one, so that a process can be in several.
    `name` separates groups that share a store. `host` is the local address to bind.
    """

    def __init__(
        self,
        shard: Shard,
        store: Store,
        name: str,
        host: str = "127.0.0.1",
        timeout: timedelta = timedelta(minutes=10),
    ) -> None:
        gloo: Any = ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=host)]
        options._timeout = timeout
        prefixed = PrefixStore(name, store)
        self.rank, self.size = shard.rank, shard.size
        self._gloo = gloo(prefixed, shard.rank, shard.size, options)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        self._gloo.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._gloo.allgather([parts], [tensor]).wait()
        return torch.cat(parts, dim=-1)

    def send(self, tensor: Tensor, to: int) -> None:
        """Give a contiguous tensor to another rank; returns when it is on its way."""
        self._gloo.send([tensor], to, 0).wait()

    def receive(self, tensor: Tensor, source: int) -> None:
        """Fill a contiguous tensor with what `source` sends."""
        self._gloo.recv([tensor], source, 0).wait()
