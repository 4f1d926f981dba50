"""A runner that is a team: rank 0 here, the other ranks in processes of their own.

    Team        what the scheduler sees: sends every plan to all ranks, runs its own part
    Follower    what another rank is all its life

All ranks execute the same plans in the same order. Ranks of the last stage have equal logits and
sample the same tokens, each into its own tables; ranks of other stages learn them with the next
plan. The scheduler plans a request again only when it has seen what was sampled, if there are
stages. A rank that fails ends: what ranks exchange no longer fits together.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any, NoReturn

import msgspec

from headrace.core.config import Config
from headrace.core.errors import HeadraceError, LoadError
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.core.plan import StepPlan, StepResult
from headrace.core.team import (
    Begin,
    Done,
    FromFollower,
    Join,
    Loaded,
    Run,
    ToFollower,
    Weighed,
    Weights,
)
from headrace.dist.topology import Grid
from headrace.ipc.channels import Sender
from headrace.runner.meeting import Meeting, meeting_of
from headrace.runner.model_runner import DeviceHalf
from headrace.runner.seat import Seat, grid_of, seat_in
from headrace.runner.weights import Answer
from headrace.runner.worker import TpModelWorker, load_part, make_runner

logger = logging.getLogger(__name__)


class Team:
    """Rank 0 and, behind it, all others. The same to the scheduler as a `TpModelWorker`.

    `folder` is where the ranks' sockets are, if all are on this machine.

    Raises:
        LoadError: this rank cannot load its part, or another did not.
    """

    def __init__(
        self,
        config: Config,
        info: ModelInfo,
        hardware: Hardware,
        folder: str,
        halves: Sequence[DeviceHalf] = (),
    ) -> None:
        grid = grid_of(config.parallel)
        self._timeout = config.parallel.dist_timeout
        meeting = meeting_of(config, info, folder, 0)
        self._inbox = meeting.inbox(FromFollower)
        self._followers: list[Sender] = []
        try:
            self._followers += map(meeting.outbox, range(1, grid.size))
            meeting.watch(grid, grid.place(0))
            seat = self._sit(config, grid, meeting)
            self._worker = TpModelWorker(config, info, hardware, halves, seat)
        except BaseException:
            self._hang_up()
            raise
        self.limits = self._worker.limits
        self.memory = self._worker.memory
        self.prefix_scope = self._worker.prefix_scope
        self._staged = grid.pp > 1
        # Plans that are in the pipeline, and tokens that ranks before the last stage do not know.
        self._under_way: deque[tuple[StepPlan, Future[StepResult]]] = deque()
        self._learned: deque[tuple[int, int, int]] = deque()
        self._weighed: SimpleQueue[Weighed] = SimpleQueue()
        if self._staged:
            threading.Thread(target=self._hear, name="results", daemon=True).start()

    def launch(self, plan: StepPlan) -> "Future[StepResult]":
        """Give a plan to all ranks; returns at once."""
        learned = [self._learned.popleft() for _ in range(len(self._learned))]
        bare = msgspec.structs.replace(plan, extras=()) if plan.extras else plan
        self._tell(Run(bare, list(plan.extras), learned))
        own = self._worker.launch(plan, learned)
        if not self._staged:
            return own
        result: Future[StepResult] = Future()
        self._under_way.append((plan, result))
        own.add_done_callback(lambda future: _pass_on_failure(future, result))
        return result

    def weights(self, action: str, details: dict[str, Any]) -> Answer:
        """An action on the weights of every rank: here first, then on the others at once.

        Raises:
            HeadraceError: it was refused, or failed on some rank.
        """
        text, data = self._worker.weights(action, details)
        self._tell(Weights(action, details))
        answers = {answer.rank: answer for answer in self._weighings()}
        for rank in sorted(answers):
            if answers[rank].error:
                raise LoadError(f"rank {rank}: {answers[rank].error}")
            data = {key: value + answers[rank].data[key] for key, value in data.items()}
        return text, data

    def _weighings(self) -> Iterator[Weighed]:
        deadline = time.monotonic() + self._timeout
        for _ in self._followers:
            left = max(0.0, deadline - time.monotonic())
            while not self._staged and self._weighed.empty():
                news = self._inbox.take(int(left * 1000))
                if not news:
                    break
                self._take(news)
            try:
                yield self._weighed.get(timeout=left)
            except Empty:
                raise LoadError(f"some rank did not answer within {self._timeout} s") from None

    def close(self) -> None:
        """End this rank's thread; the followers are processes that others end."""
        self._worker.close()
        if not self._staged:  # else a thread waits for results for ever
            self._hang_up()

    def _sit(self, config: Config, grid: Grid, meeting: Meeting) -> Seat:
        memory, place = meeting.make_memory(grid), grid.place(0)
        self._tell(Join(memory))
        seat = seat_in(meeting.ways(memory, grid, place), place, config)
        return replace(seat, meet=self._meet, begin=lambda limits: self._tell(Begin(limits)))

    def _hang_up(self) -> None:
        self._inbox.close()
        for follower in self._followers:
            follower.close()

    def _tell(self, message: ToFollower) -> None:
        for follower in self._followers:
            follower.send(message)

    def _meet(self, needs: Loaded) -> Sequence[Loaded]:
        """What every rank needs, as soon as all have loaded their weights."""
        found = {needs.rank: needs}
        deadline = time.monotonic() + self._timeout
        while missing := sorted(set(range(len(self._followers) + 1)) - found.keys()):
            left = deadline - time.monotonic()
            if left <= 0:
                ranks = f"rank {missing[0]}" if len(missing) == 1 else f"ranks {missing}"
                raise LoadError(
                    f"{ranks} did not finish loading within {self._timeout} s of rank 0 "
                    "(--dist-timeout)",
                    field="dist_timeout",
                )
            for news in self._inbox.take(int(left * 1000) + 1):
                assert isinstance(news, Loaded)
                found[news.rank] = news
        return [found[rank] for rank in sorted(found)]

    def _hear(self) -> None:
        """Results of the last stage, in order; on a thread of its own."""
        while True:
            self._take(self._inbox.take(None))

    def _take(self, messages: Sequence[FromFollower]) -> None:
        for news in messages:
            if isinstance(news, Weighed):
                self._weighed.put(news)
                continue
            assert isinstance(news, Done)
            plan, future = self._under_way.popleft()
            self._learned.extend(sampled(plan, news.result))
            if not future.done():
                future.set_result(news.result)


