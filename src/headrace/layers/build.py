"""What every layer of a model is built with."""

from dataclasses import dataclass, replace

import torch

from headrace.dist.comm import Group, Link
from headrace.dist.topology import Shard
from headrace.quant.base import Kind, Quantization, QuantMethod

_ALONE = Shard()


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline: `before` and `after` lead from and to its neighbors."""

    shard: Shard = _ALONE
    before: Link | None = None
    after: Link | None = None

    @property
    def first(self) -> bool:
        return self.shard.rank == 0

    @property
    def last(self) -> bool:
        return self.shard.rank == self.shard.size - 1


_ONE_STAGE = Stage()


@dataclass(frozen=True)
class Split:
    """How a model is cut beyond its tensor-parallel group.

    `experts`: groups of ranks that experts are dealt to. `units`: parts that sums are cut into
    whatever the number of ranks, 0 for as many as there are ranks.
    """

    stage: Stage = _ONE_STAGE
    experts: int = 1
    units: int = 0


WHOLE = Split()


@dataclass(frozen=True)
class Build:
    """`dtype` of weights and activations, the tensor-parallel `group`, the quantization.

    `prefix`: what the names of the layer's tensors begin with.
    """

    dtype: torch.dtype
    group: Group
    quant: Quantization
    prefix: str = ""
    split: Split = WHOLE

    @property
    def rank(self) -> int:
        """The number of this rank among those of all stages."""
        return self.split.stage.shard.rank * self.group.size + self.group.rank

    @property
    def shard(self) -> Shard:
        return Shard(self.group.rank, self.group.size, self.split.units)

    @property
    def expert_shards(self) -> tuple[Shard, Shard]:
        """Which experts this rank has, and which part of them.

        Sums over experts in units that do not depend on ranks need whole experts.
        """
        if self.split.units:
            return self.shard, Shard()
        rank, size = self.group.rank, self.group.size // self.split.experts
        return Shard(rank // size, self.split.experts), Shard(rank % size, size)

    def at(self, name: str) -> "Build":
        """For the layer `name` of this one."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def method(self, *modules: str, kind: Kind = "linear", stacked: str = "") -> QuantMethod:
        """The method of a linear layer with these parts; see `Quantization`."""
        names = [self.prefix + name for name in modules]
        return self.quant.method(names, kind, stacked and self.prefix + stacked)
