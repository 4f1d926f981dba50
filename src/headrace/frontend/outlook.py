"""The scheduler's last picture of itself, with how old it is and how its process fares.

Asks nobody: it reads shared memory and /proc, so it answers whatever the scheduler is doing.
"""

import time
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import Overloaded
from headrace.ipc.snapshot import SnapshotReader, path_in


class Outlook:
    """Belongs to one server, whose sockets are in `folder`."""

    def __init__(self, folder: str) -> None:
        self._reader = SnapshotReader(Path(path_in(folder)))

    def look(self) -> dict[str, Any]:
        """What `headrace.scheduler.overview` gave, rows as objects; `age` in seconds.

        Raises:
            Overloaded: there is no picture yet.
        """
        data = self._reader.read()
        if data is None:
            raise Overloaded("The scheduler has not started yet.")
        found: dict[str, Any] = msgspec.msgpack.decode(data)
        fields, at, pid = found.pop("fields"), found.pop("at"), found.pop("pid")
        for kind in ("running", "waiting"):
            found[kind] = [dict(zip(fields, row, strict=True)) for row in found[kind]]
        age = round(time.monotonic() - at, 3)
        return {"age": age, "process": {"pid": pid, "state": process_state(pid)}, **found}

    def close(self) -> None:
        """May be called twice."""
        self._reader.close()


def process_state(pid: int) -> str:
    """As the kernel calls it: "S (sleeping)", "T (stopped)", ... or "gone"."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "gone"
    return next((line.split(None, 1)[1] for line in lines if line.startswith("State:")), "unknown")
