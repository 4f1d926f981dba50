"""Starts the child processes, hears their reports, notices their death, starts them again or ends
them.

One thread does all of it: it makes the children (the kernel ties a child to the thread that made
it, so that thread must live as long as the server), then reads their pipes until they are closed.
A child that dies after it was ready is replaced, with its team, as long as the budget lasts; one
that is stuck is killed first. Knows no messages of requests.
"""

import contextlib
import logging
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from headrace.core.config import Limits
from headrace.core.errors import HeadraceError, LoadError, WorkerLost
from headrace.core.serve_options import RecoverOptions
from headrace.engine import boot as wire
from headrace.engine import crash, watchdog
from headrace.engine.boot import Boot, Failed, Loading, Order, Ready
from headrace.engine.child import Child, describe
from headrace.engine.restart import SCHEDULER, Budget, Down, Up, team_of
from headrace.ipc.pulse import Pulse

logger = logging.getLogger(__name__)

_READ = 1 << 16
# From hanging up to SIGKILL; children have nothing to save.
_GRACE_SECONDS = 2.0
# How often pulses are looked at.
_LOOK_SECONDS = 0.5
# How long everything has been well before a scheduler in waiting is made.
_STANDBY_SECONDS = 2.0

Descriptors = Mapping[str, Sequence[int]]
Event = Down | Up | WorkerLost


