"""Feed-forward blocks: down(act(up(x))), or down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

from dataclasses import dataclass

from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import even
from headrace.layers.build import Build
from headrace.layers.linear import ColumnLinear, gate_up_linear, row_linear
from headrace.quant.base import Part, Targets

#: names of config.json's `hidden_act` -> activation
ACTIVATIONS: dict[str, ops.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_python": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


@dataclass(frozen=True)
class MLPSpec:
    """`activation` is a name of `ACTIVATIONS`."""

    inner_size: int
    activation: str
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise LoadError(
                f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}",
                field="hidden_act",
            )


class MLP:
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __init__(self, hidden_size: int, spec: MLPSpec, build: Build) -> None:
        self.activation = ACTIVATIONS[spec.activation]
        self.gated = spec.gated
        split = even(spec.inner_size, build.shard)
        if spec.gated:
            self.up = gate_up_linear(hidden_size, spec.inner_size, build, bias=spec.bias)
        else:
            self.up = ColumnLinear((Part("up_proj", split),), hidden_size, build, bias=spec.bias)
        self.down = row_linear("down_proj", split, hidden_size, build, bias=spec.bias)

    def __call__(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down(self.up.gated(x, self.activation))
        return self.down(ops.activate(self.up(x), self.activation))

    def targets(self, prefix: str) -> Targets:
        return self.up.targets(prefix) | self.down.targets(prefix)
