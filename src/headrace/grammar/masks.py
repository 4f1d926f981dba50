"""The device's half of structured output: applies the masks of a plan to logits."""

import numpy as np
import torch

from headrace import ops
from headrace.core.plan import TokenMasks


class MaskedLogits:
    """Picks up `TokenMasks` of a plan. Positions without a mask are not touched."""

    extra = TokenMasks

    def edit(
        self,
        logits: torch.Tensor,
        rows: np.ndarray,
        positions: np.ndarray,
        extra: TokenMasks,
        tables: object = None,
    ) -> None:
        """Set forbidden tokens of `logits` (float32 [n, vocab]) to -inf, in place.

        `logits[i]` is for the token at `positions[i]` of row `rows[i]`. Tables are not needed.
        """
        known = {key: i for i, key in enumerate(zip(extra.rows, extra.positions, strict=True))}
        places = zip(rows.tolist(), positions.tolist(), strict=True)
        pairs = [(i, known[key]) for i, key in enumerate(places) if key in known]
        if not pairs:
            return
        which = torch.tensor(pairs, dtype=torch.int64)
        words = np.frombuffer(extra.words, dtype="<i4").reshape(len(extra.rows), -1)
        masks = torch.from_numpy(words[which[:, 1].numpy()])
        ops.mask_logits(logits, which[:, 0].contiguous(), masks)
