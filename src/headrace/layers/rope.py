"""Cosines and sines for the tokens of a forward pass, once for all layers.

Most scalings depend on the position alone; their rows come from a table that grows in fixed blocks,
so a row is the same number for ever. The "dynamic" and "longrope" scalings depend on the length of
the sequence. transformers takes the longest sequence of the batch; here each token has its own
length: its prompt's for prompt tokens, position + 1 for tokens after the prompt. That equals
transformers on a batch of one (whole prompt, then token by token) and depends neither on
the batch nor on chunking nor on retraction. It does depend on the prompt's length, so prompts on
different sides of `length_boundary` must not share cached prefixes.
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.layers.batch import ForwardBatch
from headrace.layers.rope_scaling import RopeSpec, attention_factor, inverse_frequencies

_BLOCK = 2048  # positions computed together


class Rope:
    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.scale = attention_factor(spec)
        self.table = torch.empty(0, spec.dim)

    def prepare(self, batch: ForwardBatch) -> Tensor:
        """fp32 [tokens, rotary_dim]: cosines | sines of each token's position."""
        if self.spec.by_length:
            frequencies = inverse_frequencies(self.spec, batch.lengths())
            return ops.rotary_table(batch.positions, frequencies, self.scale)
        needed = int(batch.positions.max()) + 1
        if needed > len(self.table):
            self._grow(needed)
        return self.table[batch.positions]

    def _grow(self, needed: int) -> None:
        """At least double, so that long generations rarely come here."""
        frequencies = inverse_frequencies(self.spec, torch.empty(0))
        blocks = [self.table]
        target = max(needed, min(2 * len(self.table), self.spec.max_positions))
        for first in range(len(self.table), target, _BLOCK):
            positions = torch.arange(first, first + _BLOCK)
            blocks.append(ops.rotary_table(positions, frequencies, self.scale))
        self.table = torch.cat(blocks)


def length_boundary(spec: RopeSpec) -> int | None:
    """Prompts longer than this are computed with other frequencies; None if all are alike.

    Beyond it "longrope" has one set of frequencies, "dynamic" one for each length.
    """
    if not spec.by_length:
        return None
    return spec.original if spec.kind == "longrope" else spec.max_positions
