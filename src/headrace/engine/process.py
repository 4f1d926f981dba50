"""The main program of a child: `python -m headrace.engine.process ROLE REPORT_FD PARENT RUNNER`,
with `standby` behind it if it shall wait until it is needed.

It names itself, loads while it reports, serves, and never outlives its parent: the kernel kills the
scheduler with the parent, whatever it is doing; the detokenizer, which is never busy for long, also
removes the folder of sockets. Heavy imports begin before the boot message is there.
"""

import contextlib
import faulthandler
import gc
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import traceback
from types import FrameType
from typing import NoReturn

import setproctitle

from headrace.core.errors import HeadraceError, LoadError
from headrace.core.messages import Deltas
from headrace.engine import boot as wire
from headrace.engine.boot import Boot, Failed, Loading, Ready
from headrace.engine.crash import ALL_STACKS, OWN_STACK
from headrace.engine.stopwatch import Stopwatch
from headrace.engine.tied import die_with_parent
from headrace.ipc import address
from headrace.ipc.channels import Receiver
from headrace.ipc.pulse import Pulse

# What takes long to import, by role and runner; needed in any case.
_EARLY = {
    ("scheduler", "model"): (
        "headrace.engine.lean_torch",
        "headrace.runner.worker",
        "headrace.engine.build",
    ),
    ("scheduler", "fake"): ("headrace.engine.build",),
    ("rank", "model"): (
        "headrace.engine.lean_torch",
        "headrace.runner.team",
        "headrace.engine.build",
    ),
    ("detokenizer", "model"): ("headrace.frontend.detokenizer",),
    ("detokenizer", "fake"): ("headrace.frontend.detokenizer",),
    ("http", "model"): ("headrace.engine.http_worker",),
    ("http", "fake"): ("headrace.engine.http_worker",),
}


def main() -> None:
    """Serve until killed; returns only when that fails."""
    role, report_fd, parent, runner = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    kind, _, number = role.partition("-")
    watch = Stopwatch()
    lifeline = Lifeline(role, parent)
    reports = Reports(report_fd)
    try:
        for module in _EARLY[kind, runner]:
            importlib.import_module(module)
        watch.begin("wait for configuration")
        boot = lifeline.boot()
        _log_to_stderr(role, boot.config.observe.log_level)
        if kind == "scheduler":
            _schedule(boot, reports, watch)
        elif kind == "rank":
            _follow(boot, int(number), reports, watch)
        elif kind == "detokenizer":
            _detokenize(boot, int(number or 0), reports, watch)
        else:
            _serve(boot, int(number), reports, lifeline)
    except HeadraceError as error:
        reports.send(Failed(error.message))
    except Exception as error:  # noqa: BLE001  the main of a process: the parent must hear of it
        reports.send(Failed(f"{type(error).__name__}: {error}", traceback.format_exc()))


def _schedule(boot: Boot, reports: "Reports", watch: Stopwatch) -> NoReturn:
    from headrace.engine.build import build_scheduler
    from headrace.engine.loop import Roll, open_ports, run

    def progress(step: str) -> None:
        watch.begin(step)
        reports.send(Loading(step))

    pulse = Pulse(boot.addresses.folder, "scheduler")
    pulse.beat_for_ever()
    _bind(boot)
    ports = open_ports(boot.addresses, boot.config.serve)
    built = build_scheduler(boot.config, boot.info, progress, boot.addresses.folder)
    watch.begin("")
    reports.send(Ready(watch.seconds, built.limits, built.memory))
    _settle()
    built.scheduler.on_batch = Roll(pulse).call
    run(built.scheduler, ports, pulse)


def _follow(boot: Boot, rank: int, reports: "Reports", watch: Stopwatch) -> NoReturn:
    from headrace.engine.build import build_follower

    watch.begin("weights and KV cache")
    _bind(boot)
    try:
        follower = build_follower(boot.config, boot.info, boot.addresses.folder, rank)
    except LoadError as error:
        raise LoadError(f"rank {rank} did not finish loading: {error.message}") from error
    watch.begin("")
    reports.send(Ready(watch.seconds))
    _settle()
    follower.run()


