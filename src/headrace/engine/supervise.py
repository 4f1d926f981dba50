"""Starts the child processes, hears their reports, notices their death, ends them.

One thread does all of it: it makes the children (the kernel ties a child to the thread that made
it, so that thread must live as long as the server), then reads their pipes until they are closed.
A child's output goes to our stderr line by line; the last lines are kept for the error of a
failed launch. Knows no messages of requests.
"""

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO

import headrace
from headrace.core.errors import HeadraceError, LoadError, WorkerLost
from headrace.engine import boot as wire
from headrace.engine.boot import Boot, Failed, Loading, Order, Ready

logger = logging.getLogger(__name__)

_LINES_KEPT = 40
_READ = 1 << 16
# From hanging up to SIGKILL; children have nothing to save.
_GRACE_SECONDS = 2.0

Descriptors = Mapping[str, Sequence[int]]


class Child:
    """One process and its pipes. Used by the supervising thread, but for `send`."""

    def __init__(self, role: str, runner: str, inherited: Sequence[int] = ()) -> None:
        self.role = role
        self.ready: Ready | None = None
        self.failure: Failed | None = None
        self.last_lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._partial = {"report": b"", "output": b""}
        read_end, write_end = os.pipe()
        arguments = [role, str(write_end), str(os.getpid()), runner]
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
        with contextlib.suppress(BrokenPipeError):
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

    def close(self) -> None:
        os.close(self.reports)
        self.output.close()
        self.hang_up()


class Supervisor:
    """The children of one server.

    `wait_ready` gives their reports or raises the reason of a failed start; `when_lost` tells of a
    child that died later.
    """

    def __init__(
        self, roles: Sequence[str], runner: str, inherited: Descriptors | None = None
    ) -> None:
        """`inherited`: descriptors that a child gets, by role, with the numbers they have here."""
        self._lock = threading.Lock()
        self._closing = False
        self._children: list[Child] = []
        self._started: Future[None] = Future()
        self._ready: Future[dict[str, Ready]] = Future()
        self._lost: WorkerLost | None = None
        self._tell: Callable[[WorkerLost], None] | None = None
        self._owner = os.getpid()
        self._thread = threading.Thread(
            target=self._run,
            args=(roles, runner, inherited or {}),
            name="headrace-supervisor",
            daemon=True,
        )
        self._thread.start()
        self._started.result()

    @property
    def pids(self) -> dict[str, int]:
        """{role: process id}"""
        return {child.role: child.process.pid for child in self._children}

    def boot(self, boot: Boot) -> None:
        """Give every child its configuration."""
        for child in self._children:
            child.send(boot)

    def tell(self, prefix: str, order: Order) -> None:
        """Give an order to the children whose role begins so."""
        for child in self._children:
            if child.role.startswith(prefix):
                child.send(order)

    def drain(self, prefix: str, order: Order, seconds: float) -> None:
        """Give an order to end, and wait for it; from here on a child may end. Blocks."""
        self._closing = True
        self.tell(prefix, order)
        deadline = time.monotonic() + seconds
        for child in self._children:
            if child.role.startswith(prefix):
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.process.wait(max(0.0, deadline - time.monotonic()))

    def wait_ready(self, timeout: float | None = None) -> dict[str, Ready]:
        """The reports of all children, by role.

        Raises:
            LoadError: one of them cannot serve; the message says why.
        """
        return self._ready.result(timeout)

    def when_lost(self, tell: Callable[[WorkerLost], None]) -> None:
        """Call `tell` once, in the supervising thread, when a child dies after it was ready."""
        with self._lock:
            self._tell = tell
            lost = self._lost
        if lost is not None:
            tell(lost)

    def close(self) -> None:
        """End all children and wait for it. May be called twice and from any thread."""
        if os.getpid() != self._owner:
            return  # a fork of the process that owns the children
        self._closing = True
        for child in self._children:
            child.hang_up()
        deadline = time.monotonic() + (_GRACE_SECONDS if self._lost is None else 0.0)
        for child in self._children:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        self._thread.join()

    # -- the supervising thread ---------------------------------------------------------------

    def _run(self, roles: Sequence[str], runner: str, inherited: Descriptors) -> None:
        try:
            for role in roles:
                self._children.append(Child(role, runner, inherited.get(role, ())))
        except OSError as error:
            for child in self._children:
                child.process.kill()
                child.close()
            self._started.set_exception(LoadError(f"a process cannot be started: {error}"))
            return
        self._started.set_result(None)
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.reports, selectors.EVENT_READ, child)
                selector.register(child.output, selectors.EVENT_READ, child)
            while selector.get_map():
                for key, _ in selector.select():
                    self._read(key.data, key.fd, selector)
        for child in self._children:
            child.close()

    def _read(self, child: Child, fd: int, selector: selectors.BaseSelector) -> None:
        data = os.read(fd, _READ)
        if fd == child.output.fileno():
            child.show(data)
            if not data:
                selector.unregister(fd)
            return
        for line in child.lines("report", data):
            self._hear(child, wire.decode_report(line))
        if not data:
            selector.unregister(fd)
            self._ended(child)

    def _hear(self, child: Child, report: wire.Report) -> None:
        match report:
            case Loading():
                logger.info("%s: loading %s", child.role, report.what)
            case Failed():
                child.failure = report
                if self._ready.done():
                    child.show(report.traceback.encode() + b"\n")
            case Ready():
                child.ready = report
                ready = {c.role: c.ready for c in self._children if c.ready is not None}
                if len(ready) == len(self._children) and not self._ready.done():
                    self._ready.set_result(ready)

    def _ended(self, child: Child) -> None:
        """Its report pipe is closed: the process has ended or is about to."""
        code = child.process.wait()
        if self._closing:
            if not self._ready.done():
                self._ready.set_exception(LoadError("the launch was canceled"))
            return
        if not self._ready.done():
            self._drain(child)
            self._ready.set_exception(launch_error(child, code))
            return
        with self._lock:
            if self._lost is not None:
                return
            self._lost = WorkerLost(f"The {child.role} process was lost ({describe(code)}).")
            tell = self._tell
        if tell is not None:
            tell(self._lost)

    def _drain(self, child: Child) -> None:
        """Read what a dead child still had to say."""
        os.set_blocking(child.output.fileno(), False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(child.output.fileno(), _READ):
                child.show(data)


def launch_error(child: Child, code: int) -> HeadraceError:
    """Why the start failed: the child's own words if it had any, else its last output."""
    failure = child.failure
    if failure is not None and not failure.traceback:
        return LoadError(failure.error)
    head = f"the {child.role} process failed while loading ({describe(code)})"
    if failure is not None:
        return LoadError(f"{head}: {failure.error}\n{failure.traceback}")
    return LoadError("\n".join([f"{head}; its last output:", *child.last_lines]))


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
