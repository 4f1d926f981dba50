"""The list of operators: what a model may compute, and who computes it.

Each function states the contract; `headrace.ops.ref` is its definition. At import
`headrace.ops.serving` picks an implementation for each. This package is the only one that knows
which device or instruction set there is. Tensors named `x` are [tokens, ...] in the model's dtype.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from headrace.ops.experts import ClampedSwiglu, PackedExperts, RouterSpec
from headrace.ops.meta import AttentionMeta, KvCache
from headrace.ops.packed import PackedHeads, PackedWeight
from headrace.ops.sampling import LogProbs, Sampled, SampleTable
from headrace.ops.serving import best
from headrace.ops.serving import check_packed as check_packed
from headrace.ops.serving import implementations as implementations
from headrace.ops.serving import packing as packing
from headrace.ops.serving import set_threads as set_threads

Activation = Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"]
Gating = Activation | ClampedSwiglu

_linear: Callable[..., Tensor] = best("linear")
_embedding: Callable[..., Tensor] = best("embedding")
_position_embedding: Callable[..., Tensor] = best("position_embedding")
_combine: Callable[..., Tensor] = best("combine")
_gather: Callable[..., Tensor] = best("gather")
_columns: Callable[..., Tensor] = best("columns")
_rms_norm: Callable[..., tuple[Tensor, Tensor]] = best("rms_norm")
_layer_norm: Callable[..., Tensor] = best("layer_norm")
_rotary_table: Callable[..., Tensor] = best("rotary_table")
_turn: Callable[..., Tensor] = best("turn")
_rotary: Callable[..., tuple[Tensor, Tensor]] = best("rotary")
_write_kv: Callable[..., None] = best("write_kv")
_rotary_kv: Callable[..., Tensor] = best("rotary_kv")
_latent_kv: Callable[..., Tensor] = best("latent_kv")
_paged_attention: Callable[..., Tensor] = best("paged_attention")
_chunked_attention: Callable[..., Tensor] = best("chunked_attention")
_sloped_attention: Callable[..., Tensor] = best("sloped_attention")
_gated: Callable[..., Tensor] = best("gated")
_activate: Callable[..., Tensor] = best("activate")
_logits: Callable[..., Tensor] = best("logits")
_stored_dtype: Callable[..., torch.dtype] = best("stored_dtype")
_sample: Callable[..., Sampled] = best("sample")
_log_probs: Callable[..., LogProbs] = best("log_probs")
_pack: Callable[..., PackedWeight] = best("pack")
_pack_quantized: Callable[..., PackedWeight] = best("pack_quantized")
_open_packed: Callable[..., PackedWeight] = best("open_packed")
_pack_rows: Callable[..., None] = best("pack_rows")
_linear_packed: Callable[..., Tensor] = best("linear_packed")
_linear_parts: Callable[..., Tensor] = best("linear_parts")
_mask_logits: Callable[..., None] = best("mask_logits")
_logits_packed: Callable[..., Tensor] = best("logits_packed")
_embedding_packed: Callable[..., Tensor] = best("embedding_packed")
_gated_packed: Callable[..., Tensor] = best("gated_packed")
_router_topk: Callable[..., tuple[Tensor, Tensor]] = best("router_topk")
_pack_heads: Callable[..., PackedHeads] = best("pack_heads")
_heads_linear: Callable[..., Tensor] = best("heads_linear")
_pack_experts: Callable[..., PackedExperts] = best("pack_experts")
_moe_packed: Callable[..., Tensor] = best("moe_packed")
_cast: Callable[..., Tensor] = best("cast")
_take_part: Callable[..., Tensor] = best("take_part")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [tokens, in], weight [out, in], bias [out] -> [tokens, out]."""
    return _linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """ids int64 [tokens], weight [vocab, hidden] -> [tokens, hidden]."""
    return _embedding(ids, weight)


def position_embedding(positions: Tensor, weight: Tensor, first: int = 0) -> Tensor:
    """positions int64 [tokens], weight [positions, hidden] -> rows positions + first of it."""
    return _position_embedding(positions, weight, first)


def combine(
    x: Tensor,
    z: Tensor | None = None,
    a: float = 1.0,
    b: float = 1.0,
    *,
    soft_cap: float = 0.0,
    limit: float = 0.0,
    gate: Tensor | None = None,
) -> Tensor:
    """a * x + b * z, in fp32 and rounded once; x and z [n, dim] of the same dtype.

    With a `gate` [n, 1] of that dtype z is multiplied with its sigmoid. Then soft_cap *
    tanh(y / soft_cap), and a clip to [-limit, limit], where those are above 0.
    """
    return _combine(x, z, a, b, soft_cap, limit, gate)


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
    """x [..., dim], weight and bias [dim], or [n, dim] for x [tokens, n, dim] -> [..., dim]."""
    return _layer_norm(x, weight, bias, eps)


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Cosines, then sines, of position * frequency, times `scale`.

    positions int64 [tokens], inv_freq fp32 [rotary_dim / 2] or [tokens, rotary_dim / 2], scale a
    number or fp64 [tokens, 1] -> fp32 [tokens, rotary_dim].
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


