"""Streams of (name, tensor) from files: mapped, read, read by several threads, prefetched.

`Read` is one tensor that may be read later, in any order, by any thread; what gives reads can be
streamed by `streamed`. Knows no model. Invariant: what is read ahead of its use is bounded.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.loader.files import WeightFiles
from headrace.loader.safetensors import Entry, iterate_tensors, read_header
from headrace.loader.torch_file import iterate_torch_file

Weights = Iterator[tuple[str, Tensor]]

# Read ahead of the tensor in use; a larger tensor is read alone.
_AHEAD_BYTES = 512 << 20
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Read:
    """`get` reads tensor `name`, which has `nbytes`; it may run on any thread."""

    name: str
    nbytes: int
    get: Callable[[], Tensor]


def streamed(reads: Iterable[Read], threads: int = 1) -> Weights:
    """The tensors in the order of `reads`, up to `threads` of them read at a time."""
    if threads <= 1:
        for read in reads:
            yield read.name, read.get()
        return
    pool = ThreadPoolExecutor(threads, thread_name_prefix="weights")
    ahead: deque[tuple[Read, Future[Tensor]]] = deque()
    held = 0
    try:
        for read in reads:
            while ahead and (held + read.nbytes > _AHEAD_BYTES or len(ahead) >= 2 * threads):
                first, future = ahead.popleft()
                held -= first.nbytes
                yield first.name, future.result()
            ahead.append((read, pool.submit(read.get)))
            held += read.nbytes
        while ahead:
            first, future = ahead.popleft()
            yield first.name, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def file_reads(files: WeightFiles) -> Iterator[Read]:
    """The tensors of safetensors files, in file order; nothing is mapped."""
    for path in files.paths:
        for entry in read_header(path):
            if files.wants(entry.name, path):
                yield Read(entry.name, entry.end - entry.begin, _reading(path, entry))


def iterate_weights(files: WeightFiles) -> Weights:
    """Every tensor of a checkpoint once, as views of mapped files, valid until the next one."""
    for path in files.paths:
        tensors = iterate_tensors if path.suffix == ".safetensors" else iterate_torch_file
        for name, tensor in tensors(path):
            if files.wants(name, path):
                yield name, tensor


@contextmanager
def prefetched(paths: Sequence[Path], threads: int) -> Iterator[None]:
    """Inside, threads read `paths` into the page cache, in order."""
    stop, left = threading.Event(), deque(paths)

    def work() -> None:
        buffer = bytearray(_BLOCK)
        while not stop.is_set():
            try:
                path = left.popleft()
            except IndexError:
                return
            with path.open("rb", buffering=0) as file:
                while not stop.is_set() and file.readinto(buffer):
                    pass

    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        for _ in range(min(threads, len(paths))):
            pool.submit(work)
        try:
            yield
        finally:
            stop.set()


def drop_cached(paths: Sequence[Path]) -> None:
    """Give the pages of these files back to the system, where it takes such advice."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def as_tensor(raw: Tensor, entry: Entry) -> Tensor:
    """The bytes `raw` of an entry as its tensor."""
    return raw.view(entry.dtype).view(entry.shape)


def _reading(path: Path, entry: Entry) -> Callable[[], Tensor]:
    return lambda: _read_entry(path, entry)


def _read_entry(path: Path, entry: Entry) -> Tensor:
    raw = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    room, done = raw.numpy().data, 0
    try:
        with path.open("rb", buffering=0) as file:
            while done < len(room):
                count = os.preadv(file.fileno(), [room[done:]], entry.begin + done)
                if count == 0:
                    raise LoadError(f"{path}: tensor {entry.name} was cut off while it was read")
                done += count
    except OSError as error:
        raise LoadError(f"{path}: tensor {entry.name} cannot be read: {error}") from error
    return as_tensor(raw, entry)
