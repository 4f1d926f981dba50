"""The list of operators: what a model may compute, and who computes it.

Each function states the contract; `headrace.ops.ref` is its definition. At import a table picks,
for each operator, the first implementation that has it. This package is the only one that knows
which device or instruction set there is. Tensors named `x` are [tokens, ...] in the model's dtype.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from headrace.ops import cpu, ref
from headrace.ops.experts import PackedExperts, RouterSpec
from headrace.ops.meta import AttentionMeta, KvCache
from headrace.ops.packed import FORMATS, PackedWeight
from headrace.ops.sampling import LogProbs, Sampled, SampleTable

Activation = Literal["silu", "gelu_tanh", "gelu_erf", "relu", "relu_squared"]

# Best first; `ref` has every operator.
_IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "ref": ref}
_serving: dict[str, str] = {}


def implementations() -> dict[str, str]:
    """Operator name -> name of the implementation that serves it."""
    return dict(_serving)


def packing() -> str:
    """Names the layout that `pack` makes; weights packed under one name fit no other."""
    return f"{_serving['pack']}-{cpu.library.ABI if _serving['pack'] == 'cpu' else 0}"


def check_packed(weight: PackedWeight) -> None:
    """Whether memory that `pack` did not make can be used as a packed weight.

    Raises:
        ValueError: unknown format, sizes that do not fit, or scales that are no numbers.
    """
    if weight.format not in FORMATS or min(weight.out_size, weight.in_size) < 1:
        raise ValueError(f"format {weight.format!r} [{weight.out_size}, {weight.in_size}]")
    for scales in (weight.scales, weight.offsets):
        if scales is not None and not bool(scales.isfinite().all()):
            raise ValueError("its scales are not all finite")
    if _serving["pack"] == "cpu":
        cpu.packing.check_packed(weight)


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
_position_embedding: Callable[..., Tensor] = _best("position_embedding")
_combine: Callable[..., Tensor] = _best("combine")
_gather: Callable[..., Tensor] = _best("gather")
_rms_norm: Callable[..., tuple[Tensor, Tensor]] = _best("rms_norm")
_layer_norm: Callable[..., Tensor] = _best("layer_norm")
_rotary_table: Callable[..., Tensor] = _best("rotary_table")
_rotary: Callable[..., tuple[Tensor, Tensor]] = _best("rotary")
_write_kv: Callable[..., None] = _best("write_kv")
_rotary_kv: Callable[..., Tensor] = _best("rotary_kv")
_paged_attention: Callable[..., Tensor] = _best("paged_attention")
_gated: Callable[..., Tensor] = _best("gated")
_activate: Callable[..., Tensor] = _best("activate")
_logits: Callable[..., Tensor] = _best("logits")
_stored_dtype: Callable[..., torch.dtype] = _best("stored_dtype")
_sample: Callable[..., Sampled] = _best("sample")
_log_probs: Callable[..., LogProbs] = _best("log_probs")
_pack: Callable[..., PackedWeight] = _best("pack")
_pack_quantized: Callable[..., PackedWeight] = _best("pack_quantized")
_linear_packed: Callable[..., Tensor] = _best("linear_packed")
_mask_logits: Callable[..., None] = _best("mask_logits")
_logits_packed: Callable[..., Tensor] = _best("logits_packed")
_embedding_packed: Callable[..., Tensor] = _best("embedding_packed")
_gated_packed: Callable[..., Tensor] = _best("gated_packed")
_router_topk: Callable[..., tuple[Tensor, Tensor]] = _best("router_topk")
_pack_experts: Callable[..., PackedExperts] = _best("pack_experts")
_moe_packed: Callable[..., Tensor] = _best("moe_packed")
_cast: Callable[..., Tensor] = _best("cast")
_take_part: Callable[..., Tensor] = _best("take_part")


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
    causal: bool = True,
) -> Tensor:
    """Causal attention of each token to its own sequence, for any mix of chunks.

    q [tokens, heads, dim], heads a multiple of the cache's kv_heads -> [tokens, heads, dim]. The
    keys of these tokens are already in the cache, and are read from there. A query at
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


def gated(x: Tensor, activation: Activation) -> Tensor:
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
    implementation may store it in a narrower type if no value changes. "int8", "int4" and "fp8"
    quantize: int8 and fp8 with a scale per output, int4 with one per `group` inputs (16, 32, 64 or
    128; 0 takes 64). `headrace.ops.ref_lowbit` defines the arithmetic.
    """
    return _pack(weight, format, group)


def pack_quantized(
    values: Tensor, scales: Tensor, format: str, group: int = 0, offsets: Tensor | None = None
) -> PackedWeight:
    """A matrix that a checkpoint brings quantized, laid out for the `_packed` operators.

    Nothing is rounded: element [o, i] stays values * scale - offset in fp32.
    int8: values int8 [out, in], scales [out] or one. fp8: values float8_e4m3fn, scales [out], one,
    or [out / 128, in / 128] with group=128. int4: values uint8 0..15, scales [out, in / group] and
    offsets of that shape, zero point * scale where there is a zero point; without offsets it is 8.
    Raises ValueError for other shapes and values.
    """
    return _pack_quantized(values, scales, format, group, offsets)


def linear_packed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """`linear` with a packed weight; with a `residual` [tokens, out], their sum, rounded once.

    int8 and int4 weights also quantize x: to int8 with a scale per row, or per row and group.
    """
    return _linear_packed(x, weight, bias, residual)


def gated_packed(
    x: Tensor, weight: PackedWeight, activation: Activation, bias: Tensor | None = None
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


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    """gate_up [experts, gate rows | up rows, hidden], down [experts, hidden, inner]: see `pack`."""
    return _pack_experts(gate_up, down)


def moe_packed(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    activation: Activation,
    first: int = 0,
) -> Tensor:
    """Gated feed-forward blocks of the chosen experts, weighted and summed in the order of choice.

    x [tokens, hidden], ids and weights as from `router_topk` -> [tokens, hidden]. Each expert's
    output is rounded to x's dtype; the sum is in fp32 and rounded once. `experts` have the numbers
    from `first` on; others add nothing.
    """
    return _moe_packed(x, experts, ids, weights, activation, first)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [tokens, n] as another float dtype."""
    return _cast(x, dtype)


def take_part(x: Tensor, spans: tuple[tuple[int, int, int], ...], width: int) -> Tensor:
    """x [tokens, n] -> y [tokens, width].

    For each span (whole, part, count) y[:, part : part + count] = x[:, whole : whole + count]; the
    rest of y is zero. Values are moved, not computed.
    """
    return _take_part(x, spans, width)
