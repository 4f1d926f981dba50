"""Multi-head latent attention (arXiv 2405.04434): a token keeps one small vector for all heads.

The vector is a normalized latent, from which each head could make its key and its value, and a
rotated part that all heads share. Queries are brought into the latent space instead, so scores and
mixed values are computed on what is kept: the same arithmetic for prompts and for decoding, and a
row never depends on how its sequence was cut.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.plan import StateSpec
from headrace.dist.topology import Cut, split_heads, whole
from headrace.layers.batch import ForwardBatch
from headrace.layers.build import Build
from headrace.layers.kv_scale import scale_targets
from headrace.layers.linear import ColumnLinear, row_linear
from headrace.layers.norm import Norm, NormSpec
from headrace.ops.meta import KvCache
from headrace.ops.packed import PackedHeads, PackedWeight
from headrace.quant.base import Part, Targets, when_filled


@dataclass(frozen=True)
class LatentSpec:
    """A latent attention layer before it is cut.

    A head's query and key have `plain_dim` elements that do not turn and `turned_dim` that do, its
    value has `value_dim`. `rank` of the latent, `query_rank` of what queries are made from, 0: from
    the hidden state itself. `bias` of the products with the hidden state and of the output.
    """

    hidden_size: int
    heads: int
    plain_dim: int
    turned_dim: int
    value_dim: int
    rank: int
    query_rank: int
    norm: NormSpec
    scale: float
    bias: bool = False
    interleaved: bool = False
    rope: int = 0

    def __post_init__(self) -> None:
        if self.bias and not self.query_rank:
            raise LoadError("attention_bias needs a q_lora_rank", field="attention_bias")

    @property
    def query_dim(self) -> int:
        return self.plain_dim + self.turned_dim


class LatentAttention:
    """x [tokens, hidden] -> [tokens, hidden]; writes the tokens' latent vectors to the cache."""

    def __init__(self, spec: LatentSpec, build: Build) -> None:
        heads = split_heads(spec.heads, spec.heads, build.shard)
        self.spec, self.heads = spec, len(heads.q)
        query = Part("q_proj", heads.q_cut(spec.query_dim))
        self.q_norm: Norm | None = None
        self.q_up: ColumnLinear | None = None
        if spec.query_rank:
            self.q_norm = Norm(spec.query_rank, spec.norm, build)
            up = Part("q_b_proj", query.rows)
            self.q_up = ColumnLinear((up,), spec.query_rank, build)
            query = Part("q_a_proj", whole(spec.query_rank))
        kept = Part("kv_a_proj_with_mqa", whole(spec.rank + spec.turned_dim))
        self.first = query.rows.local
        self.down = ColumnLinear((query, kept), spec.hidden_size, build, bias=spec.bias)
        self.kv_norm = Norm(spec.rank, spec.norm, build)
        self.up = LatentUp(spec, heads.q_cut(spec.plain_dim + spec.value_dim), build)
        out = heads.q_cut(spec.value_dim)
        self.out = row_linear("o_proj", out, spec.hidden_size, build, bias=spec.bias)
        # As `Attention` has them; what is kept is the key, so the scale of values does not count.
        self.kv_scale = torch.ones(2)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: ForwardBatch, cache: KvCache) -> Tensor:
        spec = self.spec
        down = self.down(x)
        q, kv = down[:, : self.first], down[:, self.first :]
        if self.q_norm is not None and self.q_up is not None:
            q = self.q_up(self.q_norm(q))
        q = ops.heads_linear(q.view(len(x), self.heads, spec.query_dim), self.up.packed("keys"))
        q = ops.latent_kv(
            q,
            kv,
            self.kv_norm.weight,
            spec.norm.eps,
            cos_sin,
            cache,
            batch.meta.slots,
            spec.interleaved,
        )
        mixed = ops.paged_attention(q, cache, batch.meta, scale=spec.scale)
        return self.out(ops.heads_linear(mixed, self.up.packed("values")).flatten(1))

    def state_spec(self) -> StateSpec:
        """What every rank keeps per token: all ranks the same."""
        dim = self.spec.rank + self.spec.turned_dim
        return StateSpec(kind="latent", kv_heads=1, head_dim=dim, value_dim=self.spec.rank)

    def kv_scales(self) -> tuple[float, float]:
        """What a stored 1 means in an fp8 cache: one scale, as a value is a part of its key."""
        scale = float(self.kv_scale[0])
        return scale, scale

    def set_kv_scale(self, scale: float) -> None:
        self.kv_scale.fill_(scale)

    def targets(self, prefix: str) -> Targets:
        found = self.down.targets(prefix) | self.out.targets(prefix)
        found |= scale_targets(prefix, self.kv_scale)
        if self.q_norm is not None and self.q_up is not None:
            found |= self.q_norm.targets(f"{prefix}q_a_layernorm") | self.q_up.targets(prefix)
        return found | self.kv_norm.targets(f"{prefix}kv_a_layernorm") | self.up.targets(prefix)


class LatentUp:
    """kv_b_proj, by head: from a query into the latent space ("keys"), and from there to a value.

    It becomes floats whatever it is stored as, and is not quantized on load: one part of it is
    needed turned, and the products of a head are small.
    """

    computed = ("linear",)  # what comes in through it is held in `weights`

    def __init__(self, spec: LatentSpec, rows: Cut, build: Build) -> None:
        self.spec, self.dtype = spec, build.dtype
        self.linear = ColumnLinear((Part("kv_b_proj", rows),), spec.rank, build, kind="router")
        # Kind and number of a head -> its matrix; whoever saves and restores weights walks it.
        self.weights: dict[str, PackedWeight] = {}
        self._packed: dict[str, PackedHeads] = {}

    def packed(self, kind: str) -> PackedHeads:
        """All heads' "keys" [rank, plain_dim] or "values" [value_dim, rank]."""
        if kind not in self._packed:
            heads = tuple(self.weights[f"{kind}.{index}"] for index in range(self._heads))
            self._packed[kind] = PackedHeads(heads)
        return self._packed[kind]

    @property
    def _heads(self) -> int:
        return self.linear.shape.local_rows // (self.spec.plain_dim + self.spec.value_dim)

    def packed_shapes(self) -> dict[str, tuple[int, int]]:
        """What `weights` has once they are split, each [out, in]."""
        keys, values = self.spec.plain_dim, self.spec.value_dim
        shapes = {"keys": (self.spec.rank, keys), "values": (values, self.spec.rank)}
        return {f"{kind}.{i}": shapes[kind] for kind in shapes for i in range(self._heads)}

    def targets(self, prefix: str) -> Targets:
        return when_filled(self.linear.targets(prefix), self._split)

    def _split(self) -> None:
        spec, whole_matrix = self.spec, self.linear.weights.pop("packed")
        rows = torch.arange(self.linear.shape.local_rows)
        values = ops.embedding_packed(rows, whole_matrix, self.dtype)
        stacked = values.view(-1, spec.plain_dim + spec.value_dim, spec.rank)
        keys, up = torch.split(stacked, [spec.plain_dim, spec.value_dim], dim=1)
        for kind, weights in (("keys", keys.transpose(1, 2)), ("values", up)):
            packed = ops.pack_heads(weights.contiguous())
            self.weights |= {f"{kind}.{index}": one for index, one in enumerate(packed.heads)}
