"""turn, rotary, write_kv, rotary_kv, latent_kv: bindings of one kernel, csrc/kernels/rope.cpp."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from torch import Tensor

from headrace.ops.cpu.attention import set_scales
from headrace.ops.cpu.library import DTYPES, Operator, Rows, Step, rows
from headrace.ops.cpu.norm import rms_norm_into
from headrace.ops.meta import KvCache


class _RotaryKvArgs(Structure):
    _fields_ = (
        ("q", Rows),
        ("k", Rows),
        ("v", Rows),
        ("cos_sin", Rows),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_scales", c_void_p),
        ("value_scales", c_void_p),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("first", c_int64),
        ("key_scale", c_float),
        ("value_scale", c_float),
        ("cache_dtype", c_int32),
        ("interleaved", c_int32),
    )


_ROTARY_KV = Operator("rotary_kv", _RotaryKvArgs)


def turn(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    args = _RotaryKvArgs(
        k=_flat(x), cos_sin=rows(cos_sin), kv_heads=x.shape[1], interleaved=interleaved
    )
    _ROTARY_KV(args, Step(tokens=len(x)))
    return x


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    args = _RotaryKvArgs(
        q=_flat(q),
        k=_flat(k),
        cos_sin=rows(cos_sin),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        interleaved=interleaved,
    )
    _ROTARY_KV(args, Step(tokens=len(q)))
    return q, k


def write_kv(k: Tensor, v: Tensor | None, cache: KvCache, slots: Tensor) -> None:
    args = _RotaryKvArgs(k=_flat(k), kv_heads=k.shape[1])
    _cache_into(args, cache)
    if v is None:
        args.values = None
    else:
        args.v = _flat(v)
    _ROTARY_KV(args, Step(tokens=len(k), slots=slots.data_ptr()))


def rotary_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    cache: KvCache,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    args = _RotaryKvArgs(
        q=_flat(q),
        k=_flat(k),
        v=_flat(v),
        cos_sin=rows(cos_sin),
        heads=q.shape[1],
        kv_heads=k.shape[1],
        interleaved=interleaved,
    )
    _cache_into(args, cache)
    _ROTARY_KV(args, Step(tokens=len(q), slots=slots.data_ptr()))
    return q


def latent_kv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    cache: KvCache,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    rms_norm_into(kv[:, : len(weight)], weight, eps)
    args = _RotaryKvArgs(
        q=_flat(q),
        k=rows(kv),
        cos_sin=rows(cos_sin),
        heads=q.shape[1],
        kv_heads=1,
        first=len(weight),
        interleaved=interleaved,
    )
    _cache_into(args, cache)
    args.values = None
    _ROTARY_KV(args, Step(tokens=len(q), slots=slots.data_ptr()))
    return q


def _cache_into(args: _RotaryKvArgs, cache: KvCache) -> None:
    args.keys, args.values = cache.keys.data_ptr(), cache.values.data_ptr()
    args.cache_dtype = DTYPES[cache.keys.dtype]
    set_scales(args, cache)


def _flat(x: Tensor) -> Rows:
    """[tokens, heads, dim] whose heads are adjacent, as rows."""
    return rows(x.view(len(x), -1))
