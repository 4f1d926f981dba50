"""Finds children that are stuck, has them write their stacks, and kills them. Their death is then
noticed like any other. Knows pulses, no messages."""

import logging
import time
from collections.abc import Iterable, Mapping

from headrace.engine import crash
from headrace.engine.child import Child
from headrace.ipc.pulse import SILENT, Pulse

logger = logging.getLogger(__name__)

# How long a stuck child may take to write its stacks.
_STACKS_SECONDS = 1.0


def look(children: Iterable[Child], pulses: Mapping[str, Pulse], limit: float) -> None:
    """To be called often. `limit` (s) is how long one turn, or a silence, may last; 0 for ever."""
    for child in children:
        if child.ready is None or not limit:
            continue
        if child.stuck:
            if time.monotonic() - child.stuck_at > _STACKS_SECONDS:
                child.process.kill()
            continue
        reading = pulses[child.role].read()
        if reading is not None and max(reading.busy, reading.silent - SILENT) > limit:
            doing = "at one step" if reading.busy > reading.silent else "not running at all"
            child.stuck = f"The {child.role} process was stuck ({doing} for {limit:g} s)."
            logger.error(child.stuck)
            crash.ask_for_stacks(child)
            child.stuck_at = time.monotonic()
