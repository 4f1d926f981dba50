"""Chooses the next token of each row from its logits: the row tables and `ops.sample` together.

Knows no model, plan or page. Invariant: a row's token depends on its own logits, tokens and
parameters only, bit by bit.
"""

from collections.abc import Sequence

import numpy as np
import torch

from headrace import ops
from headrace.ops.sampling import Sampled
from headrace.runner.tables import RowTables


class Sampler:
    """Samples for rows of the tables."""

    def __init__(self, tables: RowTables, eos_token_ids: Sequence[int]) -> None:
        self.tables = tables
        self._eos = np.array(eos_token_ids, dtype=np.int32)

    def sample(self, logits: torch.Tensor, rows: np.ndarray, positions: np.ndarray) -> Sampled:
        """Tokens int64 [n] for `positions` of `rows`, from float32 logits [n, vocab].

        The second array (bool [n]) is False where a row has no finite largest logit (NaN, or
        everything masked); its token means nothing. Writes the rows' edits to `logits`.
        """
        return ops.sample(logits, self.tables.sampling, rows, positions, self._eos)
