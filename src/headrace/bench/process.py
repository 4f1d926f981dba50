"""A server started only to be measured: its command, its process tree, its end.

The server is ended by SIGTERM to its own pid; what then still lives is named and killed by pid.
Knows nothing of what the server serves. Times are those of `time.perf_counter`.
"""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from headrace.core.errors import HeadraceError

HOST = "127.0.0.1"
_POLL = 0.02
_PEAK = re.compile(r"^VmHWM:\s*(\d+) kB", re.MULTILINE)


def serve_command(port: int, server_args: Sequence[str]) -> list[str]:
    """`headrace serve` in this Python."""
    where = ["--host", HOST, "--port", str(port)]
    return [sys.executable, "-m", "headrace", "serve", *where, *server_args]


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within it SIGTERM to us unwinds the stack, so that servers that we started end too."""

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class ServerProcess:
    """A running server; a context manager that leaves nothing behind."""

    def __init__(
        self,
        command: Sequence[str],
        port: int,
        timeout: float,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Start `command`, which is to listen on `port`; all waits share `timeout` seconds.

        `env` is laid over the environment.

        Raises:
            HeadraceError: there is no such program.
        """
        self.port = port
        self._timeout = timeout
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self.started = time.perf_counter()
        try:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                env=_environment() | dict(env or {}),
                start_new_session=True,  # the session tells whose an orphan was
            )
        except OSError as error:
            self._log.close()
            raise HeadraceError(f"cannot run {command[0]}: {error.strerror}") from None
        self._root = psutil.Process(self._popen.pid)
        self.leftovers: list[str] = []
        """What `stop` found alive; empty after a clean end."""
        self._stopped = False

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._log.close()

    @property
    def base_url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def pid(self) -> int:
        return self._popen.pid

    def wait_port(self) -> float:
        """Seconds from start until the port accepts connections."""
        return self._wait("its port did not open", self._accepts)

    def wait_health(self) -> float:
        """Seconds from start until /health answers 200."""
        return self._wait("/health did not answer 200", self._healthy)

    def tree(self) -> list[psutil.Process]:
        """The server's living processes, itself first."""
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def log_tail(self, lines: int = 15) -> str:
        """The last lines the server printed."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self, grace: float = 20.0) -> None:
        """SIGTERM to the server; after `grace` seconds kill what is left, and note it."""
        if self._stopped:
            return
        self._stopped = True
        known = self.tree()
        self._popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(grace)
        left = _survivors(list({*known, *_session(self.pid)}))
        for process in left:
            self.leftovers.append(f"process {process.pid} ({role(process, self.pid)})")
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._popen.wait()
        _survivors(left)
        if self._accepts():
            self.leftovers.append(f"port {self.port}")

    def _wait(self, problem: str, ready: Callable[[], bool]) -> float:
        while not ready():
            if self._popen.poll() is not None:
                status = self._popen.returncode
                raise HeadraceError(
                    f"the server ended with status {status} while starting:\n{self.log_tail()}"
                )
            if time.perf_counter() - self.started > self._timeout:
                raise HeadraceError(f"{problem} in {self._timeout:g} s:\n{self.log_tail()}")
            time.sleep(_POLL)
        return time.perf_counter() - self.started

    def _accepts(self) -> bool:
        try:
            socket.create_connection((HOST, self.port), timeout=1).close()
        except OSError:
            return False
        return True

    def _healthy(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=self._timeout)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def role(process: psutil.Process, main_pid: int) -> str:
    """main, scheduler, detokenizer or other, from the name the process gave itself."""
    if process.pid == main_pid:
        return "main"
    try:
        title = " ".join([process.name(), *process.cmdline()]).lower()
    except psutil.Error:
        return "other"
    return next((name for name in ("detokenizer", "scheduler") if name in title), "other")


def cpu_seconds(processes: Sequence[psutil.Process]) -> dict[int, float]:
    """{pid: user and system time so far}; an error when one of them has ended."""
    try:
        times = {process.pid: process.cpu_times() for process in processes}
    except psutil.NoSuchProcess as error:
        raise HeadraceError(f"server process {error.pid} ended during the run") from None
    return {pid: spent.user + spent.system for pid, spent in times.items()}


def _session(leader: int) -> list[psutil.Process]:
    """Every process of a session, orphans included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _survivors(processes: list[psutil.Process], seconds: float = 1.0) -> list[psutil.Process]:
    """Those that still run after `seconds`; sooner when none does."""
    deadline = time.perf_counter() + seconds
    while running := [process for process in processes if _runs(process)]:
        if time.perf_counter() > deadline:
            break
        time.sleep(_POLL)
    return running


def _runs(process: psutil.Process) -> bool:
    """A zombie does not run; it waits for its parent to notice."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def peak_rss(processes: Sequence[psutil.Process]) -> int:
    """Sum of each live process's own peak in bytes: shared pages count once per process.

    Read from /proc (VmHWM) at once instead of sampled, so that measuring costs the server nothing.
    """
    total = 0
    for process in processes:
        try:
            found = _PEAK.search(Path(f"/proc/{process.pid}/status").read_text())
        except OSError:
            continue
        total += int(found[1]) * 1024 if found else 0
    return total


def _environment() -> dict[str, str]:
    """Ours, but compiled modules may be kept: compiling at every start is not what is measured."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
