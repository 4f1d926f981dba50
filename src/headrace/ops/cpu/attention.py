"""paged_attention: binding of csrc/kernels/attention.cpp."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.record import empty
from headrace.ops.meta import AttentionMeta, KvCache

_MOST_HEAD_DIM = 1024  # HR_MOST_HEAD_DIM
_MOST_GROUP = 512  # query heads per KV head


class _AttentionArgs(Structure):
    _fields_ = (
        ("q", Rows),
        ("out", Rows),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("sinks", c_void_p),
        ("slopes", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("page_size", c_int64),
        ("window", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
        ("key_scale", c_float),
        ("value_scale", c_float),
        ("cache_dtype", c_int32),
        ("both_ways", c_int32),
        ("in_chunks", c_int32),
    )


_ATTENTION = Operator("paged_attention", _AttentionArgs)


def paged_attention(
    q: Tensor,
    cache: KvCache,
    meta: AttentionMeta,
    *,
    scale: float,
    window: int,
    soft_cap: float,
    sinks: Tensor | None,
    causal: bool = True,
) -> Tensor:
    """Heads of up to 1024 elements; `sinks` in fp32."""
    args = _AttentionArgs(
        sinks=_address(sinks, "sinks"),
        window=window,
        scale=scale,
        soft_cap=soft_cap,
        both_ways=not causal,
    )
    return _attend(q, cache, meta, args)


def chunked_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, size: int
) -> Tensor:
    return _attend(q, cache, meta, _AttentionArgs(window=size, scale=scale, in_chunks=True))


def sloped_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, slopes: Tensor
) -> Tensor:
    args = _AttentionArgs(slopes=_address(slopes, "slopes"), scale=scale)
    return _attend(q, cache, meta, args)


def _attend(q: Tensor, cache: KvCache, meta: AttentionMeta, args: _AttentionArgs) -> Tensor:
    """With what all have in common filled in."""
    tokens, heads, dim = q.shape
    value_dim = cache.values.shape[-1]
    if dim > _MOST_HEAD_DIM or (value_dim != dim and not cache.latent):
        raise ValueError(f"heads of {dim} and {value_dim} elements have no kernel")
    if heads // cache.keys.shape[2] > _MOST_GROUP:
        raise ValueError(f"{heads} heads on {cache.keys.shape[2]} KV heads have no kernel")
    out = empty((tokens, heads, value_dim), q.dtype)
    args.q, args.out = rows(q.view(tokens, -1)), rows(out.view(tokens, -1))
    args.keys, args.values = cache.keys.data_ptr(), cache.values.data_ptr()
    args.heads, args.kv_heads = heads, cache.keys.shape[2]
    args.page_size = meta.page_size
    args.cache_dtype = DTYPES[cache.keys.dtype]
    set_scales(args, cache)
    _ATTENTION(args, step_of(meta, tokens))
    return out


def _address(per_head: Tensor | None, name: str) -> int | None:
    if per_head is None:
        return None
    if per_head.dtype != torch.float32:
        raise ValueError(f"attention {name} must be float32, not {per_head.dtype}")
    return per_head.data_ptr()


def set_scales(args: Any, cache: KvCache) -> None:
    """The scales of `cache` into an argument struct: addresses of tensors, or numbers."""
    args.key_scale = args.value_scale = 1.0
    for name in ("key_scale", "value_scale"):
        scale = getattr(cache, name)
        if isinstance(scale, Tensor):
            setattr(args, f"{name}s", scale.data_ptr())
        else:
            setattr(args, name, scale)


def step_of(meta: AttentionMeta, tokens: int) -> Step:
    """The part of a step that attention reads; `meta` must outlive it."""
    return Step(
        tokens=tokens,
        chunks=len(meta.rows),
        slots=meta.slots.data_ptr(),
        page_table=meta.page_table.data_ptr(),
        page_stride=meta.page_table.stride(0),
        rows=meta.rows.data_ptr(),
        query_start=meta.query_start.data_ptr(),
        context=meta.context.data_ptr(),
    )
