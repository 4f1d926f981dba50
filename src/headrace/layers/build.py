"""What every layer of a model is built with."""

from dataclasses import dataclass, replace

import torch

from headrace.dist.comm import Group
from headrace.dist.topology import Shard
from headrace.quant.base import Kind, Quantization, QuantMethod


@dataclass(frozen=True)
class Build:
    """`dtype` of weights and activations, the tensor-parallel `group`, the quantization.

    `prefix`: what the names of the layer's tensors begin with.
    """

    dtype: torch.dtype
    group: Group
    quant: Quantization
    prefix: str = ""

    @property
    def shard(self) -> Shard:
        return Shard(self.group.rank, self.group.size)

    def at(self, name: str) -> "Build":
        """For the layer `name` of this one."""
        return replace(self, prefix=f"{self.prefix}{name}.")

    def method(self, *modules: str, kind: Kind = "linear", stacked: str = "") -> QuantMethod:
        """The method of a linear layer with these parts; see `Quantization`."""
        names = [self.prefix + name for name in modules]
        return self.quant.method(names, kind, stacked and self.prefix + stacked)
