"""pack_heads and heads_linear: bindings of csrc/kernels/linear_heads.cpp."""

from ctypes import Structure, addressof, c_int64, c_void_p
from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from headrace.ops.cpu.library import Operator, Rows, Step, rows
from headrace.ops.cpu.matmul import PANEL
from headrace.ops.cpu.packing import Weight, mirror, pack
from headrace.ops.cpu.record import empty
from headrace.ops.packed import PackedHeads


class _HeadsLinearArgs(Structure):
    _fields_ = (("x", Rows), ("y", Rows), ("weights", c_void_p), ("heads", c_int64))


_HEADS_LINEAR = Operator("heads_linear", _HeadsLinearArgs)


def pack_heads(weights: Tensor) -> PackedHeads:
    """In one memory; panels that are not full are, with zeros, so that each head begins at one."""
    count, out_size, _ = weights.shape
    whole = pack(F.pad(weights, (0, 0, 0, -out_size % PANEL)).flatten(0, 1))
    return PackedHeads(
        tuple(replace(whole, data=d, out_size=out_size) for d in whole.data.chunk(count))
    )


def heads_linear(x: Tensor, weights: PackedHeads) -> Tensor:
    tokens, heads, width = x.shape
    first = weights.heads[0]
    if heads != len(weights.heads) or width < first.in_size:
        raise ValueError(
            f"x has {heads} heads of {width}, weights {len(weights.heads)} of {first.in_size}"
        )
    y = empty((tokens, heads, first.out_size + width - first.in_size), x.dtype)
    args = _HeadsLinearArgs(
        rows(x.view(tokens, -1)), rows(y.view(tokens, -1)), addressof(_mirrors(weights)), heads
    )
    _HEADS_LINEAR(args, Step(tokens=tokens))
    return y


def _mirrors(weights: PackedHeads) -> Any:
    """An array of hr_weight, which lives as long as the heads."""
    if "cpu" not in weights.handles:
        weights.handles["cpu"] = (Weight * len(weights.heads))(*map(mirror, weights.heads))
    return weights.handles["cpu"]
