"""Which part of each dimension a tensor-parallel rank holds. Pure arithmetic, no torch.

Every rank has the same shapes. Where a size does not divide, the last ranks hold padding, whose
weights are zero and add nothing. When there are more ranks than KV heads, a KV head is held by
several ranks, which share its query heads.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in 0..{self.size - 1}")


@dataclass(frozen=True)
class Span:
    """`count` elements from `source` in the whole dimension go to `target` in the local one."""

    source: int
    target: int
    count: int


@dataclass(frozen=True)
class Cut:
    """The local part of one dimension; what no span covers is padding."""

    full: int
    local: int
    spans: tuple[Span, ...]

    @property
    def padded(self) -> bool:
        return sum(span.count for span in self.spans) < self.local


def whole(size: int) -> Cut:
    """A dimension that every rank holds entirely."""
    return Cut(full=size, local=size, spans=(Span(0, 0, size),))


def even(size: int, shard: Shard) -> Cut:
    """Consecutive equal parts; joined in rank order, all padding is at the end."""
    local = -(-size // shard.size)
    first = min(shard.rank * local, size)
    count = min(local, size - first)
    return Cut(full=size, local=local, spans=(Span(first, 0, count),) if count else ())


@dataclass(frozen=True)
class HeadSplit:
    """Local attention heads: `q` holds global query heads, `kv` global KV heads, None is padding.

    Local query head i uses local KV head i // (len(q) / len(kv)), as attention operators expect.
    """

    heads: int
    kv_heads: int
    q: tuple[int | None, ...]
    kv: tuple[int | None, ...]

    def q_cut(self, head_dim: int) -> Cut:
        return _head_cut(self.q, self.heads, head_dim)

    def kv_cut(self, head_dim: int) -> Cut:
        return _head_cut(self.kv, self.kv_heads, head_dim)


def split_heads(heads: int, kv_heads: int, shard: Shard) -> HeadSplit:
    """Distribute attention heads; `heads` must be a multiple of `kv_heads`."""
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads evenly")
    group = heads // kv_heads
    if shard.size <= kv_heads:
        local = -(-kv_heads // shard.size)
        first = shard.rank * local
        kv = tuple(h if h < kv_heads else None for h in range(first, first + local))
        q = tuple(None if h is None else h * group + i for h in kv for i in range(group))
        return HeadSplit(heads, kv_heads, q, kv)
    holders = shard.size // kv_heads  # ranks per KV head; ranks left over hold padding
    head, share = divmod(shard.rank, holders)
    local = -(-group // holders)
    members = range(share * local, (share + 1) * local)
    if head >= kv_heads:
        return HeadSplit(heads, kv_heads, (None,) * local, (None,))
    q = tuple(head * group + i if i < group else None for i in members)
    return HeadSplit(heads, kv_heads, q, (head,))


def _head_cut(local: tuple[int | None, ...], total: int, head_dim: int) -> Cut:
    spans = tuple(
        Span(head * head_dim, index * head_dim, head_dim)
        for index, head in enumerate(local)
        if head is not None
    )
    return Cut(full=total * head_dim, local=len(local) * head_dim, spans=spans)
