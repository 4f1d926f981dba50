"""Who is to blame for a crash or a failed step, from who was there how often. Pure."""

import errno
from collections.abc import Mapping
from typing import TypeVar

# Output tokens after which a request that goes on had no part in what failed before.
CLEARED_AFTER = 16

T = TypeVar("T")
_WORDS = ("can't allocate memory", "not enough memory", "can't start new thread")


def culprit(batch: Mapping[T, int]) -> T | None:
    """Who of a batch that failed was in one that failed before: the one with the most strikes.

    `batch` is {who: strikes without much progress since}. With several of them nobody can tell;
    the scheduler then lets them run one at a time.
    """
    most = max(batch.values(), default=0)
    found = [who for who, strikes in batch.items() if strikes == most]
    return found[0] if most and len(found) == 1 else None


def exhausted(error: BaseException) -> bool:
    """The process gets no memory or threads. No request is to blame; it takes a new process."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS)
