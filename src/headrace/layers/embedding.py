"""Token embedding and output head, both cut along the vocabulary."""

import torch
from torch import Tensor

from headrace import ops
from headrace.dist.topology import even, whole
from headrace.layers.build import Build
from headrace.quant.base import Targets, cut_target


class VocabEmbedding:
    """ids int64 [tokens] -> [tokens, hidden], equal on all ranks."""

    def __init__(self, vocab_size: int, hidden_size: int, build: Build) -> None:
        self.rows = even(vocab_size, build.shard)
        self.columns = whole(hidden_size)
        self.group = build.group
        self.weight = torch.empty(self.rows.local, hidden_size, dtype=build.dtype)
        self.first = self.rows.local * build.shard.rank

    def __call__(self, ids: Tensor) -> Tensor:
        if self.group.size == 1:
            return ops.embedding(ids, self.weight)
        local = ids - self.first
        elsewhere = (local < 0) | (local >= self.rows.local)
        hidden = ops.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self.group.all_reduce(hidden.masked_fill(elsewhere[:, None], 0))

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
        local = ops.logits(hidden, self.table.weight)
        return self.table.group.all_gather(local)[:, : self.vocab_size]

    def targets(self, prefix: str) -> Targets:
        return {} if self.tied else self.table.targets(prefix)
