"""The scheduler's answers to control messages: one function for each verb.

A verb takes the scheduler and the arguments of the message, and gives (text, data) of a reply; what
it raises as a HeadraceError becomes a reply that is not ok. Knows no HTTP.
"""

import gc
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.core.errors import BadRequest, HeadraceError
from headrace.core.messages import Control, ControlReply

if TYPE_CHECKING:
    from headrace.scheduler.scheduler import Scheduler

Answer = tuple[str, dict[str, Any]]

PAUSE_MODES = ("abort", "retract", "in_place")
LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_SLOW_DOWN = 10.0


class Arguments(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Those of all verbs; each reads its own. Seconds, except steps and tokens (`capacity`)."""

    since: int = 0
    mode: str = "abort"
    session_id: str | None = None
    capacity: int = 0
    idle_seconds: float | None = None
    folder: str = ""
    name: str = ""
    start_step: int | None = None
    num_steps: int | None = None
    seconds: float | None = None
    level: str = ""
    action: str = ""
    details: dict[str, Any] = {}


def answer(scheduler: "Scheduler", message: Control) -> ControlReply:
    """Do what the message asks; never raises for a wrong argument."""
    try:
        arguments = msgspec.convert(message.args, Arguments)
        text, data = VERBS[message.verb](scheduler, arguments)
    except msgspec.ValidationError as error:
        return ControlReply(message.id, False, str(error), {"status": 400}, message.origin)
    except HeadraceError as error:
        return ControlReply(
            message.id, False, error.message, {"status": error.status}, message.origin
        )
    return ControlReply(message.id, message=text, data=data, origin=message.origin)


def _ping(scheduler: "Scheduler", args: Arguments) -> Answer:
    return "", {"paused": True} if scheduler.planner.paused else {}


def _state(scheduler: "Scheduler", args: Arguments) -> Answer:
    return "", msgspec.structs.asdict(scheduler.reporter.stats())


def _watch(scheduler: "Scheduler", args: Arguments) -> Answer:
    """What a dashboard shows, with the steps after number `since`."""
    return "", scheduler.reporter.watched(args.since, scheduler.inflight)


def _flush_cache(scheduler: "Scheduler", args: Arguments) -> Answer:
    """Forget all prefixes; requests that wait for the end of a pause hold none."""
    planner = scheduler.planner
    if not (planner.running or planner.queue.waiting):
        # What is still in flight is the wasted step of requests that have ended.
        scheduler.drain()
    waits = 0 if planner.paused else len(planner.queue)
    if planner.running or waits:
        raise BadRequest(
            f"Cache not flushed: {len(planner.running)} requests run and {len(planner.queue)} wait."
        )
    scheduler.space.clear()
    planner.ratio.reset()
    return "Cache flushed.", {}


def _pause(scheduler: "Scheduler", args: Arguments) -> Answer:
    mode = args.mode
    if mode not in PAUSE_MODES:
        raise BadRequest(f"mode must be one of {', '.join(PAUSE_MODES)}, not {mode!r}")
    held = scheduler.pause(mode)
    return f"Generation paused; {held} requests are held up.", {"num_paused_requests": held}


def _continue(scheduler: "Scheduler", args: Arguments) -> Answer:
    scheduler.planner.paused = False
    return "Generation continues.", {}


def _drain(scheduler: "Scheduler", args: Arguments) -> Answer:
    scheduler.planner.draining = args.mode != "off"
    left = len(scheduler.planner.running) + len(scheduler.planner.queue)
    return "", {"left": left}


def _open_session(scheduler: "Scheduler", args: Arguments) -> Answer:
    id = scheduler.sessions.open(args.session_id, args.capacity, args.idle_seconds)
    return "", {"session_id": id}


def _close_session(scheduler: "Scheduler", args: Arguments) -> Answer:
    scheduler.sessions.close(args.session_id or "")
    return "Session closed.", {}


def _start_profile(scheduler: "Scheduler", args: Arguments) -> Answer:
    path = scheduler.trace.start(args.folder, args.name, args.start_step, args.num_steps)
    return f"Profiling starts; the trace will be {path}.", {"path": path}


def _stop_profile(scheduler: "Scheduler", args: Arguments) -> Answer:
    path = scheduler.trace.stop()
    return f"Profiling has stopped; the trace is {path}.", {"path": path}


def _slow_down(scheduler: "Scheduler", args: Arguments) -> Answer:
    seconds = args.seconds or 0.0
    if not 0.0 <= seconds <= MAX_SLOW_DOWN:
        raise BadRequest(f"forward_sleep_time must be 0 to {MAX_SLOW_DOWN:g} s, not {seconds}")
    scheduler.slow_down = float(seconds)
    return f"Every step takes {seconds:g} s more.", {}


def _log_level(scheduler: "Scheduler", args: Arguments) -> Answer:
    level = args.level
    if level not in LOG_LEVELS:
        raise BadRequest(f"log_level must be one of {', '.join(LOG_LEVELS)}, not {level!r}")
    logging.getLogger().setLevel(level.upper())
    return "", {}


def _freeze_gc(scheduler: "Scheduler", args: Arguments) -> Answer:
    gc.collect()
    gc.freeze()
    return "Collections will not look at what exists now.", {}


def _weights(scheduler: "Scheduler", args: Arguments) -> Answer:
    """Save or send the weights; steps wait until it is done, or has begun where it takes long."""
    return scheduler.runner.weights(args.action, args.details)


VERBS: dict[str, Callable[["Scheduler", Arguments], Answer]] = {
    "ping": _ping,
    "loads": _state,
    "state": _state,
    "watch": _watch,
    "flush_cache": _flush_cache,
    "pause": _pause,
    "continue": _continue,
    "drain": _drain,
    "open_session": _open_session,
    "close_session": _close_session,
    "start_profile": _start_profile,
    "stop_profile": _stop_profile,
    "slow_down": _slow_down,
    "log_level": _log_level,
    "freeze_gc": _freeze_gc,
    "weights": _weights,
}
