"""The two protocols of the scheduler: the runner below it and the features beside it.

A feature is an object that answers eleven questions; each has an answer that changes nothing, so a
feature overrides only what it needs. Knows no feature by name.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from headrace.core.messages import FinishReason
from headrace.core.plan import StepPlan, StepResult
from headrace.scheduler.request import Request


class Clock(Protocol):
    """Seconds since some fixed moment; virtual in the simulator."""

    def __call__(self) -> float: ...


class Runner(Protocol):
    """Executes plans strictly in the order they are launched."""

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Start a plan; returns at once. Device errors come back in `StepResult.error`."""
        ...

    def weights(self, action: str, details: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Do something with the weights of all ranks (`runner.weights`): a text and data.

        Raises:
            HeadraceError: it was refused, or failed.
        """
        ...


class Feature:
    """Default answers. `depth` is how many plans may be in flight."""

    def check(self, request: Request) -> str | None:
        """May the request be accepted at all? Returns an error text, or None."""
        return None

    def ready(self, request: Request) -> bool:
        """Has its background work ended?"""
        return True

    def admit(self, request: Request, admitted: Sequence[Request]) -> bool:
        """Does it fit beside the requests already in this plan?"""
        return True

    def chain(self, request: Request, depth: int) -> int:
        """How many plans may hold it at once."""
        return depth

    def draft(self, request: Request, room: int) -> tuple[int, ...]:
        """Tokens to verify in this step."""
        return ()

    def holds(self, request: Request) -> bool:
        """Keep its pages but do not run it."""
        return False

    def attach(self, chunks: Sequence[Any], requests: Sequence[Request]) -> Any:
        """An extra to send with the plan, or None."""
        return None

    def on_tokens(self, request: Request, tokens: Sequence[int], extras: Sequence[Any]) -> None:
        """Tokens were committed."""

    def on_finish(self, request: Request) -> None:
        """Forget it."""

    def poll(self) -> Sequence[tuple[Request, FinishReason]]:
        """Requests that its background work has ended, with the reason."""
        return ()

    def stats(self) -> dict[str, Any]:
        """What it has counted: fields of `SchedulerStats`."""
        return {}
