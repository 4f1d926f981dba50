"""Token embedding and output head, both cut along the vocabulary.

Both read the matrix in the form that the head multiplies with: a tied one is there once.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import even, whole
from headrace.layers.build import Build
from headrace.ops.packed import PackedWeight
from headrace.quant.base import Matrix, Targets, cut_target, plain, uncopied, when_filled


class VocabEmbedding:
    """ids int64 [tokens] -> [tokens, hidden], equal on all ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, build: Build) -> None:
        self.rows = even(vocab_size, build.shard)
        self.columns = whole(hidden_size)
        self.group = build.group
        self.dtype = build.dtype
        self.first = self.rows.local * build.shard.rank  # of the vocabulary
        self.weight = Matrix(self.rows.local, hidden_size, build.dtype)
        self.packed: PackedWeight
        self.format = build.quant.head_format

    def __call__(self, ids: Tensor) -> Tensor:
        hidden = ops.embedding_packed(ids, self.packed, self.dtype, self.first)
        return self.group.all_reduce(hidden)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden [n, hidden], bias [rows.local] -> fp32 [n, rows.local]."""
        return ops.logits_packed(hidden, self.packed, bias)

    def targets(self, prefix: str) -> Targets:
        target = cut_target(self.weight.open, self.rows, self.columns)
        return when_filled(uncopied({f"{prefix}.weight": target}, self.weight), self._pack)

    def _pack(self) -> None:
        self.packed = self.weight.pack(self.format)


class LMHead:
    """hidden [n, hidden] -> logits fp32 [n, vocab], equal on all ranks.

    `tied`: the embedding whose weight is the head's.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        build: Build,
        *,
        tied: VocabEmbedding | None = None,
        bias: bool = False,
    ) -> None:
        self.table = tied or VocabEmbedding(vocab_size, hidden_size, build)
        self.tied = tied is not None
        self.bias = torch.zeros(self.table.rows.local, dtype=build.dtype) if bias else None

    def __call__(self, hidden: Tensor) -> Tensor:
        local = self.table.logits(hidden, self.bias)
        return self.table.group.all_gather(local, self.table.rows)

    def targets(self, prefix: str) -> Targets:
        found = {} if self.tied else self.table.targets(prefix)
        if self.bias is not None:
            found[f"{prefix}.bias"] = cut_target(plain(self.bias), self.table.rows)
        return found


class PositionEmbedding:
    """A learned vector for each position, held by every rank; rows begin at `first`."""

    def __init__(self, positions: int, hidden_size: int, build: Build, first: int = 0) -> None:
        self.weight = torch.empty(positions + first, hidden_size, dtype=build.dtype)
        self.first = first

    def __call__(self, positions: Tensor) -> Tensor:
        return ops.position_embedding(positions, self.weight, self.first)

    def targets(self, prefix: str) -> Targets:
        rows, columns = map(whole, self.weight.shape)
        return {f"{prefix}.weight": cut_target(plain(self.weight), rows, columns)}
