"""Where the ranks of a team meet: a folder of one machine, or the first of several machines.

    FolderMeeting     unix sockets, and memory that all ranks map
    NetworkMeeting    a store at --dist-init-addr (torch's TCPStore), where ranks leave the
                      addresses of their sockets and find each other for gloo; encrypted messages

Knows no messages. Invariant: over a network nothing is listened to but the address that was asked
for, and local addresses that reach it; without a shared secret, only the loopback address.
"""

import dataclasses
import ipaddress
import json
import logging
import os
import threading
import time
from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn, Protocol

from torch._C._distributed_c10d import Store

from headrace import __version__
from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.core.weight_options import ParallelOptions, host_and_port
from headrace.dist.comm import GlooWays, Ways, file_store, local_address, tcp_store
from headrace.dist.topology import Grid, Place
from headrace.ipc.channels import Key, Receiver, Sender, key_of
from headrace.ops.cpu import LIBRARY

SECRET_VARIABLE = "HEADRACE_DIST_SECRET"

logger = logging.getLogger(__name__)

_BEAT_SECONDS = 1.0
# A rank on another machine that is not heard of for so long is gone.
_SILENT_SECONDS = 30.0


class Meeting(Protocol):
    """How one rank reaches the others."""

    def inbox(self, kind: Any) -> Receiver[Any]:
        """For messages to this rank; made once, before others are looked for."""
        ...

    def outbox(self, rank: int) -> Sender:
        """To another rank; may wait for it."""
        ...

    def make_memory(self, grid: Grid) -> str:
        """What `core.team.Join` says, on rank 0."""
        ...

    def ways(self, memory: str, grid: Grid, place: Place) -> Ways:
        """For tensors; may wait for others."""
        ...

    def watch(self, grid: Grid, place: Place) -> None:
        """From now on end this process when one that it needs on another machine is gone."""
        ...


def meeting_of(config: Config, info: ModelInfo, folder: str, rank: int) -> Meeting:
    """Raises LoadError: the address cannot be had or reached, or has no secret."""
    if config.parallel.nnodes == 1:
        return FolderMeeting(folder, rank)
    return NetworkMeeting(config.parallel, rank, agreement(config, info))


def agreement(config: Config, info: ModelInfo) -> str:
    """A fingerprint of what all machines must have alike."""
    model, cache = config.model, config.cache
    places = dataclasses.replace(config.parallel, node_rank=0, dist_init_addr="", base_gpu_id=0)
    what = [
        __version__,
        info.hf,
        (model.dtype, model.quantization, model.context_length, cache.kv_cache_dtype),
        dataclasses.astuple(places),
        config.schedule.chunked_prefill_size,
    ]
    return sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


class FolderMeeting:
    """All ranks are on this machine."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def inbox(self, kind: Any) -> Receiver[Any]:
        return Receiver(self._address(self._rank), kind)

    def outbox(self, rank: int) -> Sender:
        return Sender(self._address(rank))

    def _address(self, rank: int) -> str:
        return f"ipc://{self._folder}/rank-{rank}"

    @property
    def _store(self) -> str:
        return f"{self._folder}/store"

    def make_memory(self, grid: Grid) -> str:
        """A path that the others can open. It belongs to this process, which keeps it open."""
        if LIBRARY is None:
            Path(self._store).unlink(missing_ok=True)  # of a team before this one
            return ""
        from headrace.dist.shared import make_memory

        return f"/proc/{os.getpid()}/fd/{make_memory(grid)}"

    def ways(self, memory: str, grid: Grid, place: Place) -> Ways:
        """Through memory, or sockets if there is none."""
        if not memory:
            return GlooWays(file_store(self._store, grid.size), grid, place)
        from headrace.dist.shared import SharedMemory

        fd = os.open(memory, os.O_RDWR)
        try:
            return SharedMemory(fd, grid)
        finally:
            os.close(fd)

    def watch(self, grid: Grid, place: Place) -> None:
        """The kernel ends them together."""


class NetworkMeeting:
    """Ranks are on several machines, with the same `agreement` if they fit each other."""

    def __init__(self, parallel: ParallelOptions, rank: int, agreement: str) -> None:
        self._rank, self._where = rank, parallel.dist_init_addr
        self._agreement = agreement
        self._host, self._port = host_and_port(parallel.dist_init_addr)
        self._timeout = timedelta(seconds=parallel.dist_timeout)
        self._key = self._find_key()
        try:
            self._store = tcp_store(self._host, self._port, rank == 0, self._timeout)
            self._own = self._host if rank == 0 else local_address(self._host, self._port)
        except (RuntimeError, OSError) as error:
            raise LoadError(
                f"--dist-init-addr {self._where}: {error}", field="dist_init_addr"
            ) from error

    def _find_key(self) -> Key:
        secret = os.environ.get(SECRET_VARIABLE, "")
        if not secret and not _loopback(self._host):
            raise LoadError(
                f"--dist-init-addr {self._where} is reached from other machines: set "
                f"{SECRET_VARIABLE} to the same text on each of them",
                field="dist_init_addr",
            )
        return key_of(secret)

    def inbox(self, kind: Any) -> Receiver[Any]:
        host = f"[{self._own}]" if ":" in self._own else self._own
        receiver = Receiver[Any](f"tcp://{host}:*", kind, self._key)
        self._store.set(f"inbox {self._rank}", f"{self._agreement} {receiver.address}")
        return receiver

    def outbox(self, rank: int) -> Sender:
        try:
            theirs, _, address = self._store.get(f"inbox {rank}").decode().partition(" ")
        except RuntimeError as error:
            raise LoadError(
                f"rank {rank} did not come to --dist-init-addr {self._where}: {error}",
                field="dist_init_addr",
            ) from error
        if theirs != self._agreement:
            raise LoadError(f"rank {rank} has another model, other options or another version")
        return Sender(address, self._key)

    def make_memory(self, grid: Grid) -> str:
        return ""

    def ways(self, memory: str, grid: Grid, place: Place) -> Ways:
        return GlooWays(self._store, grid, place, self._own)

    def watch(self, grid: Grid, place: Place) -> None:
        """Rank 0 counts the others' signs of life, which they leave in its store."""
        others = [other.rank for other in map(grid.place, range(grid.size)) if other.node]
        # A connection of its own: nobody else's waiting holds it up.
        store = tcp_store(self._host, self._port, False, self._timeout)
        if place.rank == 0:
            threading.Thread(target=self._listen, args=(store, others), daemon=True).start()
        elif place.node:
            threading.Thread(target=self._beat, args=(store,), daemon=True).start()

    def _beat(self, store: Store) -> None:
        try:
            while True:
                store.add(f"beat {self._rank}", 1)
                time.sleep(_BEAT_SECONDS)
        except RuntimeError:
            _end("the machine of rank 0 does not answer any more")

    def _listen(self, store: Store, ranks: list[int]) -> None:
        heard = {rank: (0, time.monotonic()) for rank in ranks}
        while True:
            time.sleep(_BEAT_SECONDS)
            for rank, (before, since) in heard.items():
                count = store.add(f"beat {rank}", 0)
                if count != before:
                    heard[rank] = count, time.monotonic()
                elif time.monotonic() - since > _SILENT_SECONDS:
                    _end(f"rank {rank} was not heard of for {_SILENT_SECONDS:.0f} s")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _end(why: str) -> NoReturn:
    logger.error("%s: this process ends", why)
    os._exit(1)