class Supervisor:
    """The children of one server.

    `wait_ready` gives their reports or raises the reason of a failed start; `watch` tells of a
    child that died later, and of its return.
    """

    def __init__(
        self,
        roles: Sequence[str],
        runner: str,
        inherited: Descriptors,
        options: RecoverOptions,
    ) -> None:
        """`inherited`: descriptors that a child gets, by role, with the numbers they have here."""
        self._roles, self._runner, self._inherited = list(roles), runner, inherited
        self._options = options
        self._budget = Budget(options.restart_limit, options.restart_window)
        self._lock = threading.Lock()
        self._closing = False
        self._children: list[Child] = []
        self._boot: Boot | None = None
        self._pulses: dict[str, Pulse] = {}
        self._started: Future[None] = Future()
        self._ready: Future[dict[str, Ready]] = Future()
        # Roles that are being started again: since when, and when the next start is due.
        self._down: list[str] = []
        self._down_since = self._due = 0.0
        # A scheduler in waiting, and when one may be made: not while others start.
        self._standby: Child | None = None
        self._standby_due = 0.0
        self._lost: WorkerLost | None = None
        self._told: list[Event] = []
        self._tell: Callable[[Event], None] = self._told.append
        self._owner = os.getpid()
        self._selector = selectors.DefaultSelector()
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._run, name="headrace-supervisor", daemon=True)
        self._thread.start()
        self._started.result()

    @property
    def pids(self) -> dict[str, int]:
        """{role: process id}"""
        return {child.role: child.process.pid for child in self._children}

    def boot(self, boot: Boot) -> None:
        """Give every child its configuration."""
        self._pulses = {role: Pulse(boot.addresses.folder, role) for role in self._roles}
        self._boot = boot
        for child in self._children:
            child.send(boot)

    def pin(self, limits: Limits) -> None:
        """Let a scheduler that is started again have the sizes of the one before, so that what was
        accepted still fits."""
        assert self._boot is not None
        sizes = {
            "max_total_tokens": limits.max_total_tokens,
            "max_running_requests": limits.max_running_requests,
        }
        self._boot = Boot(
            self._boot.options | sizes, self._boot.info, self._boot.addresses, self._boot.listeners
        )

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

    def watch(self, tell: Callable[[Event], None]) -> None:
        """Call `tell` in the supervising thread when a child that was ready is lost: `Down` and
        `Up` if it is started again, else `WorkerLost`, once."""
        with self._lock:
            self._tell = tell
            for event in self._told:
                tell(event)

    def close(self) -> None:
        """End all children and wait for it. May be called twice and from any thread."""
        if os.getpid() != self._owner:
            return  # a fork of the process that owns the children
        with self._lock:
            self._closing = True
        everybody = [*self._children, *filter(None, [self._standby])]
        for child in everybody:
            child.hang_up()
        deadline = time.monotonic() + (_GRACE_SECONDS if self._lost is None else 0.0)
        for child in everybody:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
        with contextlib.suppress(OSError):  # closed by an earlier call
            os.write(self._waker, b"x")
        self._thread.join()
        with self._lock:
            if self._waker >= 0:
                os.close(self._wake)
                os.close(self._waker)
                self._waker = -1

    # -- the supervising thread ---------------------------------------------------------------

    def _run(self) -> None:
        try:
            for role in self._roles:
                self._start(role)
        except OSError as error:
            for child in self._children:
                child.process.kill()
                child.close()
            os.close(self._wake)
            os.close(self._waker)
            self._started.set_exception(LoadError(f"a process cannot be started: {error}"))
            return
        self._started.set_result(None)
        self._selector.register(self._wake, selectors.EVENT_READ)
        while not (self._closing and len(self._selector.get_map()) == 1):
            for key, _ in self._selector.select(self._patience()):
                if key.data is None:
                    os.read(self._wake, _READ)
                else:
                    self._read(key.data, key.fd)
            if self._ready.done() and not self._closing and self._lost is None:
                self._start_again()
                watchdog.look(self._children, self._pulses, self._options.watchdog_timeout)
                self._stand_by()
        self._selector.close()
        for child in self._children:
            child.close()

    def _start(self, role: str) -> Child:
        """Make a child, in the place of the one before it."""
        if role == SCHEDULER and self._standby is not None:
            child, self._standby = self._standby, None
        else:
            child = self._make(role)
        before = [index for index, one in enumerate(self._children) if one.role == role]
        if before:
            self._children[before[0]] = child
        else:
            self._children.append(child)
        return child

    def _make(self, role: str, *, standby: bool = False) -> Child:
        child = Child(role, self._runner, self._inherited.get(role, ()), standby=standby)
        self._selector.register(child.reports, selectors.EVENT_READ, child)
        self._selector.register(child.output, selectors.EVENT_READ, child)
        return child

    def _stand_by(self) -> None:
        """Have a scheduler in waiting, once everything else has been up for a while."""
        now = time.monotonic()
        if not self._options.standby or self._standby is not None or self._down:
            self._standby_due = 0.0
        elif not self._standby_due:
            self._standby_due = now + _STANDBY_SECONDS
        elif now >= self._standby_due:
            with self._lock, contextlib.suppress(OSError):
                self._standby_due = 0.0
                if not self._closing:
                    self._standby = self._make(SCHEDULER, standby=True)

    def _read(self, child: Child, fd: int) -> None:
        data = os.read(fd, _READ)
        if not data:
            self._selector.unregister(fd)
        if fd == child.output.fileno():
            child.show(data)
        else:
            for line in child.lines("report", data):
                self._hear(child, wire.decode_report(line))
            if not data:
                self._ended(child)
        if not data:
            child.pipe_ended()

    def _hear(self, child: Child, report: wire.Report) -> None:
        match report:
            case Loading():
                logger.info("%s: loading %s", child.role, report.what)
            case Failed():
                child.failure = report
                if self._ready.done():
                    child.show(f"{report.traceback or report.error}\n".encode())
            case Ready():
                child.ready = report
                ready = {c.role: c.ready for c in self._children if c.ready is not None}
                if len(ready) < len(self._children):
                    return
                if not self._ready.done():
                    self._ready.set_result(ready)
                elif self._down:
                    self._came_back(ready)

    def _ended(self, child: Child) -> None:
        """Its report pipe is closed: the process has ended or is about to."""
        code = child.process.wait()
        if child is self._standby:
            self._standby = None
        elif self._closing:
            if not self._ready.done():
                self._ready.set_exception(LoadError("the launch was canceled"))
        elif not self._ready.done():
            child.drain()
            self._ready.set_exception(launch_error(child, code))
        elif not child.unwanted and self._lost is None:
            child.drain()
            self._crashed(child, code)

    def _crashed(self, child: Child, code: int) -> None:
        """A child that had been ready is lost: replace it and its team, or give up."""
        now = time.monotonic()
        why = child.stuck or f"The {child.role} process was lost ({describe(code)})."
        crash.write_report(self._options.crash_dump_folder, child, why, self._pulses[child.role])
        again = self._options.on_crash == "restart"
        delay = self._budget.delay(now) if again else None
        if delay is None:
            if again:
                why += f" It was restart number {self._options.restart_limit + 1} within "
                why += f"{self._options.restart_window} s, one too many (--restart-limit)."
            self._lost = WorkerLost(why)
            self._send(self._lost)
            return
        team = team_of(child.role, self._roles)
        batch = self._pulses[SCHEDULER].last_batch() if SCHEDULER in team else {}
        for other in self._children:
            if other.role in team:
                other.unwanted = True
                other.ready = None
                other.process.kill()
        if not self._down:
            self._down_since = now
        self._down += [role for role in team if role not in self._down]
        self._due = max(self._due, now + delay)
        self._send(Down(team, f"{why} It is being started again; try again in a moment.", batch))

    def _patience(self) -> float:
        """Seconds until there may be something to do that no pipe tells of."""
        due = self._due - time.monotonic() if self._due else _LOOK_SECONDS
        return min(_LOOK_SECONDS, max(0.0, due))

    def _start_again(self) -> None:
        """Start those of the lost that are due."""
        if not self._down or time.monotonic() < self._due:
            return
        gone = [child.role for child in self._children if child.unwanted]
        if any(child.unwanted and child.process.poll() is None for child in self._children):
            return
        with self._lock:
            if self._closing:
                return
            for role in gone:
                assert self._boot is not None
                self._pulses[role].reset()
                try:
                    self._start(role).send(self._boot)
                except OSError as error:
                    logger.error("a process cannot be started: %s", error)
                    self._due = time.monotonic() + 1.0
                    return
        self._due = 0.0

    def _came_back(self, ready: dict[str, Ready]) -> None:
        seconds = time.monotonic() - self._down_since
        reports = {role: ready[role] for role in self._down}
        self._down = []
        self._send(Up(reports, seconds))

    def _send(self, event: Event) -> None:
        with self._lock:
            self._tell(event)


def launch_error(child: Child, code: int) -> HeadraceError:
    """Why the start failed: the child's own words if it had any, else its last output."""
    failure = child.failure
    if failure is not None and not failure.traceback:
        return LoadError(failure.error)
    head = f"the {child.role} process failed while loading ({describe(code)})"
    if failure is not None:
        return LoadError(f"{head}: {failure.error}\n{failure.traceback}")
    return LoadError("\n".join([f"{head}; its last output:", *list(child.last_lines)[-40:]]))
