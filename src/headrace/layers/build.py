"""What every layer of a model is built with."""

from dataclasses import dataclass

import torch

from headrace.dist.comm import Group
from headrace.dist.topology import Shard
from headrace.quant.base import QuantMethod


@dataclass(frozen=True)
class Build:
    """`dtype` of weights and activations, the tensor-parallel `group`, the `quant` method."""

    dtype: torch.dtype
    group: Group
    quant: QuantMethod

    @property
    def shard(self) -> Shard:
        return Shard(self.group.rank, self.group.size)
