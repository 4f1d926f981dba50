"""A picture that one process leaves for others, readable whatever the writer is doing.

    SnapshotWriter(path).write(data)        SnapshotReader(path).read()

A file in shared memory with two slots: the older one is overwritten, then the header names it. A
reader copies the named slot and checks its sum, so it gets a whole picture also from a writer that
was stopped or killed in the middle. One writer; a new one takes over the file of the old one. Knows
nothing of what the pictures show.
"""

import mmap
import os
import struct
import zlib
from pathlib import Path

# One slot; a picture that does not fit is not written.
SLOT_BYTES = 256 << 10
_HEADER = struct.Struct("<QII")  # number of the picture, its length, its crc32
_SIZE = 2 * (_HEADER.size + SLOT_BYTES)
# A reader that is overtaken this often by a writer gives up.
_TRIES = 16


def path_in(folder: str) -> str:
    """Where the scheduler of the server with this folder of sockets leaves its picture."""
    return os.path.join(folder, "scheduler.snapshot")


class SnapshotWriter:
    """The writing end; makes the file if it is not there."""

    def __init__(self, path: Path) -> None:
        self._map = _open(path, os.O_RDWR | os.O_CREAT)
        newest = max((_HEADER.unpack_from(self._map, at)[0] for at in _slots()), default=0)
        self._count: int = newest

    def write(self, data: bytes) -> bool:
        """Replace the picture; False if it is too large."""
        if len(data) > SLOT_BYTES:
            return False
        self._count += 1
        at = _slots()[self._count % 2]
        begin = at + _HEADER.size
        self._map[begin : begin + len(data)] = data
        # The sum counts the number too: a slot is whole only when both are written.
        _HEADER.pack_into(self._map, at, self._count, len(data), _sum(self._count, data))
        return True

    def close(self) -> None:
        self._map.close()


class SnapshotReader:
    """The reading end; the file may come later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._map: mmap.mmap | None = None

    def read(self) -> bytes | None:
        """The newest picture, or None if there is none."""
        if self._map is None:
            try:
                self._map = _open(self._path, os.O_RDWR)
            except (FileNotFoundError, ValueError):  # or it has no room behind it
                return None
        for _ in range(_TRIES):
            heads = [(_HEADER.unpack_from(self._map, at), at) for at in _slots()]
            for (number, length, checksum), at in sorted(heads, reverse=True):
                begin = at + _HEADER.size
                data = self._map[begin : begin + min(length, SLOT_BYTES)]
                if number and _sum(number, data) == checksum:
                    return data
        return None

    def close(self) -> None:
        """May be called twice."""
        if self._map is not None:
            self._map.close()
            self._map = None


def _slots() -> tuple[int, int]:
    return 0, _HEADER.size + SLOT_BYTES


def _sum(number: int, data: bytes) -> int:
    return zlib.crc32(data, number & 0xFFFFFFFF)


def _open(path: Path, flags: int) -> mmap.mmap:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        if flags & os.O_CREAT:
            # Reserved, not only declared: a write to memory without room behind it is a SIGBUS.
            os.posix_fallocate(descriptor, 0, _SIZE)
        return mmap.mmap(descriptor, _SIZE)
    finally:
        os.close(descriptor)