def _detokenize(boot: Boot, number: int, reports: "Reports", watch: Stopwatch) -> NoReturn:
    from headrace.engine.parts import load_tokenizer_of
    from headrace.frontend.detokenizer import DetokenizerManager
    from headrace.frontend.router import to_frontends
    from headrace.ipc.address import numbered

    watch.begin("tokenizer")
    role = f"detokenizer-{number}" if number else "detokenizer"
    pulse = Pulse(boot.addresses.folder, role)
    pulse.beat_for_ever()
    inbox = Receiver[Deltas](numbered(boot.addresses.detokenizer, number), Deltas)
    outbox = to_frontends(boot.addresses, boot.config.serve.tokenizer_worker_num)
    manager = DetokenizerManager(load_tokenizer_of(boot.config))
    watch.begin("")
    reports.send(Ready(watch.seconds))
    _settle()
    manager.run(inbox, outbox, pulse)


def _serve(boot: Boot, number: int, reports: "Reports", lifeline: "Lifeline") -> None:
    """HTTP until the parent says that it is enough."""
    import asyncio

    import uvloop

    from headrace.engine.http_worker import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(boot, number, lambda: reports.send(Ready({})), lifeline.orders.get))
    lifeline.end()


def _bind(boot: Boot) -> None:
    """To the NUMA node that was asked for, before threads and large memory are made."""
    from headrace.engine.numa import bind

    if (node := boot.config.run.numa_node) is not None:
        bind(node)


def _settle() -> None:
    """What was loaded stays: collections need not look at it again."""
    gc.collect()
    gc.freeze()


def _log_to_stderr(role: str, level: str) -> None:
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format=f"%(asctime)s {role} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
    )


class Reports:
    """The pipe to the parent; open for as long as this process lives, so that its end shows."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        os.set_inheritable(fd, False)

    def send(self, report: wire.Report) -> None:
        with contextlib.suppress(BrokenPipeError):
            os.write(self._fd, wire.encode(report) + b"\n")


class Lifeline:
    """Ties this process to its parent, through the pipe on stdin and through the kernel."""

    def __init__(self, role: str, parent: int) -> None:
        self._boots: queue.SimpleQueue[Boot] = queue.SimpleQueue()
        # What the parent says after its first message.
        self.orders: queue.SimpleQueue[wire.Order] = queue.SimpleQueue()
        self._folder = ""
        self._leaving = threading.Lock()
        self._role = role
        setproctitle.setproctitle(f"headrace::{'-'.join([role, *sys.argv[5:]])}")
        faulthandler.enable()
        faulthandler.register(OWN_STACK, all_threads=False)
        faulthandler.register(ALL_STACKS, all_threads=True)
        # Ctrl-C and service managers signal every process; only the parent decides what it means.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        death_signal = signal.SIGKILL
        if role.startswith("detokenizer"):
            signal.signal(signal.SIGUSR1, self._leave)
            death_signal = signal.SIGUSR1
        die_with_parent(parent, death_signal)
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def boot(self) -> Boot:
        """The parent's message; waits for it."""
        boot = self._boots.get()
        setproctitle.setproctitle(f"headrace::{self._role}")
        self._folder = boot.addresses.folder
        return boot

    def _watch(self) -> None:
        rest, booted = b"", False
        while data := os.read(0, 1 << 16):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                if booted:
                    self.orders.put(wire.decode_order(line))
                else:
                    self._boots.put(wire.decode_boot(line))
                    booted = True
        self._leave()

    def end(self) -> NoReturn:
        """The work of this process is done; the folder of sockets is still in use."""
        sys.stderr.flush()
        os._exit(0)

    def _leave(self, signum: int = 0, frame: FrameType | None = None) -> None:
        """The parent is gone or wants this process to end."""
        # The kernel signals once for each dying thread of the parent, so this may interrupt itself:
        # who comes second must not wait.
        if not self._leaving.acquire(blocking=False):
            return
        if self._folder:
            address.remove(self._folder)
        os._exit(0)


if __name__ == "__main__":
    try:
        main()
    except BaseException:  # noqa: BLE001  no memory for the report
        traceback.print_exc()
    finally:
        os._exit(1)  # whatever threads are left