def turn(x: Tensor, cos_sin: Tensor, interleaved: bool = False) -> Tensor:
    """`rotary` of one x [tokens, heads, dim] alone."""
    return _turn(x, cos_sin, interleaved)


def write_kv(k: Tensor, v: Tensor | None, cache: KvCache, slots: Tensor) -> None:
    """Put k, v [tokens, kv_heads, dim] into a cache, rounded to its dtype; k alone if it is latent.

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


def latent_kv(
    q: Tensor,
    kv: Tensor,
    weight: Tensor,
    eps: float,
    cos_sin: Tensor,
    cache: KvCache,
    slots: Tensor,
    interleaved: bool = False,
) -> Tensor:
    """What multi-head latent attention (arXiv 2405.04434) keeps, into a latent cache: the turned q.

    kv [tokens, rank + turned]: its first `rank` elements are normalized as by `rms_norm` with
    weight [rank]; the others, and those past `rank` of each head of q [tokens, heads, rank +
    turned], are turned by cos_sin fp32 [tokens, turned] as by `rotary`. Use the result only: an
    implementation may overwrite q and kv.
    """
    return _latent_kv(q, kv, weight, eps, cos_sin, cache, slots, interleaved)


def paged_attention(
    q: Tensor,
    cache: KvCache,
    meta: AttentionMeta,
    *,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Causal attention of each token to its own sequence, for any mix of chunks.

    q [tokens, heads, dim], heads a multiple of the cache's kv_heads -> [tokens, heads, a value's
    dim]. The keys of these tokens are already in the cache, and are read from there. A query at
    position p sees positions <= p, and only those > p - window if window > 0. Scores become
    soft_cap * tanh(score / soft_cap) if soft_cap > 0. `sinks` [heads] are extra logits in the
    softmax that carry no value. Softmax in fp32. Without `causal` a query sees all `context` tokens
    of its chunk; `window` is then 0.
    """
    return _paged_attention(
        q,
        cache,
        meta,
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        sinks=sinks,
        causal=causal,
    )


def columns(x: Tensor, order: Tensor) -> Tensor:
    """x [tokens, n], order int64 [m] of 0..n-1 -> column order[j] of x at j, [tokens, m]."""
    return _columns(x, order)


def chunked_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, size: int
) -> Tensor:
    """`paged_attention` in which a query at p sees positions from p // size * size to p."""
    return _chunked_attention(q, cache, meta, scale=scale, size=size)


def sloped_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, slopes: Tensor
) -> Tensor:
    """`paged_attention` in which a score gets slope * (position of the key - that of the query).

    `slopes` fp32 [heads] (ALiBi, arXiv 2108.12409).
    """
    return _sloped_attention(q, cache, meta, scale=scale, slopes=slopes)


def gated(x: Tensor, activation: Gating) -> Tensor:
    """x [tokens, 2 * n] = gate | up -> act(gate) * up, [tokens, n]."""
    return _gated(x, activation)


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x [tokens, n] -> act(x), [tokens, n]."""
    return _activate(x, activation)


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden [n, hidden], weight [vocab, hidden] -> fp32 [n, vocab]."""
    return _logits(hidden, weight)


