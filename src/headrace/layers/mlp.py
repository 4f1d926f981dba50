"""The gated feed-forward block: down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

from torch import Tensor

from headrace import ops
from headrace.dist.topology import even
from headrace.layers.build import Build
from headrace.layers.linear import RowLinear, gate_up_linear
from headrace.quant.base import Targets

#: names of config.json's `hidden_act` -> activation of the gate
GATED_ACTIVATIONS: dict[str, ops.Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class GatedMLP:
    """x [tokens, hidden] -> [tokens, hidden]."""

    def __init__(
        self, hidden_size: int, inner_size: int, activation: str, build: Build, *, bias: bool
    ) -> None:
        self.gate_up = gate_up_linear(hidden_size, inner_size, build, bias=bias)
        self.down = RowLinear(
            "down_proj", even(inner_size, build.shard), hidden_size, build, bias=bias
        )
        self.activation = GATED_ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.gate_up.gated(x, self.activation))

    def targets(self, prefix: str) -> Targets:
        return self.gate_up.targets(prefix) | self.down.targets(prefix)
