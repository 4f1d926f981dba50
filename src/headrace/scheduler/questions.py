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

    def may_run(self, request: Request) -> bool:
        """Nobody holds a running request, and all let it be in one plan more."""
        if not self._features:
            return request.inflight < self._depth
        try:
            if faults.ON:
                faults.strike("plan", [request.spec.sampling.seed])
            if any(feature.holds(request) for feature in self._features):
                return False
            chain = min(feature.chain(request, self._depth) for feature in self._features)
            return request.inflight < chain
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
