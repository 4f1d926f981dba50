"""One vector from the hidden states of a prompt, however it was cut into chunks.

Sums run over tokens in their order, in fp64, so neither chunking nor the batch can change a bit.
Keeps a state for each row whose prompt is not complete. Knows no requests.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from headrace.core.plan import Chunk, ChunkResult
from headrace.core.pooling import Pooling


class PooledModel(Protocol):
    """What pooling asks of an architecture."""

    def scores(self, pooled: Tensor) -> Tensor:
        """fp32 [n, hidden] -> fp32 [n, labels], or itself for an embedding."""
        ...


class Pooler:
    """The pooling of one model."""

    def __init__(self, pooling: Pooling, model: PooledModel) -> None:
        self.pooling = pooling
        self.model = model
        self._rows: dict[int, np.ndarray] = {}

    def take(self, chunk: Chunk, prompt_len: int, hidden: Tensor) -> ChunkResult:
        """The result of a chunk with hidden states [count, hidden]."""
        state = self._advance(chunk, hidden)
        if chunk.start + chunk.count < prompt_len:
            return ChunkResult()
        self._rows.pop(chunk.row, None)
        if self.pooling.how == "mean":
            state = state / prompt_len
        # Alone, so that the batch cannot matter, and in torch's memory, whose alignment is fixed.
        scored = self.model.scores(torch.from_numpy(state.astype(np.float32))[None].clone())
        vector = scored[0].numpy()
        if not np.isfinite(vector).all():
            return ChunkResult(error="the model's output is not finite (NaN)")
        if self.pooling.normalize:
            vector = normalized(vector)
        return ChunkResult(pooled=vector.astype("<f4").tobytes())

    def _advance(self, chunk: Chunk, hidden: Tensor) -> np.ndarray:
        """What is known of the row's vector after this chunk, fp64 [hidden]."""
        how = self.pooling.how
        if how == "last":
            return hidden[-1].double().numpy()
        before = None if chunk.start == 0 else self._rows[chunk.row]
        if how == "cls":
            state = hidden[0].double().numpy() if before is None else before
        else:
            values = hidden.double().numpy()
            first = np.zeros(values.shape[1]) if before is None else before
            state = np.add.reduce(np.concatenate((first[None], values)), axis=0)
        self._rows[chunk.row] = state
        return state


def normalized(vector: np.ndarray) -> np.ndarray:
    """The vector with length 1, fp32 [n]; zero stays zero."""
    wide = vector.astype(np.float64)
    length = float(np.sqrt(np.add.reduce(wide * wide)))
    return (wide / max(length, 1e-12)).astype(np.float32)
