"""A trace of the scheduler's steps, in the JSON form that Perfetto and chrome://tracing read.

    scheduler track   plan, launch, commit, send
    runner track      run, with the composition of its batch

Off it costs a comparison at each place. On it is bounded: recording ends with `num_steps`, with
`stop`, or when `MAX_EVENTS` are held. The format is Google's "Trace Event Format". Knows no plans
but what it writes of them.
"""

import logging
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.plan import StepPlan, StepResult
from headrace.scheduler.planner import Planner

logger = logging.getLogger(__name__)

# About 10 MB, written in some tens of milliseconds.
MAX_EVENTS = 50_000
MAX_STEPS = 1 << 31
SUFFIX = ".trace.json"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_SCHEDULER, _RUNNER = 1, 2


class Trace:
    """Records while `on`; one recording at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.on = False
        self._clock = clock
        self._path: Path | None = None
        self._events: list[dict[str, Any]] = []
        self._first = 0
        self._left: int | None = None
        self._last = 0
        self._run_end = 0.0

    def start(self, folder: str, name: str, start_step: int | None, num_steps: int | None) -> str:
        """Record from step `start_step` on (now without), for `num_steps`; returns the file.

        Raises:
            BadRequest: a recording is on, or an argument is out of its bounds.
        """
        if self._path is not None:
            raise BadRequest("a profile is being recorded; stop it first")
        for field, value in (("start_step", start_step), ("num_steps", num_steps)):
            if value is not None and not 1 <= value <= MAX_STEPS:
                raise BadRequest(f"{field} must be 1 to {MAX_STEPS}, not {value}", field=field)
        name = name or time.strftime("%Y%m%d-%H%M%S")
        if not _NAME.fullmatch(name):
            raise BadRequest(
                "the name of a profile has letters, digits, '_', '.' and '-' only, at most 128",
                field="profile_id",
            )
        self._path = Path(folder, name + SUFFIX)
        if self._path.exists():
            self._path = Path(folder, f"{name}-{time.time_ns()}{SUFFIX}")
        self._events = [_named(_SCHEDULER, "scheduler"), _named(_RUNNER, "runner")]
        self._first, self._left, self._last = start_step or 0, num_steps, 0
        self.on = start_step is None
        return str(self._path)

    def stop(self) -> str:
        """End the recording and write it; returns the file.

        Raises:
            BadRequest: none is on. HeadraceError: it cannot be written.
        """
        path, events = self._path, self._events
        if path is None:
            raise BadRequest("no profile is being recorded")
        self.on, self._path, self._events = False, None, []
        data = msgspec.json.encode({"traceEvents": events, "displayTimeUnit": "ms"})
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = path.with_suffix(".part")
            partial.write_bytes(data)
            partial.replace(path)
        except OSError as error:
            raise HeadraceError(f"the profile cannot be written: {error}") from error
        return str(path)

    def mark(self) -> float:
        """The beginning of a span; 0 while nothing is recorded."""
        return self._clock() if self.on else 0.0

    def add(self, name: str, began: float) -> None:
        """A span of the scheduler, from a `mark` to now."""
        if self.on and began:
            self._events.append(_span(name, _SCHEDULER, began, self._clock(), {}))

    def launched(self, plan: StepPlan, future: "Future[StepResult]", planner: Planner) -> None:
        """A plan went to the runner; its run is over when `future` is done."""
        if self._path is None:
            return
        self.on = self.on or plan.step >= self._first
        if not self.on:
            return
        at, events = self._clock(), self._events
        batch = composition(plan, planner)
        events.append(_counter(at, batch))

        def ran(_: "Future[StepResult]") -> None:
            # In the runner's thread. Plans run one after another, so a run begins at its launch or
            # with the end of the one before.
            began, self._run_end = max(at, self._run_end), self._clock()
            events.append(_span("run", _RUNNER, began, self._run_end, batch))

        future.add_done_callback(ran)
        if self._left is not None:
            self._left -= 1
        if not self._last and (self._left == 0 or len(events) >= MAX_EVENTS):
            self._last = plan.step

    def committed(self, plan: StepPlan) -> None:
        """The result of a plan was taken in; ends the recording after its last step."""
        if self.on and self._last and plan.step >= self._last:
            try:
                logger.info("Profiling has ended; the trace is %s", self.stop())
            except HeadraceError as error:
                logger.error(error.message)


def composition(plan: StepPlan, planner: Planner) -> dict[str, Any]:
    """What a step works on: requests and tokens by kind."""
    prefill = [chunk.count for chunk in plan.chunks if chunk.count > 1]
    return {
        "step": plan.step,
        "decode_requests": len(plan.chunks) - len(prefill),
        "prefill_requests": len(prefill),
        "prefill_tokens": sum(prefill),
        "new_requests": len(plan.new_rows),
        "running": len(planner.running),
        "waiting": len(planner.queue),
        "used_tokens": planner.space.used_tokens,
    }


def _span(
    name: str, track: int, began: float, ended: float, args: dict[str, Any]
) -> dict[str, Any]:
    """A complete event; times of the format are microseconds."""
    return {
        "name": name,
        "ph": "X",
        "pid": os.getpid(),
        "tid": track,
        "ts": began * 1e6,
        "dur": (ended - began) * 1e6,
        "args": args,
    }


def _counter(at: float, batch: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "requests",
        "ph": "C",
        "pid": os.getpid(),
        "tid": _SCHEDULER,
        "ts": at * 1e6,
        "args": {name: batch[name] for name in ("running", "waiting")},
    }


def _named(track: int, name: str) -> dict[str, Any]:
    return {
        "name": "thread_name",
        "ph": "M",
        "pid": os.getpid(),
        "tid": track,
        "args": {"name": name},
    }
