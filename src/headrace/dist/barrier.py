"""Waits until every rank has done something, and names those that have not.

Over any store of keys that ranks share (`torch.distributed`'s, or a dict in a test). Knows neither
torch nor what is waited for. Invariant: every rank that comes learns the same verdict.
"""

import time
from collections.abc import Callable
from typing import Protocol

from headrace.core.errors import LoadError

LOADING_SECONDS = 480.0
_LOOK_SECONDS = 0.05


class Keys(Protocol):
    """What a barrier needs of a store; `set` and `get` take and give bytes."""

    def set(self, key: str, value: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...


def wait_for_ranks(
    keys: Keys,
    name: str,
    rank: int,
    size: int,
    seconds: float = LOADING_SECONDS,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return when all `size` ranks have come to the barrier `name`, which is used once.

    Rank 0 decides and writes down who is missing, so all that came raise the same error.

    Raises:
        LoadError: some rank did not come within `seconds`; names all such.
    """
    keys.set(f"{name}/{rank}", b"1")
    end = clock() + seconds
    # Others leave rank 0 the time to decide.
    wanted = [f"{name}/{other}" for other in range(size)] if rank == 0 else [f"{name}/verdict"]
    grace = 0.0 if rank == 0 else seconds / 10 + 1.0
    while not (there := keys.check(wanted)) and clock() < end + grace:
        sleep(_LOOK_SECONDS)
    if rank == 0:
        late = [] if there else [r for r in range(size) if not keys.check([f"{name}/{r}"])]
        missing = ", ".join(map(str, late))
        keys.set(f"{name}/verdict", missing.encode())
    else:
        missing = keys.get(f"{name}/verdict").decode() if there else "0"
    if missing:
        raise LoadError(
            f"rank {rank} could finish loading the model, but within {seconds:g} s rank(s) "
            f"{missing} of {size} could not: see their logs; often memory or a slow disk"
        )
