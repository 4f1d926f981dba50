"""Token embedding and output head, both cut along the vocabulary.

Both read the matrix in the form that the head multiplies with: a tied one is there once.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import even, whole
from headrace.layers.build import Build
from headrace.ops.packed import PackedWeight
from headrace.quant.base import (
    Kind,
    LinearShape,
    Part,
    Targets,
    cut_target,
    plain,
    when_filled,
)


class VocabEmbedding:
    """ids int64 [tokens] -> [tokens, hidden], equal on all ranks."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        build: Build,
        name: str,
        kind: Kind = "embedding",
    ) -> None:
        rows = even(vocab_size, build.shard)
        self.rows, self.columns = rows, whole(hidden_size)
        self.shape = LinearShape((Part("", rows),), self.columns)
        self.group = build.group
        self.dtype = build.dtype
        self.first = rows.local * build.shard.rank  # of the vocabulary
        self.method = build.method(name, kind=kind)
        self.weights = self.method.create_weights(self.shape, build.dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        hidden = ops.embedding_packed(ids, self.packed, self.dtype, self.first)
        return self.group.all_reduce(hidden)

    def logits(self, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """hidden [n, hidden], bias [rows.local] -> fp32 [n, rows.local]."""
        return ops.logits_packed(hidden, self.packed, bias)

    @property
    def packed(self) -> PackedWeight:
        found: PackedWeight = self.weights["packed"]
        return found

    def targets(self, prefix: str) -> Targets:
        targets = self.method.targets(self.shape, self.weights, prefix)
        return when_filled(targets, lambda: self.method.process_after_loading(self.weights))


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
        self.table = tied or VocabEmbedding(vocab_size, hidden_size, build, "lm_head", "head")
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
