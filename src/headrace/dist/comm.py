"""Collectives between the ranks of one group. Tensors only: no Python object crosses a rank.

Every rank must make the same calls in the same order. Does not know models or processes. Ranks that
share memory have faster ones (`dist.shared`).
"""

import socket
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore
from torch.distributed import ProcessGroupGloo

from headrace import ops
from headrace.dist.topology import Cut, Grid, Place, Shard


class Group(Protocol):
    """Ranks that hold parts of the same tensors. Results are equal on all ranks.

    `recordable`: calls are operators, which a recorded model replays.
    """

    rank: int
    size: int
    recordable: bool

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The sum over ranks, as `dtype` if given; `tensor` [tokens, n] may be overwritten."""
        ...

    def all_gather(self, tensor: Tensor, cut: Cut) -> Tensor:
        """[tokens, cut.local] of each rank -> [tokens, cut.full].

        The spans of all ranks' cuts together are the whole dimension, each element once.
        """
        ...


class Link(Protocol):
    """One way from a stage of a pipeline to the next; what is sent comes in this order."""

    def send(self, tensor: Tensor) -> None:
        """[tokens, n]; may wait until the other end has taken what came before."""
        ...

    def receive(self, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What the other end sent next, which must have this shape and dtype; waits for it."""
        ...


class Ways(Protocol):
    """How the ranks of a team reach each other."""

    def group(self, place: Place) -> Group:
        """The ranks of the stage of this rank, which is at `place`."""
        ...

    def link(self, place: Place) -> Link:
        """From the rank at `place` to its successor in the next stage; this rank is one of both."""
        ...


class SoloGroup:
    """A group of one."""

    rank = 0
    size = 1
    recordable = True

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return tensor if dtype in (None, tensor.dtype) else ops.cast(tensor, dtype)

    def all_gather(self, tensor: Tensor, cut: Cut) -> Tensor:
        if cut.local == cut.full:
            return tensor
        spans = tuple((span.target, span.source, span.count) for span in cut.spans)
        return ops.take_part(tensor, spans, cut.full)


class LoneRank:
    """One rank of several whose others are elsewhere: it may load its part, not compute."""

    recordable = False

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        raise RuntimeError("the other ranks are not there")

    def all_gather(self, tensor: Tensor, cut: Cut) -> Tensor:
        raise RuntimeError("the other ranks are not there")


class GlooGroup:
    """Ranks in processes (or threads) on CPUs, over gloo.

    Owns its own process group instead of torch's global one, so that a process can be in several.
    `name` separates groups that share a store. `host` is the local address to bind.
    """

    recordable = False

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

    def all_reduce(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = tensor.contiguous()
        self._gloo.allreduce([tensor]).wait()
        return tensor if dtype is None else tensor.to(dtype)

    def all_gather(self, tensor: Tensor, cut: Cut) -> Tensor:
        whole = tensor.new_zeros(len(tensor), cut.full)
        for span in cut.spans:
            whole[:, span.source : span.source + span.count] = tensor[
                :, span.target : span.target + span.count
            ]
        return self.all_reduce(whole)  # x + 0 is x


class GlooLink:
    """To or from one other rank of a gloo group of its own; tensors of any shape."""

    def __init__(self, group: GlooGroup, peer: int) -> None:
        self._gloo, self._peer = group._gloo, peer

    def send(self, tensor: Tensor) -> None:
        self._gloo.send([tensor.contiguous()], self._peer, 0).wait()

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype)
        self._gloo.recv([tensor], self._peer, 0).wait()
        return tensor


class GlooWays:
    """The `Ways` of the rank at `own` of a grid, through a store that all ranks have.

    Each call waits for the other ranks that it concerns.
    """

    def __init__(self, store: Store, grid: Grid, own: Place, host: str = "127.0.0.1") -> None:
        self._store, self._grid, self._own, self._host = store, grid, own, host

    def group(self, place: Place) -> GlooGroup:
        shard = Shard(place.tp_rank, self._grid.tp)
        return GlooGroup(shard, self._store, f"stage {place.pp_rank}", self._host)

    def link(self, place: Place) -> GlooLink:
        end = 0 if place == self._own else 1
        pair = GlooGroup(Shard(end, 2), self._store, f"from {place.rank}", self._host)
        return GlooLink(pair, 1 - end)


def tcp_store(host: str, port: int, listens: bool, timeout: timedelta) -> TCPStore:
    """Where ranks of several machines find each other; one of them listens, at this address only.

    Raises:
        OSError: it cannot listen there. RuntimeError: nobody listens there within `timeout`.
    """
    if not listens:
        return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timeout)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family)
    return TCPStore(
        host,
        listener.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
        timeout=timeout,
    )


def local_address(host: str, port: int, timeout: float = 60.0) -> str:
    """The address of this machine that reaches a listener."""
    with socket.create_connection((host, port), timeout) as link:
        address: str = link.getsockname()[0]
    return address


def file_store(path: str, ranks: int) -> Store:
    """Where ranks of one machine find each other."""
    return FileStore(path, ranks)
