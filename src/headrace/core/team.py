"""What the ranks of a team tell each other: rank 0, which has the scheduler, and its followers.

    rank 0   --Join----> follower    where the memory is that all share
    follower --Loaded--> rank 0      weights are there; this is what they need
    rank 0   --Begin---> follower    the limits that all have in common
    rank 0   --Run-----> follower    one step
    follower --Done----> rank 0      only from the last stage of a pipeline, in order
    rank 0   --Weights-> follower    save or send its weights
    follower --Weighed-> rank 0      what came of it

Plain data. Knows no sockets.
"""

from typing import Any

import msgspec

from headrace.core.config import Limits
from headrace.core.plan import Extra, StepPlan, StepResult


class Join(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """`memory`: a path that ranks of this machine can open (`dist.shared`)."""

    memory: str


class Loaded(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Bytes of this rank's weights, of a token in its cache, and what was free before."""

    rank: int
    weights: int
    per_token: int
    available: int


class Begin(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """The sizes that every rank makes its tables and caches with."""

    limits: Limits


class Run(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Execute a plan, whose extras come apart, with their types.

    `learned`: (row, position, token) of tokens that the last stage has sampled since the last Run.
    """

    plan: StepPlan
    extras: list[Extra] = []
    learned: list[tuple[int, int, int]] = []


class Done(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What came of a plan."""

    result: StepResult


class Weights(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """An action on weights, see `runner.weights`."""

    action: str
    details: dict[str, Any]


class Weighed(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """What an action gave, or the error that it ended with."""

    rank: int
    data: dict[str, Any] = {}
    error: str = ""


ToFollower = Join | Begin | Run | Weights
FromFollower = Loaded | Done | Weighed
