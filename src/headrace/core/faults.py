"""Faults on purpose, for the tests of recovery: HEADRACE_TEST_FAULTS, read when a process starts.

    HEADRACE_TEST_FAULTS=sample:raise:666,kernel:kill:13

What happens (raise, kill, hang) to the process that comes to the point with a request of that seed.
`kernel:once:/a/file` raises whoever computes when that file is there, and removes it;
`kernel:allocate:/a/file` asks for memory then, which raises if the process may have no more.
Points: accept, plan, commit (scheduler), kernel, sample, prompt (runner). Without the variable
nothing of this can be reached.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterable

_FAULTS = [
    tuple(fault.split(":")) for fault in os.environ.get("HEADRACE_TEST_FAULTS", "").split(",")
]
ON = bool(_FAULTS[0][0])


def strike(point: str, seeds: Iterable[int | None]) -> None:
    """Fail here if that was asked for one of the seeds; call it only when `ON`."""
    present = {str(seed) for seed in seeds}
    for place, action, key in _FAULTS:
        on_order = action in ("once", "allocate")
        if place != point or not (_ordered(key) if on_order else key in present):
            continue
        if action == "allocate":
            bytearray(1 << 28)
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while action == "hang":
            time.sleep(1.0)
        raise RuntimeError(f"a fault on purpose at {point}")


def _ordered(path: str) -> bool:
    """The file was there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        return True
    return False
