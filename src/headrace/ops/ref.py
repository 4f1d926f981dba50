"""The definition of every operator, in plain torch.

Other implementations must agree with these functions. Contracts (shapes, dtypes) stand in
`headrace.ops`. Reductions and transcendental functions run in fp32 and round once, at the end.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.ops import ref_lowbit
from headrace.ops.experts import ClampedSwiglu, PackedExperts, RouterSpec
from headrace.ops.meta import KvCache
from headrace.ops.packed import FLOAT_FORMATS, PackedHeads, PackedWeight, check_quantized, format_of
from headrace.ops.ref_attention import (
    chunked_attention,
    paged_attention,
    sloped_attention,
    write_kv,
)
from headrace.ops.ref_sampling import log_probs, sample

__all__ = [
    "activate",
    "cast",
    "chunked_attention",
    "columns",
    "combine",
    "embedding",
    "embedding_packed",
    "gated",
    "gated_packed",
    "gather",
    "heads_linear",
    "latent_kv",
    "layer_norm",
    "linear",
    "linear_packed",
    "linear_parts",
    "log_probs",
    "logits",
    "logits_packed",
    "mask_logits",
    "moe_packed",
    "open_packed",
    "pack",
    "pack_experts",
    "pack_heads",
    "pack_quantized",
    "pack_rows",
    "paged_attention",
    "position_embedding",
    "rms_norm",
    "rotary",
    "rotary_kv",
    "rotary_table",
    "router_topk",
    "sample",
    "sloped_attention",
    "stored_dtype",
    "take_part",
    "turn",
    "write_kv",
]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(ids, weight)


def position_embedding(positions: Tensor, weight: Tensor, first: int) -> Tensor:
    return F.embedding(positions + first, weight)


def combine(
    x: Tensor,
    z: Tensor | None,
    a: float,
    b: float,
    soft_cap: float,
    limit: float,
    gate: Tensor | None = None,
) -> Tensor:
    y = a * x.float()
    if z is not None:
        y = y + (b if gate is None else b * gate.float().sigmoid()) * z.float()
    if soft_cap > 0:
        y = soft_cap * torch.tanh(y / soft_cap)
    if limit > 0:
        y = y.clamp(-limit, limit)
    return y.to(x.dtype)


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
    if weight.dim() == 1:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    y = F.layer_norm(x.float(), x.shape[-1:], None, None, eps) * weight.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def rotary_table(positions: Tensor, inv_freq: Tensor, scale: float | Tensor) -> Tensor:
    # The angle is an fp32 product, as models were trained. Its sine and cosine are taken in fp64,
    # so that rounding to fp32 hides where in a vector register an element happened to sit.
    angle = (positions[:, None].float() * inv_freq).double()
    return (torch.cat((angle.cos(), angle.sin()), dim=-1) * scale).float()


def turn(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    return rotary(x, x[:, :0], cos_sin, interleaved)[0]


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
    rank = len(weight)
    q_rest, k_rest = rotary(q[..., rank:], kv[:, None, rank:], cos_sin, interleaved)
    latent, _ = rms_norm(kv[:, :rank], weight, eps, None)
    write_kv(torch.cat((latent[:, None], k_rest), dim=-1), None, cache, slots)
    return torch.cat((q[..., :rank], q_rest), dim=-1)


def columns(x: Tensor, order: Tensor) -> Tensor:
    return x[:, order]


def gated(x: Tensor, activation: str | ClampedSwiglu) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    if isinstance(activation, ClampedSwiglu):
        g = gate.float().clamp(max=activation.limit)
        u = up.float().clamp(-activation.limit, activation.limit)
        return (g * torch.sigmoid(activation.alpha * g) * (u + 1)).to(x.dtype)
    return (_ACTIVATIONS[activation](gate.float()) * up).to(x.dtype)


def activate(x: Tensor, activation: str) -> Tensor:
    return _ACTIVATIONS[activation](x.float()).to(x.dtype)


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return F.linear(hidden, weight).float()


def stored_dtype(source: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    return dtype


def mask_logits(logits: Tensor, rows: Tensor, masks: Tensor) -> None:
    bits = torch.arange(32, dtype=torch.int32)
    allowed = (masks[:, :, None] >> bits & 1).reshape(len(rows), -1)[:, : logits.shape[1]]
    logits[rows] = logits[rows].masked_fill(allowed == 0, float("-inf"))


def pack(weight: Tensor, format: str = "", group: int = 0) -> PackedWeight:
    if format not in ("", format_of(weight)):
        return ref_lowbit.pack(ref_lowbit.quantize(weight, format, group))
    out_size, in_size = weight.shape
    return PackedWeight(weight, out_size, in_size, format_of(weight))


def open_packed(shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight:
    values = torch.empty(shape, dtype=dtype)
    return PackedWeight(values, *shape, format_of(values))


def pack_rows(weight: PackedWeight, first: int, values: Tensor) -> None:
    weight.data[first : first + len(values)] = values


def pack_quantized(
    values: Tensor, scales: Tensor, format: str, group: int = 0, offsets: Tensor | None = None
) -> PackedWeight:
    return ref_lowbit.pack(check_quantized(values, scales, format, group, offsets))


def linear_packed(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, residual: Tensor | None = None
) -> Tensor:
    if weight.format not in FLOAT_FORMATS:
        y = ref_lowbit.linear(x, weight, bias)
        return (y if residual is None else y + residual).to(x.dtype)
    if residual is None:
        return F.linear(x, weight.data, bias)
    y = F.linear(x.float(), weight.data.float(), None if bias is None else bias.float())
    return (y + residual).to(x.dtype)


def linear_parts(x: Tensor, weights: Sequence[PackedWeight], bias: Tensor | None) -> Tensor:
    sizes = [weight.out_size for weight in weights]
    biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
    return torch.cat([linear_packed(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=1)


def gated_packed(
    x: Tensor, weight: PackedWeight, activation: str | ClampedSwiglu, bias: Tensor | None
) -> Tensor:
    return gated(linear_packed(x, weight, bias), activation)


def logits_packed(hidden: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    if weight.format not in FLOAT_FORMATS:
        return ref_lowbit.linear(hidden, weight, bias)
    found = logits(hidden, weight.data)
    return found if bias is None else found + bias.float()


def embedding_packed(
    ids: Tensor, weight: PackedWeight, dtype: torch.dtype, first: int = 0
) -> Tensor:
    local = ids - first
    elsewhere = (local < 0) | (local >= weight.out_size)
    rows = _rows(local.masked_fill(elsewhere, 0), weight, dtype)
    return rows.masked_fill(elsewhere[:, None], 0)


def _rows(ids: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    if weight.format not in FLOAT_FORMATS:
        return ref_lowbit.rows(weight, ids).to(dtype)
    return embedding(ids, weight.data).to(dtype)


def pack_heads(weights: Tensor) -> PackedHeads:
    return PackedHeads(tuple(map(pack, weights)))


def heads_linear(x: Tensor, weights: PackedHeads) -> Tensor:
    size = weights.heads[0].in_size
    made = [
        linear_packed(x[:, head, :size], weight, None) for head, weight in enumerate(weights.heads)
    ]
    return torch.cat((torch.stack(made, dim=1), x[..., size:]), dim=-1)


def router_topk(logits: Tensor, spec: RouterSpec, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    logits = logits.float()
    if spec.jitter > 0:
        return _mixed_sparsely(logits, spec)
    scores = logits.sigmoid() if spec.sigmoid else logits.softmax(dim=-1)
    keys = logits if bias is None else scores + bias
    if spec.groups > 1:
        groups = keys.view(len(keys), spec.groups, -1)
        totals = groups.topk(spec.group_best, dim=-1).values.sum(dim=-1)
        kept = torch.zeros_like(totals).scatter(1, _largest(totals, spec.top_groups), 1)
        keys = groups.masked_fill(kept[:, :, None] == 0, float("-inf")).flatten(1)
    order = _largest(keys, spec.top_k)
    weights = scores.gather(1, order)
    if spec.renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return order.int(), weights * spec.scale


def _mixed_sparsely(logits: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    left, ids, weights = logits, [], []
    for _ in range(spec.top_k):
        best, chosen = left.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().maximum(best) > 2 * spec.jitter
        weights.append(left.masked_fill(far, float("-inf")).softmax(dim=-1).gather(1, chosen))
        ids.append(chosen)
        left = left.scatter(1, chosen, float("-inf"))
    return torch.cat(ids, dim=1).int(), torch.cat(weights, dim=1) * spec.scale


def _largest(keys: Tensor, count: int) -> Tensor:
    """Places of the largest keys; stable: of equal ones the lower comes first."""
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices[:, :count]


def pack_experts(gate_up: Tensor, down: Tensor) -> PackedExperts:
    gate, up = gate_up.chunk(2, dim=1)
    gates, ups, downs = (tuple(map(pack, weights)) for weights in (gate, up, down))
    return PackedExperts(gates, ups, downs)


def moe_packed(
    x: Tensor,
    experts: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    activation: str | ClampedSwiglu,
    on_input: bool = False,
    first: int = 0,
) -> Tensor:
    chosen = x.new_zeros(*ids.shape, experts.downs[0].out_size)
    count = len(experts.gates)
    orders = experts.orders or (None,) * 3 * count
    for index, (gate, up, down) in enumerate(
        zip(experts.gates, experts.ups, experts.downs, strict=True)
    ):
        tokens, place = (ids == first + index).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        given = x[tokens]
        if on_input:
            given = (weights[tokens, place, None] * given).to(x.dtype)
        biases = experts.gate_up_bias, experts.down_bias
        before, after = (None if bias is None else bias[index].to(x.dtype) for bias in biases)
        gate_order, up_order, down_order = orders[index::count]
        halves = (None, None) if before is None else before.chunk(2)
        pair = ((gate, gate_order, halves[0]), (up, up_order, halves[1]))
        made = [linear_packed(_taken(given, order), weight, bias) for weight, order, bias in pair]
        inner = gated(torch.cat(made, dim=1), activation)
        chosen[tokens, place] = linear_packed(_taken(inner, down_order), down, after)
    if on_input:
        weights = torch.ones_like(weights)
    y = torch.zeros(chosen.shape[::2])
    for weight, output in zip(weights.unbind(1), chosen.unbind(1), strict=True):
        y += weight[:, None] * output
    return y.to(x.dtype)


def _taken(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else columns(x, order)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype)


def take_part(x: Tensor, spans: tuple[tuple[int, int, int], ...], width: int) -> Tensor:
    y = x.new_zeros(len(x), width)
    for whole, part, count in spans:
        y[:, part : part + count] = x[:, whole : whole + count]
    return y
