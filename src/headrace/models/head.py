"""From a pooled hidden state to scores, in fp32: the heads of classifiers and reward models.

Small next to the network, so they are plain matrices that every rank holds.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.dist.topology import whole
from headrace.quant.base import Targets, cut_target, plain


class SmallLinear:
    """x fp32 [n, in] -> [n, out]; `name` is what the checkpoint calls it."""

    def __init__(self, name: str, in_size: int, out_size: int, *, bias: bool) -> None:
        self.name = name
        self.weight = torch.empty(out_size, in_size)
        self.bias = torch.empty(out_size) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)

    def targets(self) -> Targets:
        rows, columns = map(whole, self.weight.shape)
        found = {f"{self.name}.weight": cut_target(plain(self.weight), rows, columns)}
        if self.bias is not None:
            found[f"{self.name}.bias"] = cut_target(plain(self.bias), rows)
        return found


class Head:
    """Layers with an activation between them; without layers, the identity."""

    def __init__(
        self, layers: Sequence[SmallLinear], activation: Callable[[Tensor], Tensor]
    ) -> None:
        self.layers = list(layers)
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            x = layer(self.activation(x) if index else x)
        return x

    def targets(self) -> Targets:
        found: Targets = {}
        for layer in self.layers:
            found |= layer.targets()
        return found
