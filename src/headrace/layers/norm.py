"""Normalization of hidden states and of heads, fused with the residual addition where it can be.

Weights are held by every rank, but for those of heads. Knows no layer that uses it.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import Cut, whole
from headrace.layers.build import Build
from headrace.quant.base import Targets, WeightTarget, cut_target, plain


@dataclass(frozen=True)
class NormSpec:
    """`rms` (arXiv 1910.07467) or `layer` (arXiv 1607.06450).

    `from_one`: the checkpoint stores the weight's difference from 1. Without `weight` there is
    nothing to load.
    """

    eps: float
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    weight: bool = True
    from_one: bool = False


class Norm:
    """x [tokens, size], or [tokens, heads, size] with one weight for all heads, normalized."""

    def __init__(self, size: int, spec: NormSpec, build: Build) -> None:
        self.spec = spec
        # 1 + a small number needs more bits than the number.
        dtype = torch.float32 if spec.from_one else build.dtype
        self.weight = torch.empty(size, dtype=dtype) if spec.weight else torch.ones(size)
        self.bias = torch.empty(size, dtype=dtype) if spec.bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return self.add(x, None)[0]

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual)."""
        if self.spec.kind == "rms":
            return ops.rms_norm(x, self.weight, self.spec.eps, residual)
        total = x if residual is None else ops.combine(x, residual)
        return ops.layer_norm(total, self.weight, self.bias, self.spec.eps), total

    def targets(self, prefix: str) -> Targets:
        size, found = whole(len(self.weight)), Targets()
        if self.spec.weight:
            target = cut_target(plain(self.weight), size)
            found[f"{prefix}.weight"] = self._plus_one(target) if self.spec.from_one else target
        if self.bias is not None:
            found[f"{prefix}.bias"] = cut_target(plain(self.bias), size)
        return found

    def _plus_one(self, target: WeightTarget) -> WeightTarget:
        def copy(source: Tensor) -> None:
            target.copy(source)
            self.weight += 1

        return replace(target, copy=copy)


class HeadNorm:
    """Layer norm of x [tokens, heads, size] with a weight for each head, [heads, size]."""

    def __init__(self, heads: Cut, size: int, eps: float, build: Build) -> None:
        self.rows, self.columns, self.eps = heads, whole(size), eps
        self.weight = torch.empty(heads.local, size, dtype=build.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, None, self.eps)

    def targets(self, prefix: str) -> Targets:
        """One tensor for all heads, or one for each; those of other ranks go nowhere."""
        size = len(self.weight[0])
        single = {
            f"{prefix}.{head}.weight": WeightTarget(shape=(size,), copy=lambda source: None)
            for head in range(self.rows.full)
        }
        for span in self.rows.spans:
            target = cut_target(plain(self.weight[span.target]), self.columns)
            single[f"{prefix}.{span.source}.weight"] = target
        stacked = cut_target(plain(self.weight), self.rows, self.columns)
        return {**single, f"{prefix}.weight": replace(stacked, covers=tuple(single))}


class LayerNorm:
    """Layer norm with a bias, alone."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        self.norm = Norm(size, NormSpec(eps, "layer", bias=True), build)

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def targets(self, prefix: str) -> Targets:
        return self.norm.targets(prefix)
