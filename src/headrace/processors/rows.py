"""The device's half of logit processors: runs each on its row of logits.

Invariant: a processor sees one row's logits, prompt and output, nothing of the batch.
"""

from typing import Protocol

import numpy as np
import torch

from headrace.core.plan import NewRow, ProcessedRows
from headrace.processors import LogitProcessor
from headrace.processors.registry import Registry


class Tables(Protocol):
    """Of the runner's row tables: who is in a row, and its tokens int32 [rows, length]."""

    tokens: np.ndarray

    def spec(self, row: int) -> NewRow: ...


class ProcessedLogits:
    """Picks up `ProcessedRows` of a plan. Keeps a row's processor as long as its request."""

    extra = ProcessedRows

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._made: dict[int, tuple[NewRow, LogitProcessor]] = {}

    def edit(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        extra: ProcessedRows,
        tables: Tables,
    ) -> None:
        """Change float32 `logits` [n, vocab] in place; row i is for `positions[i]` of `rows[i]`.

        Raises what a processor raises.
        """
        asking = set(extra.rows)
        values = logits.numpy()
        for row, position, line in zip(rows.tolist(), positions.tolist(), values, strict=True):
            if row in asking:
                spec = tables.spec(row)
                tokens = tables.tokens[row, :position]
                tokens.flags.writeable = False
                self._of(row, spec)(line, *np.split(tokens, [spec.prompt_len]))

    def _of(self, row: int, spec: NewRow) -> LogitProcessor:
        known = self._made.get(row)
        if known is None or known[0] is not spec:
            known = self._made[row] = (spec, self._registry.make(spec.sampling))
        return known[1]
