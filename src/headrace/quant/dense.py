"""Matrices that a checkpoint has as floats: kept as they are, or quantized while loading."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import ops
from headrace.quant.base import (
    Kind,
    LinearShape,
    Matrix,
    QuantMethod,
    Targets,
    Weights,
    packed_at_once,
    part_targets,
    stacked_target,
    uncopied,
)


@dataclass(frozen=True)
class Dense:
    """Packed to `format` ("" keeps floats), with `group` inputs per scale where it has groups.

    A matrix is quantized as soon as it is whole, so only one unquantized matrix is there at a time.
    """

    format: str = ""
    group: int = 0

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        return {"weight": Matrix(shape.local_rows, shape.columns.local, dtype)}

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        matrix = weights["weight"]
        targets = part_targets(matrix.open, shape, prefix, "weight", shape.columns)
        targets = uncopied(targets, matrix)
        return targets if self.format else packed_at_once(targets, matrix, shape)

    def stacked(self, shape: LinearShape, single: Targets, prefix: str, name: str) -> Targets:
        return {f"{prefix}{name}.weight": stacked_target(single)}

    def process_after_loading(self, weights: Weights) -> None:
        weights["packed"] = weights["weight"].pack(self.format, self.group)

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_packed(x, weights["packed"], bias)

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        return ops.gated_packed(x, weights["packed"], activation, bias)


AS_IS = Dense()


@dataclass(frozen=True)
class OnLoad:
    """Floats of a checkpoint, quantized while they are loaded: linear layers, and tables of tokens.

    Routers stay: an error in them takes another expert.
    """

    name: str
    linear: Dense = AS_IS
    table: Dense = AS_IS

    def method(self, modules: Sequence[str], kind: Kind, stacked: str = "") -> QuantMethod:
        if kind in ("linear", "expert"):
            return self.linear
        return self.table if kind in ("embedding", "head") else AS_IS

    def renamed(self, rename: Callable[[str], str]) -> "OnLoad":
        return self


ON_LOAD = {
    "none": OnLoad("none"),
    "int8": OnLoad("int8", Dense("int8"), Dense("int8")),
    # The head decides which token comes next: four bits would cost more there than they save.
    "int4": OnLoad("int4", Dense("int4", 64), Dense("int8")),
    "fp8": OnLoad("fp8", Dense("fp8"), Dense("fp8")),
    "bitsandbytes": OnLoad("bitsandbytes", Dense("nf4", 64)),
}
"""By --quantization."""
