"""Root-mean-square normalization, fused with the residual addition."""

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
