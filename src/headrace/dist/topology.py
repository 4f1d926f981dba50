"""Which part of each dimension a tensor-parallel rank holds. Pure arithmetic, no torch.

Every rank has the same shapes. Where a size does not divide, the last ranks hold padding, whose
weights are zero and add nothing. When there are more ranks than KV heads, a KV head is held by
several ranks, which share its query heads.
"""

from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `size`.

    Things are cut into `units` equal parts, of which each rank has as many; 0 means one each. Sums
    over a unit are the same numbers however many ranks there are.
    """

    rank: int = 0
    size: int = 1
    units: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank {self.rank} is not in 0..{self.size - 1}")
        if self.units % self.size:
            raise ValueError(f"{self.units} units cannot be dealt to {self.size} ranks")

    @property
    def pieces(self) -> int:
        """Units of one rank."""
        return max(1, self.units // self.size)


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
    local = -(-size // (shard.size * shard.pieces)) * shard.pieces
    first = min(shard.rank * local, size)
    count = min(local, size - first)
    return Cut(full=size, local=local, spans=(Span(first, 0, count),) if count else ())


def piece(cut: Cut, index: int, count: int) -> Cut:
    """The `index`-th of `count` equal parts of the local elements."""
    size = cut.local // count
    first, spans = index * size, []
    for span in cut.spans:
        begin = max(span.target, first)
        end = min(span.target + span.count, first + size)
        if begin < end:
            spans.append(Span(span.source + begin - span.target, begin - first, end - begin))
    return Cut(cut.full, size, tuple(spans))


@dataclass(frozen=True)
class HeadSplit:
    """Local attention heads: `q` holds global query heads, `kv` global KV heads, None is padding.

    Local query head i uses local KV head i // (len(q) / len(kv)), as attention operators expect.
    `owned` is `kv` without the heads that a rank before this one has too.
    """

    heads: int
    kv_heads: int
    q: tuple[int | None, ...]
    kv: tuple[int | None, ...]
    owned: tuple[int | None, ...]

    def q_cut(self, head_dim: int) -> Cut:
        return _head_cut(self.q, self.heads, head_dim)

    def kv_cut(self, head_dim: int) -> Cut:
        return _head_cut(self.kv, self.kv_heads, head_dim)

    def owned_cut(self, head_dim: int) -> Cut:
        return _head_cut(self.owned, self.kv_heads, head_dim)


def split_heads(heads: int, kv_heads: int, shard: Shard) -> HeadSplit:
    """Distribute attention heads; `heads` must be a multiple of `kv_heads`."""
    if heads % kv_heads:
        raise ValueError(f"{heads} heads cannot share {kv_heads} KV heads evenly")
    group, units = heads // kv_heads, shard.size * shard.pieces
    here = range(shard.rank * shard.pieces, (shard.rank + 1) * shard.pieces)
    q: tuple[int | None, ...] = ()
    kv: tuple[int | None, ...] = ()
    owned: tuple[int | None, ...] = ()
    if units <= kv_heads:
        local = -(-kv_heads // units)
        mine = range(here.start * local, here.stop * local)
        kv = tuple(h if h < kv_heads else None for h in mine)
        q = tuple(None if h is None else h * group + i for h in kv for i in range(group))
        return HeadSplit(heads, kv_heads, q, kv, kv)
    holders = units // kv_heads  # units per KV head; units left over hold padding
    local = -(-group // holders)
    for head, run in groupby(here, lambda unit: unit // holders):
        shares = [unit % holders for unit in run]
        kv += (head if head < kv_heads else None,)
        owned += (kv[-1] if shares[0] == 0 else None,)
        members = range(shares[0] * local, (shares[-1] + 1) * local)
        q += tuple(
            head * group + i if head < kv_heads and i < group else None for i in members
        )
    if shard.pieces % len(kv) or (len(kv) > 1 and shard.pieces // len(kv) != holders):
        raise ValueError(f"{kv_heads} KV heads cannot be dealt to {units} units evenly")
    return HeadSplit(heads, kv_heads, q, kv, owned)


def stage_layers(layers: int, stage: Shard) -> range:
    """The layers of one stage of a pipeline; the first stages have one more where it is uneven."""
    share, more = divmod(layers, stage.size)
    first = stage.rank * share + min(stage.rank, more)
    return range(first, first + share + (stage.rank < more))


def _head_cut(local: tuple[int | None, ...], total: int, head_dim: int) -> Cut:
    spans = tuple(
        Span(head * head_dim, index * head_dim, head_dim)
        for index, head in enumerate(local)
        if head is not None
    )
    return Cut(full=total * head_dim, local=len(local) * head_dim, spans=spans)


@dataclass(frozen=True)
class Place:
    """Where rank `rank` of a grid is. `gpu_id`: number of its device on its node."""

    rank: int
    pp_rank: int
    tp_rank: int
    ep_rank: int
    node: int
    gpu_id: int


@dataclass(frozen=True)
class Grid:
    """All ranks of a model: `pp` stages of `tp` ranks, on `nodes` machines.

    Experts are dealt to `ep` groups of ranks of a stage. A node holds whole stages, or a stage
    takes whole nodes. Ranks are numbered stage by stage.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1
    nodes: int = 1
    base_gpu_id: int = 0
    gpu_id_step: int = 1

    def __post_init__(self) -> None:
        if self.pp % self.nodes and self.nodes % self.pp:
            raise ValueError(f"{self.pp} stages cannot be laid on {self.nodes} nodes")
        if self.tp % self.nodes_per_stage:
            raise ValueError(f"{self.tp} ranks cannot be laid on {self.nodes_per_stage} nodes")
        if self.tp % self.ep:
            raise ValueError(f"{self.tp} ranks cannot be {self.ep} groups of experts")

    @property
    def size(self) -> int:
        return self.tp * self.pp

    @property
    def stages_per_node(self) -> int:
        return max(self.pp // self.nodes, 1)

    @property
    def nodes_per_stage(self) -> int:
        return max(self.nodes // self.pp, 1)

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one stage on one node."""
        return self.tp // self.nodes_per_stage

    def place(self, rank: int) -> Place:
        pp_rank, tp_rank = divmod(rank, self.tp)
        stage, member = pp_rank % self.stages_per_node, tp_rank % self.ranks_per_stage
        node = pp_rank // self.stages_per_node * self.nodes_per_stage
        return Place(
            rank=rank,
            pp_rank=pp_rank,
            tp_rank=tp_rank,
            ep_rank=tp_rank // (self.tp // self.ep),
            node=node + tp_rank // self.ranks_per_stage,
            gpu_id=self.base_gpu_id + stage * self.ranks_per_stage + member * self.gpu_id_step,
        )

    def on_node(self, node: int) -> list[Place]:
        """The ranks of one machine."""
        places = map(self.place, range(self.size))
        return [place for place in places if place.node == node]


def share_of_cores(cores: list[int], index: int, ranks: int) -> list[int]:
    """The cores of one of `ranks` ranks on a machine; with more ranks than cores some share one."""
    if ranks > len(cores):
        return [cores[index % len(cores)]]
    return cores[index * len(cores) // ranks : (index + 1) * len(cores) // ranks]
