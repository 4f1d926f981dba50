"""The pulse of a process, in a page of memory that others read without asking it.

    writer (a child)                             reader (the main process, health routes)
    beat         by a thread, all the time       is the process running at all?
    begin, rest  around each turn of its work    how long has it been at it: is it stuck?
    batch        before a step is launched       whom was it computing when it died?

One writer, no locks: a time is 8 aligned bytes, and a batch is read when its writer is dead. The
page belongs to the reader, so it outlives the writer and serves the next one. Knows no processes.
"""

import mmap
import os
import struct
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple

# Seconds between beats, and after how many without one a process counts as stopped.
BEAT = 0.25
SILENT = 3.0
# Requests of a batch that are remembered.
MOST = 4000
_TIMES = struct.Struct("<ddQQ")
_ENTRY = struct.Struct("<QQ")
_SIZE = _TIMES.size + MOST * _ENTRY.size


class Reading(NamedTuple):
    """Seconds since the last beat, and since its turn began (0: it rests); turns so far."""

    silent: float
    busy: float
    turns: int


class Pulse:
    """The page of one process; times are CLOCK_MONOTONIC, which all processes share."""

    def __init__(self, folder: str, role: str) -> None:
        path = os.path.join(folder, f"pulse-{role}")
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(file).st_size < _SIZE:
                os.ftruncate(file, _SIZE)
            self._page = mmap.mmap(file, _SIZE)
        finally:
            os.close(file)
        self._turns = 0

    # -- the writer ---------------------------------------------------------------------------

    def beat_for_ever(self) -> None:
        """Beat from now on, in a thread that ends with the process."""
        threading.Thread(target=self._beat_for_ever, name="pulse", daemon=True).start()

    def beat(self) -> None:
        """The process is running."""
        struct.pack_into("<d", self._page, 0, time.monotonic())

    def begin(self) -> None:
        """A turn of work begins."""
        self._turns += 1
        struct.pack_into("<dQ", self._page, 8, time.monotonic(), self._turns)

    def rest(self) -> None:
        """There is nothing to do."""
        struct.pack_into("<d", self._page, 8, 0.0)

    def batch(self, entries: Iterable[tuple[int, int]]) -> None:
        """What is about to be computed: (key, strikes) of each request."""
        data = b"".join(_ENTRY.pack(*entry) for entry in list(entries)[:MOST])
        self._page[_TIMES.size : _TIMES.size + len(data)] = data
        struct.pack_into("<Q", self._page, 24, len(data) // _ENTRY.size)

    # -- the reader ---------------------------------------------------------------------------

    def reset(self) -> None:
        """A new process will write."""
        self._page[:] = bytes(_SIZE)

    def read(self) -> Reading | None:
        """How it is; None before the first beat."""
        now = time.monotonic()
        beat, since, turns, _ = _TIMES.unpack_from(self._page)
        if not beat:
            return None
        return Reading(max(0.0, now - beat), max(0.0, now - since) if since else 0.0, turns)

    def last_batch(self) -> dict[int, int]:
        """{key: strikes} of what was computed last."""
        *_, count = _TIMES.unpack_from(self._page)
        data = self._page[_TIMES.size : _TIMES.size + min(count, MOST) * _ENTRY.size]
        return dict(_ENTRY.iter_unpack(data))

    def _beat_for_ever(self) -> None:
        while True:
            self.beat()
            time.sleep(BEAT)
