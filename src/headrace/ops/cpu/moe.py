"""router_topk, pack_experts and moe_packed: bindings of csrc/kernels/moe.cpp."""

import ctypes
from ctypes import Structure, c_int64, c_void_p
from dataclasses import replace

import torch
from torch import Tensor

from headrace.ops.cpu.elementwise import ACTIVATIONS
from headrace.ops.cpu.library import Operator, Rows, Step, rows
from headrace.ops.cpu.matmul import PANEL
from headrace.ops.cpu.packing import Weight, mirror, pack
from headrace.ops.cpu.record import empty
from headrace.ops.experts import PackedExperts
from headrace.ops.packed import PackedWeight


class _RouterArgs(Structure):
    _fields_ = (
        ("logits", Rows),
        ("weights", Rows),
        ("ids", c_void_p),
        ("top_k", c_int64),
        ("renormalize", c_int64),
    )


class _MoeArgs(Structure):
    _fields_ = (
        ("x", Rows),
        ("y", Rows),
        ("weights", Rows),
        ("ids", c_void_p),
        ("gates", c_void_p),
        ("ups", c_void_p),
        ("downs", c_void_p),
        ("experts", c_int64),
        ("top_k", c_int64),
        ("activation", c_int64),
    )


_ROUTER = Operator("router", _RouterArgs)
_MOE = Operator("moe", _MoeArgs)


def router_topk(logits: Tensor, top_k: int, renormalize: bool) -> tuple[Tensor, Tensor]:
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be 1 to {logits.shape[1]} experts, not {top_k}")
    ids = empty((len(logits), top_k), torch.int32)
    weights = empty((len(logits), top_k), torch.float32)
    args = _RouterArgs(rows(logits), rows(weights), ids.data_ptr(), top_k, renormalize)
    _ROUTER(args, Step(tokens=len(logits)))
    return ids, weights


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    gate, up = gate_up.chunk(2, dim=1)
    groups = [_pack_stack(weights) for weights in (gate, up, down)]
    handle = [(Weight * len(group))(*map(mirror, group)) for group in groups]
    return PackedExperts(groups[0], groups[1], groups[2], handle)


def _pack_stack(weights: Tensor) -> tuple[PackedWeight, ...]:
    """[experts, out, in]: one memory for all experts where they begin at a panel."""
    count, out_size, _ = weights.shape
    if out_size % PANEL:
        return tuple(pack(weight) for weight in weights)
    whole = pack(weights.flatten(0, 1))
    return tuple(replace(whole, data=d, out_size=out_size) for d in whole.data.chunk(count))


def moe_packed(
    x: Tensor, experts: PackedExperts, ids: Tensor, weights: Tensor, activation: str
) -> Tensor:
    if x.shape[1] != experts.gates[0].in_size:
        raise ValueError(f"x has {x.shape[1]} columns, experts {experts.gates[0].in_size} inputs")
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ValueError("ids must be int32 [tokens, top_k], without gaps")
    y = empty((len(x), experts.downs[0].out_size), x.dtype)
    args = _MoeArgs(
        rows(x),
        rows(y),
        rows(weights),
        ids.data_ptr(),
        *map(ctypes.addressof, experts.handle),
        len(experts.gates),
        ids.shape[1],
        ACTIVATIONS[activation],
    )
    _MOE(args, Step(tokens=len(x)))
    return y
