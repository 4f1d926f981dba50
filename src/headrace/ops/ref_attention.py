"""Paged attention in plain torch: the definition, fast enough for small models.

Chunks of equal, small length (decode rows, draft verification) are computed together; a long
prefill chunk is cut into blocks of queries. Both are the same formula on other shapes. Padded keys
read a slot that is already written, so stale memory can never reach a result.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headrace.ops.meta import AttentionMeta, KvCache

_SHORT = 16  # chunks up to this long are batched
_BATCH_KEYS = 1 << 15  # keys gathered at once for a batch of short chunks
_BLOCK_SCORES = 1 << 20  # scores per head of a query block
_INT8_MOST = 127.0
_FP8_MOST = 448.0


@dataclass(frozen=True)
class _Block:
    """`sequences` sequences with `queries` queries each, attending to at most L keys.

    `tokens`: int64 [sequences * queries], rows of q. `slots`: int64 [sequences, L], rows of the
    caches. `visible`: bool [sequences, queries, L]. `distance`: int64 of that shape, from the query
    to the key: not above 0 where it is visible.
    """

    sequences: int
    queries: int
    tokens: Tensor
    slots: Tensor
    visible: Tensor
    distance: Tensor


def write_kv(k: Tensor, v: Tensor | None, cache: KvCache, slots: Tensor) -> None:
    _write(k, cache.keys, cache.key_scale, slots)
    if v is not None:
        _write(v, cache.values, cache.value_scale, slots)


def _write(x: Tensor, stored: Tensor, scale: Tensor | float, slots: Tensor) -> None:
    if stored.dtype == torch.int8 and isinstance(scale, Tensor):
        most = x.float().abs().amax(dim=-1)
        factor = torch.where(most > 0, _INT8_MOST / most, 0.0)
        scale.flatten(0, 1).index_copy_(0, slots, most / _INT8_MOST)
        x = (x.float() * factor[..., None]).round_()
    elif stored.dtype == torch.float8_e4m3fn:
        # NaN becomes the largest number too: a model that makes it is found out by its logits.
        x = (x.float() * (1 / scale)).nan_to_num(_FP8_MOST).clamp(-_FP8_MOST, _FP8_MOST)
        stored, x = stored.view(torch.uint8), x.to(stored.dtype).view(torch.uint8)
    stored.flatten(0, 1).index_copy_(0, slots, x.to(stored.dtype))


@dataclass(frozen=True)
class Sight:
    """What a query sees: everything before it, a window, its chunk of that size, or all."""

    window: int = 0
    causal: bool = True
    in_chunks: bool = False

    def oldest(self, position: Tensor) -> Tensor:
        if not self.window:
            return torch.zeros_like(position)
        if self.in_chunks:
            return position // self.window * self.window
        return (position - self.window + 1).clamp_min(0)


@dataclass(frozen=True, eq=False)
class _How:
    scale: float
    sight: Sight
    soft_cap: float = 0.0
    sinks: Tensor | None = None
    slopes: Tensor | None = None


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
    return _attend(q, cache, meta, _How(scale, Sight(window, causal), soft_cap, sinks))


def chunked_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, size: int
) -> Tensor:
    return _attend(q, cache, meta, _How(scale, Sight(size, in_chunks=True)))


def sloped_attention(
    q: Tensor, cache: KvCache, meta: AttentionMeta, *, scale: float, slopes: Tensor
) -> Tensor:
    return _attend(q, cache, meta, _How(scale, Sight(), slopes=slopes))


def _attend(q: Tensor, cache: KvCache, meta: AttentionMeta, how: _How) -> Tensor:
    out = q.new_empty(*q.shape[:2], cache.values.shape[-1])
    for block in _blocks(meta, how.sight):
        scores = _scores(
            q.index_select(0, block.tokens),
            _rows(cache.keys, cache.key_scale, block.slots),
            block,
            how.scale,
            how.soft_cap,
        )
        if how.slopes is not None:
            scores += _slanted(how.slopes, block, scores)
        scores.masked_fill_(~block.visible[:, None, None], float("-inf"))
        weights = _softmax(scores, how.sinks)
        out[block.tokens] = _mix(
            weights, _rows(cache.values, cache.value_scale, block.slots), block
        ).to(out.dtype)
    return out


def _rows(stored: Tensor, scale: Tensor | float, slots: Tensor) -> Tensor:
    """stored [pages, page_size, heads, dim], slots [s, L] -> fp32 [s, L, heads, dim]."""
    bits = stored.view(torch.uint8) if stored.dtype == torch.float8_e4m3fn else stored
    rows = bits.flatten(0, 1).index_select(0, slots.flatten()).view(stored.dtype).float()
    if isinstance(scale, Tensor):
        rows *= scale.flatten(0, 1).index_select(0, slots.flatten())[..., None]
    elif scale != 1:
        rows *= scale
    return rows.view(*slots.shape, *stored.shape[2:])


def _scores(q: Tensor, k: Tensor, block: _Block, scale: float, soft_cap: float) -> Tensor:
    """q [tokens, heads, dim], k [s, L, kv_heads, dim] -> fp32 [s, kv_heads, group, queries, L]."""
    s, n, kv_heads, dim = block.sequences, block.queries, k.shape[2], q.shape[-1]
    q = q.float().view(s, n, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    group = q.shape[2]
    q = q.reshape(s, kv_heads, group * n, dim)
    scores = torch.matmul(q, k.permute(0, 2, 3, 1)).mul_(scale)
    if soft_cap:
        scores = torch.tanh(scores / soft_cap) * soft_cap
    return scores.view(s, kv_heads, group, n, -1)


def _slanted(slopes: Tensor, block: _Block, scores: Tensor) -> Tensor:
    """slopes [heads] -> slope * distance, [s, kv_heads, group, queries, L]."""
    per_head = slopes.view(1, *scores.shape[1:3], 1, 1)
    return per_head * block.distance[:, None, None].float()


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax over keys; a sink is one more logit per head, whose share is thrown away."""
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    s, kv_heads, group, n, _ = scores.shape
    sink = sinks.float().view(1, kv_heads, group, 1, 1).expand(s, kv_heads, group, n, 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]


