"""The pictures that a scheduler leaves of itself, for /debug/scheduler.

Written between steps: every 100 ms, or less often when that would take more than two thousandths of
the time; sooner when requests have come; and before the loop goes to sleep. They are in shared
memory, where they stay when the scheduler computes for long, hangs, or dies.
"""

import logging
import os
import time
from pathlib import Path
from typing import Any, Protocol

import msgspec

from headrace.ipc.snapshot import SnapshotWriter, path_in

logger = logging.getLogger(__name__)

_INTERVAL = 0.1
_COSTS = 500  # how many times its own cost lies between two pictures, at least
# After requests have come, which may be what the next step hangs on, this much sooner.
_SOONER = 5


class Subject(Protocol):
    """What a picture is taken of."""

    @property
    def idle(self) -> bool: ...
    @property
    def arrivals(self) -> int: ...
    def overview(self) -> dict[str, Any]: ...


class Snapshots:
    """Writes at a bounded rate. Without room for the file it does nothing, and says so once."""

    def __init__(self, folder: str) -> None:
        self._encode = msgspec.msgpack.Encoder().encode
        self._written = 0.0
        self._interval = _INTERVAL
        self._arrivals = 0
        self._writer: SnapshotWriter | None = None
        try:
            self._writer = SnapshotWriter(Path(path_in(folder)))
        except OSError as error:
            logger.warning("/debug/scheduler will have nothing to show: %s", error)

    def update(self, subject: Subject) -> None:
        """Between two steps: take a picture if one is due."""
        now = time.monotonic()
        wait = self._interval
        if subject.arrivals != self._arrivals:
            wait /= _SOONER
        if now - self._written < wait and not subject.idle:
            return
        self._written, self._arrivals = now, subject.arrivals
        if self._writer is not None:
            self._writer.write(self._encode({"pid": os.getpid(), **subject.overview()}))
            self._interval = max(_INTERVAL, _COSTS * (time.monotonic() - now))