def stored_dtype(source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype to hold a matrix in until it is packed.

    `source` is that of the checkpoint, `dtype` the model's. A narrower one than the model's is
    chosen only if it has all values and the packed operators read it.
    """
    return _stored_dtype(source, dtype)


def sample(
    logits: Tensor,
    table: SampleTable,
    rows: np.ndarray,
    positions: np.ndarray,
    eos: np.ndarray,
) -> Sampled:
    """The next token of each row of logits fp32 [n, vocab].

    Row i is sampled for position `positions[i]` as record `rows[i]` of the table says, int64 [n].
    `eos` int32 is forbidden before a row's min_new_tokens. Edits are written to `logits`. Not valid
    are rows with NaN, +inf or nothing but -inf.
    """
    return _sample(logits, table, rows, positions, eos)


def log_probs(
    logits: Tensor, picks: np.ndarray, temperature: np.ndarray, ids: np.ndarray, top: int
) -> LogProbs:
    """Log-softmax of logits / temperature at `ids`, and the `top` largest (at most vocab).

    Rows `picks` int64 [n] of logits fp32 [., vocab]; temperature fp32 [n], 0 counts as 1; ids int64
    [n, width]. Of equal logits the lower id comes first. NaN where there is no distribution.
    """
    return _log_probs(logits, picks, temperature, ids, top)


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    """Set what a mask forbids to -inf, in place.

    logits fp32 [n, vocab]; rows int64 [m], different; masks int32 [m, ceil(vocab / 32)], where
    token t of logits[rows[i]] is allowed if bit t % 32 of masks[i, t // 32] is set.
    """
    _mask_logits(logits, rows, masks)


def pack(weight: Tensor, format: str = "", group: int = 0) -> PackedWeight:
    """weight [out, in] in the form that the `_packed` operators read.

    Without a format the values stay: the result may share memory with `weight`, and an
    implementation may store it in a narrower type if no value changes. "int8", "int4", "nf4" and
    "fp8" quantize: int8 and fp8 with a scale per output, int4 and nf4 with one per `group` inputs
    (16, 32, 64 or 128; 0 takes 64). `headrace.ops.ref_lowbit` defines the arithmetic.
    """
    return _pack(weight, format, group)


def open_packed(shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    """A matrix [out, in] of floats, to be filled by `pack_rows`; until then its values are any."""
    return _open_packed(shape, dtype)


def pack_rows(weight: PackedWeight, first: int, values: Tensor) -> None:
    """Rows from `first` on of a matrix of `open_packed`, in place of a `pack` of the whole.

    values [n, in] of its dtype, of adjacent elements. `first` is a multiple of `packed.PANEL`, and
    so is n unless these are the last rows.
    """
    _pack_rows(weight, first, values)


def pack_quantized(
    values: Tensor, scales: Tensor, format: str, group: int = 0, offsets: Tensor | None = None
) -> PackedWeight:
    """A matrix that a checkpoint brings quantized, laid out for the `_packed` operators.

    Nothing is rounded: element [o, i] stays values * scale - offset in fp32.
    int8: values int8 [out, in], scales [out] or one; with a group as int4, without offsets 0. fp8:
    values float8_e4m3fn, scales [out], one, or [out / 128, in / 128] with group=128. int4: values
    uint8 0..15, scales [out, in / group] and offsets of that shape, zero point * scale where there
    is a zero point; without offsets it is 8. mxfp4: codes of e2m1 as uint8, scales as int4, powers
    of two. nf4, fp4, iq4_nl: places in their tables, scales as int4. Groups are 16, 32, 64 or 128.
    Raises ValueError for other shapes and values.
    """
    return _pack_quantized(values, scales, format, group, offsets)


def linear_packed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`linear` with a packed weight; with a `residual` [tokens, out], their sum, rounded once.

    int8, int4 and mxfp4 also quantize x: to int8 with a scale per row, or per row and group.
    """
    return _linear_packed(x, weight, bias, residual)


def linear_parts(x: Tensor, weights: Sequence[PackedWeight], bias: Tensor | None = None) -> Tensor:
    """`linear` with packed weights of any formats one below the other: their products in a row."""
    return _linear_parts(x, weights, bias)


def gated_packed(
    x: Tensor, weight: PackedWeight, activation: Gating, bias: Tensor | None = None
) -> Tensor:
    """act(gate) * up of x [tokens, in] and a weight of gate rows, then as many up rows.

    -> [tokens, out / 2]. The bits of `linear_packed`, then `gated`: gate and up are rounded to x's
    dtype between.
    """
    return _gated_packed(x, weight, activation, bias)


def logits_packed(hidden: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """`logits` with a packed weight, and a bias [vocab]."""
    return _logits_packed(hidden, weight, bias)


def embedding_packed(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype, first: int = 0
) -> Tensor:
    """`embedding` of ids - first with a packed weight, as `dtype`; zeros for rows it lacks."""
    return _embedding_packed(ids, weight, dtype, first)


def router_topk(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The experts of each token: ids int32 and weights fp32, both [tokens, top_k], largest first.

    logits [tokens, experts]; a bias fp32 [experts] is added to the scores for the choice alone. All
    in fp32. Of equal experts the lower one comes first.
    """
    return _router_topk(logits, spec, bias)


def pack_heads(weights: Tensor) -> PackedHeads:
    """weights [heads, out, in]: a matrix for each head; see `pack`."""
    return _pack_heads(weights)


def heads_linear(x: Tensor, weights: PackedHeads) -> Tensor:
    """`linear` of the first `in` elements of each head with the head's own matrix.

    x [tokens, heads, in + rest] -> [tokens, heads, out + rest]; the rest follows as it is.
    """
    return _heads_linear(x, weights)


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    """gate_up [experts, gate rows | up rows, hidden], down [experts, hidden, inner]: see `pack`."""
    return _pack_experts(gate_up, down)


def moe_packed(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    activation: Gating,
    on_input: bool = False,
    first: int = 0,
) -> Tensor:
    """Gated feed-forward blocks of the chosen experts, weighted and summed in the order of choice.

    x [tokens, hidden], ids and weights as from `router_topk` -> [tokens, hidden]. Each expert's
    output is rounded to x's dtype; the sum is in fp32 and rounded once. With `on_input` x is
    weighted, and rounded, instead of what comes out. `experts` have the numbers from `first` on;
    others add nothing.
    """
    return _moe_packed(x, experts, ids, weights, activation, on_input, first)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [tokens, n] as another float dtype."""
    return _cast(x, dtype)


def take_part(x: Tensor, spans: tuple[tuple[int, int, int], ...], width: int) -> Tensor:
    """x [tokens, n] -> y [tokens, width].

    For each span (whole, part, count) y[:, part : part + count] = x[:, whole : whole + count]; the
    rest of y is zero. Values are moved, not computed.
    """
    return _take_part(x, spans, width)
