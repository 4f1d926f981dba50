"""One vector from the hidden states of a prompt, however it was cut into chunks.

Sums run over tokens in their order, in fp64, so neither chunking nor the batch can change a bit.
Keeps a state for each row whose prompt is not complete. Knows no requests.
"""

import math
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
        before = self._rows.pop(chunk.row, None) if chunk.start else None
        state = self._advance(before, chunk.start, hidden)
        if chunk.start + chunk.count < prompt_len:
            self._rows[chunk.row] = state
            return ChunkResult()
        pooled = state / self._weight(prompt_len)
        # Alone, so that the batch cannot matter, and in torch's memory, whose alignment is fixed.
        scored = self.model.scores(torch.from_numpy(pooled.astype(np.float32))[None].clone())
        vector = scored[0].numpy()
        if not np.isfinite(vector).all():
            return ChunkResult(error="the model's output is not finite (NaN)")
        if self.pooling.normalize:
            vector = normalized(vector)
        return ChunkResult(pooled=vector.astype("<f4").tobytes())

    def _advance(self, before: np.ndarray | None, start: int, hidden: Tensor) -> np.ndarray:
        """What is known of a vector after the states of tokens from `start` on, fp64 [hidden]."""
        how = self.pooling.how
        if how == "lasttoken":
            return hidden[-1].double().numpy()
        if how == "cls":
            return hidden[0].double().numpy() if before is None else before
        values = hidden.double().numpy()
        if how == "weightedmean":
            values = values * np.arange(start + 1, start + len(values) + 1)[:, None]
        whole = values if before is None else np.concatenate((before[None], values))
        joined: np.ndarray = (np.maximum if how == "max" else np.add).reduce(whole, axis=0)
        return joined

    def _weight(self, prompt_len: int) -> float:
        """What a sum over the tokens is divided by."""
        weights = {
            "mean": float(prompt_len),
            "mean_sqrt_len_tokens": math.sqrt(prompt_len),
            "weightedmean": prompt_len * (prompt_len + 1) / 2,
        }
        return weights.get(self.pooling.how, 1.0)


def normalized(vector: np.ndarray) -> np.ndarray:
    """The vector with length 1, fp32 [n]; zero stays zero."""
    wide = vector.astype(np.float64)
    length = float(np.sqrt(np.add.reduce(wide * wide)))
    return (wide / max(length, 1e-12)).astype(np.float32)
