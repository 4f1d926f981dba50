"""A model whose logits are a hash of the prefix it reads back from its paged cache.

Each token writes its id and position to its slot; a hidden state digests what the page table shows
up to the token's position. A wrong slot, page, position or row changes the logits.
"""

import zlib
from collections.abc import Sequence

import numpy as np
import torch

from headrace.core.plan import StateSpec
from headrace.layers.batch import ForwardBatch


class PrefixModel:
    """Two layers that each keep (id, position) in keys and the negative of both in values."""

    def __init__(self, vocab: int = 50) -> None:
        self.vocab = vocab
        self.broken: set[int] = set()
        self.batches = 0

    def state_specs(self) -> list[StateSpec]:
        return [StateSpec(kv_heads=1, head_dim=2)] * 2

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        self.batches += 1
        if self.vocab in batch.ids:
            raise RuntimeError("the device broke")
        stored = torch.stack([batch.ids, batch.positions], dim=-1).float()
        for cache in batch.caches:
            cache.keys.view(-1, 2)[batch.meta.slots] = stored
            cache.values.view(-1, 2)[batch.meta.slots] = -stored
        hidden = torch.zeros(len(batch.ids), 1, dtype=torch.float64)
        bounds = batch.meta.query_start.tolist()
        for chunk, row in enumerate(batch.meta.rows.tolist()):
            context = int(batch.meta.context[chunk])
            prefix = self._read(batch, row, context)
            first = bounds[chunk]
            count = bounds[chunk + 1] - first
            for index in range(count):
                hidden[first + index] = digest(prefix[: context - count + index + 1])
        return hidden

    def _read(self, batch: ForwardBatch, row: int, context: int) -> list[int]:
        """Token ids of a row as both layers show them."""
        size = batch.meta.page_size
        pages = batch.meta.page_table[row, : -(-context // size)].long()
        tensors = [tensor for cache in batch.caches for tensor in cache.tensors()]
        seen = [tensor[pages].view(-1, 2)[:context] for tensor in tensors]
        assert torch.equal(seen[0][:, 1], torch.arange(context).float()), "wrong position"
        assert all(torch.equal(seen[0].abs(), other.abs()) for other in seen), "layers differ"
        return seen[0][:, 0].int().tolist()

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([prefix_logits(int(value), self.vocab) for value in hidden[:, 0]])
        for index, value in enumerate(hidden[:, 0].tolist()):
            if int(value) in self.broken:
                logits[index, 1] = torch.nan
        return logits


def digest(prefix: Sequence[int]) -> int:
    return zlib.crc32(np.asarray(prefix, dtype=np.int32).tobytes())


def prefix_logits(value: int, vocab: int) -> torch.Tensor:
    """Float32 [vocab] made from a digest."""
    return torch.from_numpy(np.random.default_rng(value).normal(size=vocab).astype(np.float32)) * 3