def _mix(weights: Tensor, v: Tensor, block: _Block) -> Tensor:
    """weights [s, kv_heads, group, queries, L], v [s, L, kv_heads, dim] -> [tokens, heads, dim]."""
    s, kv_heads, group, n, _ = weights.shape
    mixed = torch.matmul(weights.flatten(2, 3), v.transpose(1, 2))
    mixed = mixed.view(s, kv_heads, group, n, -1).permute(0, 3, 1, 2, 4)
    return mixed.reshape(s * n, kv_heads * group, -1)


def _blocks(meta: AttentionMeta, sight: Sight) -> list[_Block]:
    key = ("ref blocks", sight)
    if key not in meta.derived:
        meta.derived[key] = list(_plan(meta, sight))
    blocks: list[_Block] = meta.derived[key]
    return blocks


def _plan(meta: AttentionMeta, sight: Sight) -> Iterator[_Block]:
    context = meta.context.tolist()
    short: dict[int, list[int]] = defaultdict(list)
    for chunk, count in enumerate(meta.query_start.diff().tolist()):
        if count <= _SHORT:
            short[count].append(chunk)
            continue
        step = max(_SHORT, min(256, _BLOCK_SCORES // context[chunk]))
        for first in range(0, count, step):
            yield _block(meta, [chunk], range(first, min(first + step, count)), sight)
    short.pop(0, None)
    for count, chunks in short.items():
        for batch in _batches(chunks, context):
            yield _block(meta, batch, range(count), sight)


def _batches(chunks: list[int], context: list[int]) -> Iterator[list[int]]:
    """Chunks of similar context together, so that padding is small and memory bounded."""
    batch: list[int] = []
    for chunk in sorted(chunks, key=lambda c: context[c]):
        if batch and (len(batch) + 1) * context[chunk] > _BATCH_KEYS:
            yield batch
            batch = []
        batch.append(chunk)
    yield batch


def _block(meta: AttentionMeta, chunks: list[int], queries: range, sight: Sight) -> _Block:
    """Some `queries` of each of `chunks`."""
    device = meta.rows.device
    chunk = torch.tensor(chunks, device=device)
    begin, end = meta.query_start[chunk].long(), meta.query_start[chunk + 1].long()
    steps = torch.arange(queries.start, queries.stop, device=device)
    position = (meta.context[chunk] - (end - begin))[:, None] + steps
    low = sight.oldest(position[:, :1])
    if not sight.causal:
        position = (meta.context[chunk].long() - 1)[:, None].expand_as(position)
    last = position[:, -1:]
    key = low + torch.arange(int((last - low).max()) + 1, device=device)
    distance = key[:, None] - position[:, :, None]
    visible = (distance <= 0) & (key[:, None] >= sight.oldest(position)[:, :, None])
    key = torch.minimum(key, last)
    page = meta.page_table[meta.rows[chunk].long()[:, None], key // meta.page_size].long()
    return _Block(
        sequences=len(chunks),
        queries=len(queries),
        tokens=(begin[:, None] + steps).flatten(),
        slots=page * meta.page_size + key % meta.page_size,
        visible=visible,
        distance=distance,
    )
