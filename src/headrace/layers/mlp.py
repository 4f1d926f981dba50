"""The gated feed-forward block: down(act(gate(x)) * up(x)) (arXiv 2002.05202)."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from headrace import ops
from headrace.dist.topology import even
from headrace.layers.build import Build
from headrace.layers.linear import RowLinear, gate_up_linear
from headrace.quant.base import Targets

#: names of config.json's `hidden_act` -> operator on [tokens, gate | up]
GATED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": ops.silu_mul,
    "swish": ops.silu_mul,
    "gelu": partial(ops.gelu_mul, tanh=False),
    "gelu_new": ops.gelu_mul,
    "gelu_pytorch_tanh": ops.gelu_mul,
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
        self.act = GATED_ACTIVATIONS[activation]

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate_up(x)))

    def targets(self, prefix: str) -> Targets:
        return self.gate_up.targets(prefix) | self.down.targets(prefix)
