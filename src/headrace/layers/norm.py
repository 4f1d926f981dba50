"""Normalization of hidden states; the root-mean-square form is fused with the residual addition."""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import whole
from headrace.layers.build import Build
from headrace.quant.base import Targets, cut_target, plain


class RMSNorm:
    """arXiv 1910.07467; the weight is held by every rank."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        self.weight = torch.empty(size, dtype=build.dtype)
        self.eps = eps

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual), both [..., size]."""
        return ops.rms_norm(x, self.weight, self.eps, residual)

    def targets(self, prefix: str) -> Targets:
        return {f"{prefix}.weight": cut_target(plain(self.weight), whole(len(self.weight)))}


class LayerNorm:
    """arXiv 1607.06450; weight and bias are held by every rank."""

    def __init__(self, size: int, eps: float, build: Build) -> None:
        self.weight = torch.empty(size, dtype=build.dtype)
        self.bias = torch.empty(size, dtype=build.dtype)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)

    def targets(self, prefix: str) -> Targets:
        size = whole(len(self.weight))
        return {
            f"{prefix}.weight": cut_target(plain(self.weight), size),
            f"{prefix}.bias": cut_target(plain(self.bias), size),
        }
