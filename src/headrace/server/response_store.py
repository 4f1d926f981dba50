"""Responses that clients may come back to: in memory, so many at most. For one event loop."""

import asyncio
from dataclasses import dataclass, field
from typing import Any

from headrace.core.errors import BadRequest, NotFound
from headrace.core.tenant import is_mine


@dataclass
class Stored:
    """A response, the items of the conversation up to its answer, and the task that makes it."""

    response: dict[str, Any]
    inputs: list[dict[str, Any]]
    # Items of the responses before this one.
    history: list[dict[str, Any]] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        """All items, from the first response of the chain to the answer of this one."""
        return [*self.history, *self.inputs, *self.response["output"]]

    @property
    def running(self) -> bool:
        return self.task is not None and not self.task.done()


class ResponseStore:
    """The newest `size` responses by id; with `size` 0 the store is off."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._kept: dict[str, Stored] = {}

    def check_on(self, field: str) -> None:
        """Raise BadRequest for a field that needs the store when it is off."""
        if not self.size:
            raise BadRequest(
                f"{field}: this server keeps no responses; start it with --enable-response-store",
                field=field,
            )

    def put(self, stored: Stored) -> None:
        """Keep or replace a response. The oldest that are complete make room."""
        self._kept[stored.response["id"]] = stored
        surplus = len(self._kept) - self.size
        if surplus > 0:
            done = [id for id, kept in self._kept.items() if not kept.running]
            for id in done[:surplus]:
                del self._kept[id]

    def get(self, id: str) -> Stored:
        """The response with this id.

        Raises:
            NotFound: there is none (any more), or the store is off.
        """
        found = self._kept.get(id) if is_mine(id) else None
        if found is None:
            hint = "" if self.size else "; the store is off (--enable-response-store)"
            raise NotFound(f"Response {id!r} not found{hint}.", field="response_id")
        return found

    def delete(self, id: str) -> None:
        """Forget a response; one that is being made is stopped. Raises NotFound."""
        stored = self.get(id)
        if stored.task is not None:
            stored.task.cancel()
        del self._kept[id]
