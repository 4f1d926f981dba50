"""Matrices that a checkpoint has as floats: kept as they are, or quantized while loading."""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import ops
from headrace.quant.base import LinearShape, Matrix, Targets, Weights, part_targets, uncopied


@dataclass(frozen=True)
class Dense:
    """Packed to `format` ("" keeps floats), with `group` inputs per scale where it has groups.

    A matrix is quantized as soon as it is whole, so only one unquantized matrix is there at a time.
    """

    name: str = "none"
    format: str = ""
    group: int = 0
    head_format: str = ""

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        return {"weight": Matrix(shape.local_rows, shape.columns.local, dtype)}

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        matrix = weights["weight"]
        targets = part_targets(matrix.open, shape, prefix, "weight", shape.columns)
        return uncopied(targets, matrix)

    def process_after_loading(self, weights: Weights) -> None:
        weights["packed"] = weights["weight"].pack(self.format, self.group)

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_packed(x, weights["packed"], bias)

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        return ops.gated_packed(x, weights["packed"], activation, bias)


METHODS = {
    "none": Dense(),
    "int8": Dense("int8", "int8", 0, head_format="int8"),
    # The head decides which token comes next: four bits would cost more there than they save.
    "int4": Dense("int4", "int4", 64, head_format="int8"),
    "fp8": Dense("fp8", "fp8", 0, head_format="fp8"),
}
"""By --quantization."""
