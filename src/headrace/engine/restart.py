"""When a lost process is started again, together with whom, and what the others hear of it. Pure.

A team is the processes that share a state and cannot go on without each other: a scheduler and its
follower ranks. The budget bounds how often: a server that cannot stay up ends.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from headrace.engine.boot import Ready

# Seconds before the second restart within the window; each further one doubles it.
_FIRST_DELAY = 0.1
_LONGEST_DELAY = 10.0
SCHEDULER = "scheduler"
FOLLOWER = "rank-"
HTTP = "http-"


@dataclass(frozen=True)
class Down:
    """Processes were lost and will be started again. `batch`: see `ipc.pulse`, `{}` if unknown."""

    roles: tuple[str, ...]
    why: str
    batch: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Up:
    """They serve again, after `seconds`."""

    reports: dict[str, Ready]
    seconds: float


class Budget:
    """At most `limit` restarts within `window` seconds."""

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        self._at: deque[float] = deque()

    def delay(self, now: float) -> float | None:
        """Seconds to wait before the restart that is due at `now`; None: it is one too many."""
        while self._at and now - self._at[0] > self._window:
            self._at.popleft()
        before = len(self._at)
        if before >= self._limit:
            return None
        self._at.append(now)
        return min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** (before - 1)) if before else 0.0


def team_of(role: str, roles: Sequence[str]) -> tuple[str, ...]:
    """Who is started again when `role` is lost."""
    if role == SCHEDULER or role.startswith(FOLLOWER):
        return tuple(name for name in roles if name == SCHEDULER or name.startswith(FOLLOWER))
    return (role,)
