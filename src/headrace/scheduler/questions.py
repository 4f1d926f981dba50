"""The questions that planning asks of features, all of them at once.

A feature that fails for one request fails that request: it is not planned, and left in `broken` for
the scheduler to end. Knows no feature by name.
"""

from collections.abc import Sequence
from typing import Any

from headrace.core import faults
from headrace.core.plan import Chunk
from headrace.scheduler.feature import Feature
from headrace.scheduler.request import Request


class Questions:
    """`depth` is how many plans may be in flight."""

    def __init__(self, features: Sequence[Feature], depth: int) -> None:
        self.broken: list[tuple[Request, Exception]] = []
        self._features = features
        self._depth = depth
        # Those with an answer of their own; they are asked for every request of every step.
        self._holding = _with_answer("holds", features)
        self._chaining = _with_answer("chain", features)

    def may_run(self, request: Request) -> bool:
        """Nobody holds a running request, and all let it be in one plan more."""
        if not self._features:
            return request.inflight < self._depth
        try:
            if faults.ON:
                faults.strike("plan", [request.spec.sampling.seed])
            if any(feature.holds(request) for feature in self._holding):
                return False
            chains = (feature.chain(request, self._depth) for feature in self._chaining)
            return request.inflight < min(chains, default=self._depth)
        except Exception as error:  # noqa: BLE001  it fails this request, not the server
            self.broken.append((request, error))
            return False

    def may_start(self, request: Request, admitted: Sequence[Request]) -> bool:
        """Nothing in the background is missing, and it fits beside those already in the plan."""
        try:
            return all(
                feature.ready(request) and feature.admit(request, admitted)
                for feature in self._features
            )
        except Exception as error:  # noqa: BLE001  it fails this request, not the server
            self.broken.append((request, error))
            return False

    def extras(self, chunks: Sequence[Chunk], requests: Sequence[Request]) -> tuple[Any, ...]:
        """What features add to a plan."""
        found = (self._extra(feature, chunks, requests) for feature in self._features)
        return tuple(extra for extra in found if extra is not None)

    def _extra(self, feature: Feature, chunks: Sequence[Chunk], requests: Sequence[Request]) -> Any:
        """A request that it fails for stays in the plan, without, and is ended after it."""
        try:
            return feature.attach(chunks, requests)
        except Exception:  # noqa: BLE001  the next lines find out whose it is
            sound = []
        for chunk, request in zip(chunks, requests, strict=True):
            try:
                feature.attach([chunk], [request])
                sound.append((chunk, request))
            except Exception as error:  # noqa: BLE001  it fails this request, not the server
                self.broken.append((request, error))
        return feature.attach([chunk for chunk, _ in sound], [request for _, request in sound])


def _with_answer(question: str, features: Sequence[Feature]) -> list[Feature]:
    """Features that do not give the default answer."""
    default = getattr(Feature, question)
    return [one for one in features if getattr(getattr(one, question), "__func__", 0) != default]
