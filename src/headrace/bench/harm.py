"""What `headrace bench chaos` does to the processes of an engine.

    kill segv abort    a signal that ends it
    stop               SIGSTOP: it is there, but does not run any more
    memory             the scheduler gets no more memory (RLIMIT_AS) when a step wants some
    kernel             the next step of the model raises
    disk               SIGKILL, and the crash folder is on a full disk

Knows no requests. Whoever makes a `Harm` starts the engine inside of it, with its `options`.
"""

import contextlib
import os
import resource
import signal
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

KINDS = ("kill", "segv", "abort", "stop", "memory", "kernel", "disk")
# What happens in a step of the model.
ON_ORDER = {"memory", "kernel"}
_SIGNALS = {
    "kill": signal.SIGKILL,
    "segv": signal.SIGSEGV,
    "abort": signal.SIGABRT,
    "stop": signal.SIGSTOP,
    "disk": signal.SIGKILL,
}
_FAULTS = "HEADRACE_TEST_FAULTS"
_PAGE = 4096


class Harm:
    """Ready to do any of `kinds`; `watchdog` (s) is when a process that is stopped is noticed."""

    def __init__(self, kinds: Collection[str], watchdog: float) -> None:
        self.options: dict[str, Any] = {}
        self._kinds = kinds
        self._folder = tempfile.TemporaryDirectory(prefix="headrace-chaos-")
        self._order, self._greed = (Path(self._folder.name, name) for name in ("fail", "take"))
        self._disk = Path(self._folder.name, "disk")
        self._mounted = False
        if "stop" in kinds:
            self.options["watchdog_timeout"] = watchdog

    def __enter__(self) -> Self:
        if ON_ORDER & set(self._kinds):
            os.environ[_FAULTS] = f"kernel:once:{self._order},kernel:allocate:{self._greed}"
        if "disk" in self._kinds:
            self.options["crash_dump_folder"] = self._full_disk()
        return self

    def __exit__(self, *exception: object) -> None:
        if ON_ORDER & set(self._kinds):
            del os.environ[_FAULTS]
        if self._mounted:
            subprocess.run(["umount", "--lazy", self._disk], check=False)
        self._folder.cleanup()

    def do(self, kind: str, pid: int) -> None:
        """Harm a process; one that has ended already is left alone."""
        try:
            if kind == "kernel":
                self._order.touch()
            elif kind == "memory":
                _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
                resource.prlimit(pid, resource.RLIMIT_AS, (0, hard))
                self._greed.touch()
            else:
                os.kill(pid, _SIGNALS[kind])
        except ProcessLookupError:
            return

    @property
    def pending(self) -> bool:
        """A step was to fail, and none has run since."""
        return self._order.exists() or self._greed.exists()

    def _full_disk(self) -> str:
        """A folder without room for a report: on a disk of our own if we may make one, else below
        a file."""
        self._disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_PAGE}", "headrace-chaos", str(self._disk)]
        with contextlib.suppress(FileNotFoundError):  # there is no such program
            done = subprocess.run(mount, capture_output=True, check=False)
            self._mounted = done.returncode == 0
        filler = self._disk / "full"
        filler.write_bytes(bytes(_PAGE))
        return str(self._disk if self._mounted else filler)
