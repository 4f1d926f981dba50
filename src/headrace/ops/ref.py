"""The definition of every operator, in plain torch.

Other implementations must agree with these functions. Contracts (shapes, dtypes) stand in
`headrace.ops`. Reductions and transcendental functions run in fp32 and round once, at the end.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops.meta import KvCache
from headrace.ops.packed import PackedWeight, format_of
from headrace.ops.ref_attention import paged_attention, write_kv

__all__ = [
    "embedding",
    "embedding_packed",
    "gather",
    "gelu_mul",
    "layer_norm",
    "linear",
    "linear_packed",
    "logits",
    "logits_packed",
    "pack",
    "paged_attention",
    "rms_norm",
    "rotary",
    "rotary_kv",
    "rotary_table",
    "silu_mul",
    "write_kv",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(ids, weight)


def gather(x: Tensor, picks: Tensor) -> Tensor:
    return x.index_select(0, picks)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    if residual is not None:
        x = x + residual
    # F.rms_norm is x * rsqrt(mean(x^2) + eps) * weight in fp32, rounded once.
    return F.rms_norm(x, weight.shape, weight, eps), x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float) -> Tensor:
    # The angle is an fp32 product, as models were trained. Its sine and cosine are taken in fp64,
    # so that rounding to fp32 hides where in a vector register an element happened to sit.
    angle = (positions[:, None].float() * inv_freq).double()
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * scale).float()


def rotary(q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    x, width = torch.cat((q, k), dim=1), cos_sin.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turning.chunk(2, dim=-1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    x = torch.cat((turned.to(x.dtype), rest), dim=-1)
    return x[:, : q.shape[1]], x[:, q.shape[1] :]


def rotary_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    cache: KvCache,
    slots: Tensor,
    interleaved: bool,
) -> Tensor:
    q, k = rotary(q, k, cos_sin, interleaved)
    write_kv(k, v, cache, slots)
    return q


def silu_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(x.dtype)


def gelu_mul(x: Tensor, tanh: bool) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.gelu(gate.float(), approximate="tanh" if tanh else "none") * up).to(x.dtype)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight).float()


def pack(weight: Tensor) -> PackedWeight:
    out_size, in_size = weight.shape
    return PackedWeight(weight, out_size, in_size, format_of(weight))


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight.data, bias)


def logits_packed(hidden: Tensor, weight: PackedWeight) -> Tensor:
    return logits(hidden, weight.data)


def embedding_packed(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    return embedding(ids, weight.data).to(dtype)
