"""From a pooled hidden state to a vector or scores, in fp32: classifiers, reward models, Dense.

Small next to the network, so they are plain matrices that every rank holds.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.dist.topology import whole
from headrace.quant.base import Targets, cut_target, plain

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": torch.relu,
    "GELU": F.gelu,
    "Sigmoid": torch.sigmoid,
    "SiLU": F.silu,
}


class HeadLayer:
    """x fp32 [n, in] -> [n, out]; `name` is what the checkpoint calls it.

    `activation`: the name of a class of torch.nn.
    """

    def __init__(
        self, name: str, in_size: int, out_size: int, *, bias: bool, activation: str = "Identity"
    ) -> None:
        self.name = name
        self.weight = torch.empty(out_size, in_size)
        self.bias = torch.empty(out_size) if bias else None
        self._activation = ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        return self._activation(F.linear(x, self.weight, self.bias))

    def targets(self) -> Targets:
        rows, columns = map(whole, self.weight.shape)
        found = {f"{self.name}.weight": cut_target(plain(self.weight), rows, columns)}
        if self.bias is not None:
            found[f"{self.name}.bias"] = cut_target(plain(self.bias), rows)
        return found


class Head:
    """Layers one after the other; without layers, the identity."""

    def __init__(self, layers: Sequence[HeadLayer]) -> None:
        self.layers = list(layers)

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    def targets(self) -> Targets:
        found: Targets = {}
        for layer in self.layers:
            found |= layer.targets()
        return found


def dense_layers(info: ModelInfo) -> list[HeadLayer]:
    """The Dense modules of sentence-transformers, whose tensors are named by their folders.

    Raises:
        LoadError: one does not fit what comes before it.
    """
    found, size = [], info.hidden_size
    for dense in info.pooling.dense if info.pooling else ():
        if dense.inputs != size:
            raise LoadError(
                f"{dense.folder} takes vectors of {dense.inputs}, not {size}", field="in_features"
            )
        size = dense.outputs
        name = f"{dense.folder}.linear"
        layer = HeadLayer(name, dense.inputs, size, bias=dense.bias, activation=dense.activation)
        found.append(layer)
    return found
