"""Linear layers cut over a tensor-parallel group.

`ColumnLinear` cuts the output and needs no communication; `RowLinear` cuts the input and sums over
ranks. A pair of them costs one all-reduce. Checkpoint matrices that share an input are stacked into
one (`qkv_linear`, `gate_up_linear`); checkpoints that stacked them already load too.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import Cut, HeadSplit, even, whole
from headrace.layers.build import Build
from headrace.quant.base import (
    Kind,
    LinearShape,
    Part,
    Targets,
    part_targets,
    plain,
    stacked_target,
    when_filled,
)


class ColumnLinear:
    """x [tokens, in] -> this rank's rows of all parts, [tokens, sum of rows.local]."""

    def __init__(
        self,
        parts: tuple[Part, ...],
        in_size: int,
        build: Build,
        *,
        bias: bool = False,
        stacked: str = "",
        kind: Kind = "linear",
    ) -> None:
        self.shape = LinearShape(parts, whole(in_size))
        names = (part.name for part in parts)
        self.method = build.method(*names, kind=kind, stacked=stacked)
        self.weights = self.method.create_weights(self.shape, build.dtype)
        self.bias = torch.empty(self.shape.local_rows, dtype=build.dtype) if bias else None
        self.stacked = stacked

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.apply(self.weights, x, self.bias)

    def gated(self, x: Tensor, activation: ops.Activation) -> Tensor:
        """Of two equal parts, gate and up: act(gate) * up, [tokens, rows of one part]."""
        return self.method.apply_gated(self.weights, x, self.bias, activation)

    def targets(self, prefix: str) -> Targets:
        """Targets of each part, and of the stacked tensors if they have a name."""
        weights = packed_when_filled(self, prefix)
        biases: Targets = {}
        if self.bias is not None:
            biases = part_targets(plain(self.bias), self.shape, prefix, "bias", None)
        found = weights | biases
        if self.stacked:
            found |= self.method.stacked(self.shape, weights, prefix, self.stacked)
            if biases:
                found[f"{prefix}{self.stacked}.bias"] = stacked_target(biases)
        return found


class RowLinear:
    """x [tokens, columns.local] -> the whole product, [tokens, out], equal on all ranks."""

    def __init__(
        self, name: str, columns: Cut, out_size: int, build: Build, *, bias: bool = False
    ) -> None:
        self.shape = LinearShape((Part(name, whole(out_size)),), columns)
        self.method = build.method(name)
        self.group = build.group
        self.weights = self.method.create_weights(self.shape, build.dtype)
        self.bias = torch.empty(out_size, dtype=build.dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        # One rank adds the bias, so that the sum has it once.
        bias = self.bias if self.group.rank == 0 else None
        return self.group.all_reduce(self.method.apply(self.weights, x, bias))

    def targets(self, prefix: str) -> Targets:
        found = packed_when_filled(self, prefix)
        if self.bias is not None:
            found |= part_targets(plain(self.bias), self.shape, prefix, "bias", None)
        return found


def packed_when_filled(linear: ColumnLinear | RowLinear, prefix: str) -> Targets:
    """Targets of the matrix, which is packed at once, so that few unpacked ones exist at a time."""
    method, weights = linear.method, linear.weights
    targets = method.targets(linear.shape, weights, prefix)
    return when_filled(targets, lambda: method.process_after_loading(weights))


def qkv_linear(
    heads: HeadSplit, head_dim: int, in_size: int, build: Build, *, bias: bool
) -> ColumnLinear:
    """Query, key and value projections in one: [tokens, q | k | v of the local heads]."""
    kv = heads.kv_cut(head_dim)
    parts = (Part("q_proj", heads.q_cut(head_dim)), Part("k_proj", kv), Part("v_proj", kv))
    return ColumnLinear(parts, in_size, build, bias=bias, stacked="qkv_proj")


def gate_up_linear(in_size: int, out_size: int, build: Build, *, bias: bool) -> ColumnLinear:
    """Gate and up projections in one: [tokens, gate | up of the local columns]."""
    cut = even(out_size, build.shard)
    parts = (Part("gate_proj", cut), Part("up_proj", cut))
    return ColumnLinear(parts, in_size, build, bias=bias, stacked="gate_up_proj")