def sampled(plan: StepPlan, result: StepResult) -> list[tuple[int, int, int]]:
    """(row, position, token) of every token that a plan added."""
    return [
        (chunk.row, chunk.start + chunk.count + index, token)
        for chunk, outcome in zip(plan.chunks, result.chunks, strict=False)
        for index, token in enumerate(outcome.tokens)
    ]


def _pass_on_failure(own: "Future[StepResult]", result: "Future[StepResult]") -> None:
    error = None if own.cancelled() else own.exception()
    if error is not None and not result.done():
        result.set_exception(error)


class Follower:
    """Another rank: loads its part, then executes what rank 0 says. All on the calling thread.

    Raises:
        LoadError: it cannot load its part.
    """

    def __init__(
        self,
        config: Config,
        info: ModelInfo,
        hardware: Hardware,
        folder: str,
        rank: int,
        halves: Sequence[DeviceHalf] = (),
    ) -> None:
        meeting = meeting_of(config, info, folder, rank)
        self._inbox = meeting.inbox(ToFollower)
        self._news: deque[ToFollower] = deque()
        self._outbox = meeting.outbox(0)
        grid = grid_of(config.parallel)
        place = grid.place(rank)
        meeting.watch(grid, place)
        joined = self._next()
        assert isinstance(joined, Join)
        logger.info("rank %d: machine %d, device %d", rank, place.node, place.gpu_id)
        seat = seat_in(meeting.ways(joined.memory, grid, place), place, config)
        # All ranks of the last stage have the same results; the first one tells them.
        self._tells = seat.place.pp_rank == grid.pp - 1 > 0 and seat.place.tp_rank == 0
        part = load_part(config, info, hardware, seat)
        self._outbox.send(part.needs)
        begin = self._next()
        assert isinstance(begin, Begin)
        self._part = part
        self._runner = make_runner(config, info, part, begin.limits, halves)

    def run(self) -> NoReturn:
        """Execute plans for ever."""
        while True:
            work = self._next()
            if isinstance(work, Weights):
                self._outbox.send(self._weigh(work))
                continue
            assert isinstance(work, Run)
            plan = work.plan
            if work.extras:
                plan = msgspec.structs.replace(plan, extras=tuple(work.extras))
            self._runner.learn(work.learned)
            result = self._runner.execute(plan)
            if self._tells:
                self._outbox.send(Done(result))

    def _weigh(self, work: Weights) -> Weighed:
        rank = self._part.seat.place.rank
        try:
            _, data = self._part.weights.do(work.action, work.details)
        except HeadraceError as error:
            return Weighed(rank, error=error.message)
        return Weighed(rank, data)

    def _next(self) -> ToFollower:
        while not self._news:
            self._news.extend(self._inbox.take(None))
        return self._news.popleft()
