"""Linear layers cut over a tensor-parallel group.

`ColumnLinear` cuts the output and needs no communication; `RowLinear` cuts the input and sums over
ranks. A pair of them costs one all-reduce. `TreeLinear` is a RowLinear that sums in an order that
does not depend on the number of ranks. Checkpoint matrices that share an input are stacked into
one (`qkv_linear`, `gate_up_linear`); checkpoints that stacked them already load too.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import Cut, HeadSplit, even, piece, whole
from headrace.layers.build import Build
from headrace.quant.base import (
    Kind,
    LinearShape,
    Part,
    QuantMethod,
    Targets,
    Weights,
    merged,
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


class TreeLinear:
    """A `RowLinear` that sums over a fixed number of spans of the input, whatever the ranks.

    Each span is a matrix of its own. Products and sums are fp32, the sums in a binary tree: first
    over the spans of a rank, then over ranks, so the tree is the same for 1, 2 and 4 of them.
    """

    def __init__(
        self, name: str, columns: Cut, out_size: int, build: Build, *, bias: bool = False
    ) -> None:
        self.group, self.dtype, self.method = build.group, build.dtype, build.method(name)
        count = build.shard.pieces
        self.width = columns.local // count
        part = Part(name, whole(out_size))
        self.shapes = [LinearShape((part,), piece(columns, i, count)) for i in range(count)]
        self.weights = [self.method.create_weights(shape, build.dtype) for shape in self.shapes]
        self.bias = torch.empty(out_size, dtype=build.dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != torch.float32:
            x = ops.cast(x, torch.float32)
        bias = self.bias if self.group.rank == 0 else None
        spans = torch.split(x, self.width, dim=1)
        sums = [
            self.method.apply(weights, span, None if index else bias)
            for index, (weights, span) in enumerate(zip(self.weights, spans, strict=True))
        ]
        return self.group.all_reduce(tree_sum(sums), self.dtype)

    def targets(self, prefix: str) -> Targets:
        parts = zip(self.shapes, self.weights, strict=True)
        found = merged([_packed(self.method, shape, w, prefix) for shape, w in parts])
        if self.bias is not None:
            found |= part_targets(plain(self.bias), self.shapes[0], prefix, "bias", None)
        return found


def tree_sum(parts: list[Tensor]) -> Tensor:
    """The sum of a power of two of tensors, as `all_reduce` sums over as many ranks."""
    while len(parts) > 1:
        parts = [ops.combine(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def row_linear(
    name: str, columns: Cut, out_size: int, build: Build, *, bias: bool = False
) -> RowLinear | TreeLinear:
    """x [tokens, columns.local] -> [tokens, out_size], summed as the build says."""
    kind = TreeLinear if build.split.units else RowLinear
    return kind(name, columns, out_size, build, bias=bias)


def packed_when_filled(linear: ColumnLinear | RowLinear, prefix: str) -> Targets:
    """Targets of the matrix, which is packed at once, so that few unpacked ones exist at a time."""
    return _packed(linear.method, linear.shape, linear.weights, prefix)


def _packed(method: QuantMethod, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
    targets = method.targets(shape, weights, prefix)
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
