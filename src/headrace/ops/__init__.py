"""The list of operators: what a model may compute, and who computes it.

Each function states the contract; `headrace.ops.ref` is its definition. At import a table picks,
for each operator, the first implementation that has it. This package is the only one that knows
which device or instruction set there is. Tensors named `x` are [tokens, ...] in the model's dtype.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from headrace.ops import cpu, ref
from headrace.ops.meta import AttentionMeta, KvCache
from headrace.ops.packed import PackedWeight

# Best first; `ref` has every operator.
_IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "ref": ref}
_serving: dict[str, str] = {}


def implementations() -> dict[str, str]:
    """Operator name -> name of the implementation that serves it."""
    return dict(_serving)


def set_threads(count: int) -> None:
    """Threads that one operator may use, the caller included."""
    torch.set_num_threads(count)
    if cpu.LIBRARY is not None:
        cpu.library.set_threads(count)


def _best(operator: str) -> Any:
    for name, module in _IMPLEMENTATIONS.items():
        if operator in module.__all__:
            _serving[operator] = name
            return getattr(module, operator)
    raise LookupError(f"no implementation of operator {operator}")


_linear: Callable[..., Tensor] = _best("linear")
_embedding: Callable[..., Tensor] = _best("embedding")
_gather: Callable[..., Tensor] = _best("gather")
_rms_norm: Callable[..., tuple[Tensor, Tensor]] = _best("rms_norm")
_layer_norm: Callable[..., Tensor] = _best("layer_norm")
_rotary_table: Callable[..., Tensor] = _best("rotary_table")
_rotary: Callable[..., tuple[Tensor, Tensor]] = _best("rotary")
_write_kv: Callable[..., None] = _best("write_kv")
_rotary_kv: Callable[..., Tensor] = _best("rotary_kv")
_paged_attention: Callable[..., Tensor] = _best("paged_attention")
_silu_mul: Callable[..., Tensor] = _best("silu_mul")
_gelu_mul: Callable[..., Tensor] = _best("gelu_mul")
_logits: Callable[..., Tensor] = _best("logits")
_pack: Callable[..., PackedWeight] = _best("pack")
_linear_packed: Callable[..., Tensor] = _best("linear_packed")
_logits_packed: Callable[..., Tensor] = _best("logits_packed")
_embedding_packed: Callable[..., Tensor] = _best("embedding_packed")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in], weight [out, in], bias [out] -> [tokens, out]."""
    return _linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids int64 [tokens], weight [vocab, hidden] -> [tokens, hidden]."""
    return _embedding(ids, weight)


def gather(x: Tensor, picks: Tensor) -> Tensor:
    """x [tokens, dim], picks int64 [n] -> rows `picks` of x, [n, dim]."""
    return _gather(x, picks)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Add, then normalize: returns (norm(x + residual) * weight, x + residual).

    x and residual [..., dim], weight [dim]. Without a residual the second result is x.
    """
    return _rms_norm(x, weight, eps, residual)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """x [..., dim], weight and bias [dim] -> [..., dim]."""
    return _layer_norm(x, weight, bias, eps)


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float = 1.0) -> Tensor:
    """Cosines, then sines, of position * frequency, times `scale`.

    positions int64 [tokens], inv_freq fp32 [rotary_dim / 2] or [tokens, rotary_dim / 2]
    -> fp32 [tokens, rotary_dim].
    """
    return _rotary_table(positions, inv_freq, scale)


def rotary(
    q: Tensor, k: Tensor, cos_sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate the first rotary_dim elements of each head (RoPE, arXiv 2104.09864).

    q [tokens, heads, dim], k [tokens, kv_heads, dim], cos_sin fp32 [tokens, rotary_dim], the row
    of each token's position. Pairs are (i, i + rotary_dim / 2), or (2i, 2i + 1) if `interleaved`.
    Use the results only: an implementation may overwrite q and k.
    """
    return _rotary(q, k, cos_sin, interleaved)


def write_kv(k: Tensor, v: Tensor, cache: KvCache, slots: Tensor) -> None:
    """Put k, v [tokens, kv_heads, dim] into a cache, rounded to its dtype.

    slots int64 [tokens] = page * page_size + offset, without duplicates. float8_e4m3fn takes at
    most 448 times its scale in size.
    """
    _write_kv(k, v, cache, slots)


def rotary_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    cache: KvCache,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """`rotary`, then `write_kv` of the turned keys and the values: the turned q."""
    return _rotary_kv(q, k, v, cos_sin, cache, slots, interleaved)


def paged_attention(
    q: Tensor,
    cache: KvCache,
    meta: AttentionMeta,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of each token to its own sequence, for any mix of chunks.

    q [tokens, heads, dim], heads a multiple of the cache's kv_heads -> [tokens, heads, dim]. The
    keys of these tokens are already in the cache, and are read from there. A query at
    position p sees positions <= p, and only those > p - window if window > 0. Scores become
    soft_cap * tanh(score / soft_cap) if soft_cap > 0. `sinks` [heads] are extra logits in the
    softmax that carry no value. Softmax in fp32.
    """
    return _paged_attention(
        q, cache, meta, scale=scale, window=window, soft_cap=soft_cap, sinks=sinks
    )


def silu_mul(x: Tensor) -> Tensor:
    """x [tokens, 2 * n] = gate | up -> silu(gate) * up, [tokens, n]."""
    return _silu_mul(x)


def gelu_mul(x: Tensor, tanh: bool = True) -> Tensor:
    """x [tokens, 2 * n] = gate | up -> gelu(gate) * up, [tokens, n]; tanh form or erf form."""
    return _gelu_mul(x, tanh)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, hidden], weight [vocab, hidden] -> fp32 [n, vocab]."""
    return _logits(hidden, weight)


def pack(weight: Tensor) -> PackedWeight:
    """weight [out, in] in the form that the `_packed` operators read.

    It may share memory with `weight`. An implementation may store values in a narrower type if
    none of them changes.
    """
    return _pack(weight)


def linear_packed(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`linear` with a packed weight."""
    return _linear_packed(x, weight, bias)


def logits_packed(hidden: Tensor, weight: PackedWeight) -> Tensor:
    """`logits` with a packed weight."""
    return _logits_packed(hidden, weight)


def embedding_packed(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`embedding` with a packed weight, as `dtype`."""
    return _embedding_packed(ids, weight, dtype)
