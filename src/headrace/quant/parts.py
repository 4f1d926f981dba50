"""A linear layer whose parts a checkpoint stores in different ways: one matrix for each part."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace import ops
from headrace.quant.base import LinearShape, QuantMethod, Targets, Weights


def by_part(methods: Sequence[QuantMethod]) -> QuantMethod:
    """The method of a layer whose parts have these."""
    same = all(method == methods[0] for method in methods)
    return methods[0] if same else ByPart(tuple(methods))


@dataclass(frozen=True)
class ByPart:
    """`methods`: one for each part. Their products are put side by side."""

    methods: tuple[QuantMethod, ...]

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        return {
            part.name: method.create_weights(_one(shape, index), dtype)
            for index, (part, method) in enumerate(zip(shape.parts, self.methods, strict=True))
        }

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        found: Targets = {}
        for index, (part, method) in enumerate(zip(shape.parts, self.methods, strict=True)):
            found |= method.targets(_one(shape, index), weights[part.name], prefix)
        return found

    def stacked(self, shape: LinearShape, single: Targets, prefix: str, name: str) -> Targets:
        return {}

    def process_after_loading(self, weights: Weights) -> None:
        for method, part in zip(self.methods, weights.values(), strict=True):
            method.process_after_loading(part)

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_parts(x, [part["packed"] for part in weights.values()], bias)

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        return ops.gated(self.apply(weights, x, bias), activation)


def _one(shape: LinearShape, index: int) -> LinearShape:
    return replace(shape, parts=(shape.parts[index],))
