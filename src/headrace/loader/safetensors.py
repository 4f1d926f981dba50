"""Reads safetensors files: a bounds-checked header and tensors that are views of the mapped file.

Format: 8 bytes little-endian header size, a JSON object, then the data. Every number in the header
is checked against the file before anything is mapped. The disk works ahead of who takes tensors,
and pages are dropped once a tensor has been consumed, so that reading needs about one of memory.
"""

import ctypes
import json
import math
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headrace.core.errors import LoadError

MAX_HEADER_BYTES = 100_000_000
_MOST_DIMS = 64
_MADV_POPULATE_READ = 22  # Linux 5.14
_AHEAD = 64 << 20  # read ahead of the tensor in use: pages of the file, which Linux may take back
_PIECE, _NEXT = 2 << 20, 16 << 20

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor: bytes begin..end of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> list[Entry]:
    """The tensors of a file, in file order.

    Raises:
        LoadError: not a safetensors file, or its numbers do not add up.
    """
    return _read(path)[0]


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that the writer of a file added; raises LoadError as `read_header`."""
    return _read(path)[1]


def parse_header(
    name: object, size: int, read: Callable[[int, int], bytes]
) -> tuple[list[Entry], dict[str, str]]:
    """The tensors and the metadata of `size` bytes; `read` gives those from begin to end.

    Raises:
        LoadError: not a safetensors file, or its numbers do not add up; names `name`.
    """
    length = int.from_bytes(read(0, 8), "little") if size >= 8 else 0
    if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise LoadError(
            f"{name} is not a safetensors file, or is cut off: its header should have "
            f"{length} bytes, the file has {size}"
        )
    header = _parse(name, read(8, 8 + length))
    metadata = header.pop("__metadata__", None)
    entries = _entries(name, header, 8 + length)
    _check_layout(name, entries, 8 + length, size)
    return entries, metadata if isinstance(metadata, dict) else {}


def iterate_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a file, in file order, as a view of the mapped file.

    Copy from a tensor before taking the next one, and do not write to it.
    """
    entries = read_header(path)
    with path.open("rb") as file:
        # A private mapping is writable, which torch wants of a buffer; nobody writes to it.
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        data.madvise(mmap.MADV_SEQUENTIAL)
        dropped = 0
        with _read_ahead(data, file.fileno()) as wait_for:
            for entry in entries:
                wait_for(entry.end)
                yield entry.name, _view(data, entry)
                keep = entry.end // mmap.PAGESIZE * mmap.PAGESIZE
                if keep > dropped:
                    data.madvise(mmap.MADV_DONTNEED, dropped, keep - dropped)
                    dropped = keep


@contextmanager
def _read_ahead(data: mmap.mmap, fd: int) -> Iterator[Callable[[int], None]]:
    """A thread reads a mapped file, up to `_AHEAD` behind what was waited for.

    Who takes a tensor waits until all of it is there: threads that pack would otherwise fetch it
    page by page from several places at once.
    """
    moved = threading.Condition()
    done, wanted, size = 0, 0, len(data)

    def wait_for(end: int) -> None:
        nonlocal wanted
        with moved:
            wanted = end
            moved.notify()
            moved.wait_for(lambda: done >= end)

    def read() -> None:
        nonlocal done
        for begin in range(0, size, _PIECE):
            with moved:
                while begin > wanted + _AHEAD:
                    moved.wait()
            if wanted > size:
                return
            # On many systems Linux itself asks a disk for little more than what is wanted now.
            os.posix_fadvise(fd, begin + _NEXT, _PIECE, os.POSIX_FADV_WILLNEED)
            populate(data, begin, min(_PIECE, size - begin))
            with moved:
                done = begin + _PIECE
                moved.notify()

    def work() -> None:
        nonlocal done
        try:
            read()
        finally:  # whatever is not there yet is read when it is used
            with moved:
                done = size
                moved.notify()

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        yield wait_for
    finally:
        with moved:
            wanted = size + 1  # nothing more
            moved.notify()
        thread.join()


def populate(data: mmap.mmap, begin: int, size: int) -> None:
    """Read pages of a mapped file and enter them into the page table, not one fault at a time."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(data)) + begin
    call = ctypes.CDLL(None).madvise
    if call(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_POPULATE_READ) != 0:
        data.madvise(mmap.MADV_WILLNEED, begin, size)


def _view(data: mmap.mmap, entry: Entry) -> Tensor:
    count = math.prod(entry.shape)
    if count == 0:
        return torch.empty(entry.shape, dtype=entry.dtype)
    if entry.begin % entry.dtype.itemsize:  # old writers did not align
        raw = torch.frombuffer(
            data, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin
        )
        return raw.clone().view(entry.dtype).view(entry.shape)
    flat = torch.frombuffer(data, dtype=entry.dtype, count=count, offset=entry.begin)
    return flat.view(entry.shape)


def _read(path: Path) -> tuple[list[Entry], dict[str, str]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return parse_header(path, size, lambda a, b: os.pread(file.fileno(), b - a, a))
    except OSError as error:
        raise LoadError(f"{path} cannot be read: {error}") from error


def _parse(path: object, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise LoadError(f"{path} has a broken safetensors header: {error}") from error
    if not isinstance(header, dict):
        raise LoadError(f"{path} has a safetensors header that is not an object")
    return header


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _entries(path: object, header: dict[str, Any], data_start: int) -> list[Entry]:
    entries = [_entry(path, name, info, data_start) for name, info in header.items()]
    return sorted(entries, key=lambda entry: (entry.begin, entry.end))


def _entry(path: object, name: str, info: Any, data_start: int) -> Entry:
    try:
        dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise LoadError(f"{path}: tensor {name} needs dtype, shape and two data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise LoadError(f"{path}: tensor {name} has dtype {dtype!r}, which is not supported")
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise LoadError(f"{path}: tensor {name} has a shape or offset that is no natural number")
    if len(shape) > _MOST_DIMS:
        raise LoadError(f"{path}: tensor {name} has {len(shape)} dimensions, which none can have")
    needed = math.prod(shape) * _DTYPES[dtype].itemsize
    if end - begin != needed:
        raise LoadError(
            f"{path}: tensor {name} of shape {tuple(shape)} needs {needed} bytes, "
            f"its offsets give {end - begin}"
        )
    if math.prod(max(size, 1) for size in shape) >= 1 << 63:
        raise LoadError(f"{path}: tensor {name} has a shape that none can have: {tuple(shape)}")
    return Entry(name, _DTYPES[dtype], tuple(shape), data_start + begin, data_start + end)


def _check_layout(path: object, entries: list[Entry], data_start: int, size: int) -> None:
    """Tensors must follow each other without holes or overlaps and fill the file."""
    position = data_start
    for entry in entries:
        if entry.end > size:
            raise LoadError(
                f"{path}: tensor {entry.name} ends at byte {entry.end}, but the file has {size}: "
                "it is cut off"
            )
        if entry.begin != position:
            raise LoadError(f"{path}: tensor {entry.name} overlaps another one or leaves a hole")
        position = entry.end
    if position != size:
        raise LoadError(f"{path} has {size} bytes, but its tensors end at {position}")
