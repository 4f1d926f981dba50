"""The pictures that a scheduler leaves of itself, for /debug/scheduler.

Written between steps: every 100 ms, sooner when requests have come, and before the loop goes to
sleep. A picture costs tens of microseconds, so all of them cost less than a thousandth of the time.
They are in shared memory, where they stay when the scheduler computes for long, hangs, or dies.
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
# After requests have come: they may be what the next step hangs on.
_SOON = 0.02


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
        self._arrivals = 0
        self._writer: SnapshotWriter | None = None
        try:
            self._writer = SnapshotWriter(Path(path_in(folder)))
        except OSError as error:
            logger.warning("/debug/scheduler will have nothing to show: %s", error)

    def update(self, subject: Subject) -> None:
        """Between two steps: take a picture if one is due."""
        now = time.monotonic()
        age = now - self._written
        fresh = subject.arrivals != self._arrivals
        if age < (_SOON if fresh else _INTERVAL) and not subject.idle:
            return
        self._written, self._arrivals = now, subject.arrivals
        if self._writer is not None:
            self._writer.write(self._encode({"pid": os.getpid(), **subject.overview()}))
