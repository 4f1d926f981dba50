"""How long the steps of a start took, for the table that is printed when it is over."""

import os
import time
from collections.abc import Mapping
from pathlib import Path


class Stopwatch:
    """Seconds by step. The first step, "import", began when this process did."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._step = "import"
        self._since = time.monotonic() - process_age()

    def begin(self, step: str) -> None:
        """The step before is over, `step` begins."""
        now = time.monotonic()
        self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._step, self._since = step, now


def process_age() -> float:
    """Seconds since this process was made (to a hundredth)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started)


def table(processes: Mapping[str, Mapping[str, float]], total: float) -> list[str]:
    """Lines for people: the steps of each process, side by side in time."""
    lines = [f"start-up took {total:.2f} s"]
    for name, seconds in processes.items():
        steps = ", ".join(f"{step} {spent:.2f}" for step, spent in seconds.items())
        lines.append(f"  {name:<12} {steps}")
    return lines
