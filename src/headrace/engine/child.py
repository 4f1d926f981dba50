"""A child process and its pipes: one for its configuration and orders, one for its reports, one
for what it prints.

A child's output goes to our stderr line by line; the last lines are kept for the error of a failed
launch and the report of a crash. Knows no messages of requests and no other child.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import headrace
from headrace.engine import boot as wire
from headrace.engine.boot import Boot, Failed, Order, Ready

_LINES_KEPT = 400


class Child:
    """One process and its pipes. Used by the supervising thread, but for `send`."""

    def __init__(
        self, role: str, runner: str, inherited: Sequence[int] = (), *, standby: bool = False
    ) -> None:
        """A `standby` child waits for its configuration until it is needed."""
        self.role = role
        self.started = time.monotonic()
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        # It is to die: it was found stuck (why, and since when), or its team is started again.
        self.stuck, self.stuck_at = "", 0.0
        self.unwanted = False
        self.open_pipes = 2
        self._partial = {"report": b"", "output": b""}
        read_end, write_end = os.pipe()
        arguments = [role, str(write_end), str(os.getpid()), runner, *["standby"] * standby]
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "headrace.engine.process", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=[write_end, *inherited],
                env=environment(),
                bufsize=0,
            )
        finally:
            os.close(write_end)
        self.reports = read_end
        assert self.process.stdout is not None
        self.output: IO[bytes] = self.process.stdout

    def send(self, message: Boot | Order) -> None:
        """Give the child its configuration or an order."""
        assert self.process.stdin is not None
        # A child that has died already is told of by its pipes.
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(wire.encode(message) + b"\n")

    def hang_up(self) -> None:
        """Close the pipe that ties it to us: it ends at once."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def lines(self, pipe: str, data: bytes) -> list[bytes]:
        """The complete lines of a pipe after `data` came."""
        *whole, self._partial[pipe] = (self._partial[pipe] + data).split(b"\n")
        return whole

    def show(self, data: bytes) -> None:
        """Pass output on to people."""
        for line in self.lines("output", data):
            text = line.decode("utf-8", "replace")
            self.last_lines.append(text)
            if sys.stderr is not None:
                with contextlib.suppress(OSError, ValueError):
                    print(text, file=sys.stderr, flush=True)

    def drain(self) -> None:
        """Read what it still had to say; it is dead."""
        os.set_blocking(self.output.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self.output.fileno(), 1 << 16):
                self.show(data)

    def pipe_ended(self) -> None:
        """One of the two that are read has nothing more to come."""
        self.open_pipes -= 1
        if not self.open_pipes:
            self.close()

    def close(self) -> None:
        """May be called twice."""
        if self.output.closed:
            return
        os.close(self.reports)
        self.output.close()
        self.hang_up()


def describe(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = "; out of memory?" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"


def environment() -> dict[str, str]:
    """Ours, and headrace found where we found it even if a script extended sys.path."""
    root = str(Path(headrace.__file__).parents[1])
    environment = dict(os.environ)
    if Path(root).name not in ("site-packages", "dist-packages"):
        paths = [root, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    return environment
