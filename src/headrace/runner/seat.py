"""A rank's place in its team, and its ways to the other ranks.

Knows no sockets: `meet` and `begin` are how rank 0 hears what all ranks need and tells them the
limits; a rank alone hears itself and tells nobody.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headrace.core.config import Config, Limits
from headrace.core.team import Loaded
from headrace.core.weight_options import ParallelOptions
from headrace.dist.comm import Group, SoloGroup, Ways
from headrace.dist.topology import Grid, Place, Shard, share_of_cores
from headrace.layers.build import Split, Stage


def _only_me(needs: Loaded) -> Sequence[Loaded]:
    return [needs]


def _tell_nobody(limits: Limits) -> None:
    pass


@dataclass(frozen=True)
class Seat:
    """Where a rank sits."""

    place: Place
    grid: Grid
    group: Group
    split: Split
    meet: Callable[[Loaded], Sequence[Loaded]] = _only_me
    begin: Callable[[Limits], None] = _tell_nobody

    def take_cores(self) -> None:
        """Keep the calling thread, and threads it will start, on this rank's share of the cores."""
        if self.grid.size == 1:
            return
        here = self.grid.on_node(self.place.node)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, share_of_cores(cores, here.index(self.place), len(here)))


def grid_of(parallel: ParallelOptions) -> Grid:
    """All ranks that the options ask for."""
    return Grid(
        tp=parallel.tp_size,
        pp=parallel.pp_size,
        ep=parallel.ep_size,
        nodes=parallel.nnodes,
        base_gpu_id=parallel.base_gpu_id,
        gpu_id_step=parallel.gpu_id_step,
    )


def seat_alone(config: Config) -> Seat:
    """The only rank there is."""
    grid = Grid()
    return Seat(grid.place(0), grid, SoloGroup(), Split(units=config.parallel.deterministic_tp))


ALONE = Seat(Grid().place(0), Grid(), SoloGroup(), Split())


def seat_in(ways: Ways, place: Place, config: Config) -> Seat:
    """The seat of a rank of a team."""
    grid = grid_of(config.parallel)
    stage = Stage(
        Shard(place.pp_rank, grid.pp),
        before=ways.link(grid.place(place.rank - grid.tp)) if place.pp_rank > 0 else None,
        after=ways.link(place) if place.pp_rank < grid.pp - 1 else None,
    )
    split = Split(stage, grid.ep, config.parallel.deterministic_tp)
    return Seat(place, grid, ways.group(place), split)
