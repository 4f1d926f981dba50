"""router_topk, pack_experts and moe_packed: bindings of csrc/kernels/moe.cpp."""

import ctypes
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headrace.ops.cpu.elementwise import activation_args
from headrace.ops.cpu.library import Operator, Rows, Step, rows
from headrace.ops.cpu.matmul import PANEL
from headrace.ops.cpu.packing import Weight, mirror, pack
from headrace.ops.cpu.record import empty
from headrace.ops.experts import ClampedSwiglu, PackedExperts, RouterSpec
from headrace.ops.packed import PackedWeight


class _RouterArgs(Structure):
    _fields_ = (
        ("logits", Rows),
        ("weights", Rows),
        ("ids", c_void_p),
        ("bias", c_void_p),
        ("top_k", c_int64),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("group_best", c_int64),
        ("renormalize", c_int32),
        ("sigmoid", c_int32),
        ("scale", c_float),
        ("jitter", c_float),
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
        ("gate_up_bias", c_void_p),
        ("down_bias", c_void_p),
        ("orders", c_void_p),
        ("experts", c_int64),
        ("inner", c_int64),
        ("top_k", c_int64),
        ("activation", c_int32),
        ("alpha", c_float),
        ("limit", c_float),
        ("on_input", c_int32),
        ("first", c_int64),
    )


_MOST_GROUPS = 64  # HR_MOST_GROUPS
_ROUTER = Operator("router", _RouterArgs)
_MOE = Operator("moe", _MoeArgs)


def router_topk(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_router(spec, logits.shape[1])
    ids = empty((len(logits), spec.top_k), torch.int32)
    weights = empty((len(logits), spec.top_k), torch.float32)
    args = _RouterArgs(
        rows(logits),
        rows(weights),
        ids.data_ptr(),
        None if bias is None else bias.data_ptr(),
        spec.top_k,
        spec.groups,
        spec.top_groups,
        spec.group_best,
        spec.renormalize,
        spec.sigmoid,
        spec.scale,
        spec.jitter,
    )
    _ROUTER(args, Step(tokens=len(logits)))
    return ids, weights


def _check_router(spec: RouterSpec, experts: int) -> None:
    if not 1 <= spec.top_k <= experts:
        raise ValueError(f"top_k must be 1 to {experts} experts, not {spec.top_k}")
    if experts % spec.groups or not 1 <= spec.top_groups <= spec.groups <= _MOST_GROUPS:
        raise ValueError(f"{experts} experts cannot be in {spec.groups} groups")
    if not 1 <= spec.group_best <= min(experts // spec.groups, _MOST_GROUPS):
        raise ValueError(f"group_best must be at most the size of a group, not {spec.group_best}")


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    gate, up = gate_up.chunk(2, dim=1)
    gates, ups, downs = (_pack_stack(weights) for weights in (gate, up, down))
    return PackedExperts(gates, ups, downs)


def _mirrors(experts: PackedExperts) -> list[Any]:
    """Arrays of hr_weight for gates, ups and downs, and of orders, which live as long as the
    experts."""
    if "cpu" not in experts.handles:
        groups = (experts.gates, experts.ups, experts.downs)
        orders = [None if order is None else order.data_ptr() for order in experts.orders]
        experts.handles["cpu"] = [
            *((Weight * len(g))(*map(mirror, g)) for g in groups),
            (c_void_p * len(orders))(*orders) if orders else None,
        ]
    found: list[Any] = experts.handles["cpu"]
    return found


def _pack_stack(weights: Tensor) -> tuple[PackedWeight, ...]:
    """[experts, out, in]: one memory for all experts where they begin at a panel."""
    count, out_size, _ = weights.shape
    if out_size % PANEL:
        return tuple(pack(weight) for weight in weights)
    whole = pack(weights.flatten(0, 1))
    return tuple(replace(whole, data=d, out_size=out_size) for d in whole.data.chunk(count))


def moe_packed(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    activation: str | ClampedSwiglu,
    on_input: bool = False,
    first: int = 0,
) -> Tensor:
    if not experts.orders and x.shape[1] != experts.gates[0].in_size:
        raise ValueError(f"x has {x.shape[1]} columns, experts {experts.gates[0].in_size} inputs")
    if ids.dtype != torch.int32 or not ids.is_contiguous():
        raise ValueError("ids must be int32 [tokens, top_k], without gaps")
    y = empty((len(x), experts.downs[0].out_size), x.dtype)
    *matrices, orders = _mirrors(experts)
    args = _MoeArgs(
        rows(x),
        rows(y),
        rows(weights),
        ids.data_ptr(),
        *map(ctypes.addressof, matrices),
        *(None if b is None else b.data_ptr() for b in (experts.gate_up_bias, experts.down_bias)),
        None if orders is None else ctypes.addressof(orders),
        len(experts.gates),
        experts.gates[0].out_size,
        ids.shape[1],
        *activation_args(activation),
        on_input,
        first,
    )
    _MOE(args, Step(tokens=len(x)))
    return y
