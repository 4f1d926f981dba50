"""An event loop in a thread of its own, for callers that have another loop or none."""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any, TypeVar

from headrace.core.errors import Cancelled, HeadraceError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads and loops; what the caller abandons is canceled."""

    def __init__(self) -> None:
        import uvloop

        self._loop = uvloop.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="headrace-engine", daemon=True
        )
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        """Begin; the future may be canceled."""
        if self._closed:
            work.close()
            raise HeadraceError("The engine was shut down.")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Block until it is done."""
        future = self.start(work)
        try:
            return future.result()
        finally:
            future.cancel()

    async def arun(self, work: Coroutine[Any, Any, T]) -> T:
        """Wait for it on the caller's loop."""
        return await asyncio.wrap_future(self.start(work))

    def iterate(self, items: AsyncGenerator[T, None]) -> Iterator[T]:
        """The items, in the caller's thread; they are produced ahead."""
        arrived: queue.SimpleQueue[_Item[T]] = queue.SimpleQueue()
        pump = self.start(_pump(items, arrived.put))
        try:
            while (item := arrived.get()) is not None:
                yield _unwrap(item)
        finally:
            pump.cancel()

    async def aiterate(self, items: AsyncGenerator[T, None]) -> AsyncIterator[T]:
        """The items, on the caller's loop; they are produced ahead."""
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[_Item[T]] = asyncio.Queue()
        pump = self.start(
            _pump(items, lambda item: loop.call_soon_threadsafe(arrived.put_nowait, item))
        )
        try:
            while (item := await arrived.get()) is not None:
                yield _unwrap(item)
        finally:
            pump.cancel()

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Run `last`, cancel what is left, end the thread."""
        future = self.start(_finish(last))
        self._closed = True
        future.result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


# A value, the error that ends the iteration, or None for its end.
_Item = tuple[T] | BaseException | None


async def _pump(items: AsyncGenerator[T, None], put: Callable[["_Item[T]"], Any]) -> None:
    try:
        async with aclosing(items):
            async for item in items:
                put((item,))
    except asyncio.CancelledError:
        put(Cancelled("The engine was shut down."))
        raise
    except Exception as error:  # noqa: BLE001  it is raised where the items are taken
        put(error)
    else:
        put(None)


def _unwrap(item: "tuple[T] | BaseException") -> T:
    if isinstance(item, BaseException):
        raise item
    return item[0]


async def _finish(last: Coroutine[Any, Any, None]) -> None:
    await last
    # Requests that were ended by it get a moment to tell their callers.
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=1.0)
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
