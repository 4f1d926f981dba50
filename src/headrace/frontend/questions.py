"""Control messages to the scheduler that wait for their answers. Knows no sockets."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

from headrace.core.errors import HeadraceError
from headrace.core.messages import Control, ControlReply, Verb


class Questions:
    """Those of one frontend, by number. Belongs to one event loop."""

    def __init__(self, origin: int) -> None:
        self._origin = origin
        self._ids = itertools.count(1)
        self._open: dict[int, asyncio.Future[ControlReply]] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def ask(
        self, send: Callable[[Control], None], verb: Verb, args: dict[str, Any], timeout: float
    ) -> ControlReply:
        """The answer to a verb.

        Raises:
            HeadraceError: no answer within `timeout` seconds, or there can be none.
        """
        message = Control(next(self._ids), verb, args, self._origin)
        reply = self._open[message.id] = asyncio.get_running_loop().create_future()
        try:
            send(message)
            async with asyncio.timeout(timeout):
                return await reply
        except TimeoutError:
            raise HeadraceError(f"no answer to {verb} within {timeout:g} s") from None
        finally:
            del self._open[message.id]

    def answer(self, reply: ControlReply) -> None:
        """An answer came; one that nobody waits for is dropped."""
        asked = self._open.get(reply.id)
        if asked is not None and not asked.done():
            asked.set_result(reply)

    def fail(self, error: HeadraceError) -> None:
        """There will be no answers."""
        for asked in self._open.values():
            if not asked.done():
                asked.set_exception(error)
