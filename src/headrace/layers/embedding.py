"""Token embedding and output head, both cut along the vocabulary.

A head packs its matrix; the embedding that it is tied to then reads the packed one too.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import even, whole
from headrace.layers.build import Build
from headrace.ops.packed import PackedWeight
from headrace.quant.base import Targets, cut_target, placeholder


class VocabEmbedding:
    """ids int64 [tokens] -> [tokens, hidden], equal on all ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, build: Build) -> None:
        self.rows = even(vocab_size, build.shard)
        self.columns = whole(hidden_size)
        self.group = build.group
        self.weight = torch.empty(self.rows.local, hidden_size, dtype=build.dtype)
        self.packed: PackedWeight | None = None
        self.dtype = build.dtype
        self.first = self.rows.local * build.shard.rank

    def __call__(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return self._look_up(ids)
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows.local)
        hidden = self._look_up(local.masked_fill(elsewhere, 0))
        return self.group.all_reduce(hidden.masked_fill(elsewhere[:, None], 0))

    def _look_up(self, ids: Tensor) -> Tensor:
        if self.packed is not None:
            return ops.embedding_packed(ids, self.packed, self.dtype)
        return ops.embedding(ids, self.weight)

    def pack(self) -> None:
        """Keep the matrix in the form that `logits` multiplies with, and in no other."""
        self.packed = ops.pack(self.weight)
        self.weight = placeholder(self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, hidden] -> fp32 [n, rows.local]."""
        if self.packed is not None:
            return ops.logits_packed(hidden, self.packed)
        return ops.logits(hidden, self.weight)

    def targets(self, prefix: str) -> Targets:
        return {f"{prefix}.weight": cut_target(self.weight, self.rows, self.columns)}


class LMHead:
    """hidden [n, hidden] -> logits fp32 [n, vocab], equal on all ranks.

    `tied`: the embedding whose weight is the head's.
    """

    def __init__(
        self, vocab_size: int, hidden_size: int, build: Build, tied: VocabEmbedding | None = None
    ) -> None:
        self.table = tied or VocabEmbedding(vocab_size, hidden_size, build)
        self.tied = tied is not None
        self.vocab_size = vocab_size

    def __call__(self, hidden: Tensor) -> Tensor:
        local = self.table.logits(hidden)
        return self.table.group.all_gather(local)[:, : self.vocab_size]

    def process_after_loading(self) -> None:
        self.table.pack()

    def targets(self, prefix: str) -> Targets:
        return {} if self.tied else self.table.targets(prefix)
