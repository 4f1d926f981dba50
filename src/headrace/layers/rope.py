"""Cosines and sines for the tokens of a forward pass, once for all layers.

Most scalings depend on the position alone; their rows come from a table that grows in fixed blocks,
so a row is the same number for ever. The "dynamic" and "longrope" scalings depend on the length of
the sequence. transformers takes the longest sequence of the batch; here each token has its own
length: its prompt's for prompt tokens, position + 1 for tokens after the prompt. That equals
transformers on a batch of one (whole prompt, then token by token) and depends neither on
the batch nor on chunking nor on retraction. It does depend on the prompt's length, so prompts on
different sides of a boundary must not share cached prefixes (`prefix_scope`).
"""

import torch
from torch import Tensor

from headrace import ops
from headrace.layers.batch import ForwardBatch
from headrace.layers.rope_scaling import (
    TEMPERATURE,
    RopeSpec,
    attention_factor,
    inverse_frequencies,
    length_factors,
    temperatures,
)

_BLOCK = 2048  # positions computed together


class Rope:
    computed = ("table",)  # no weights, see `layers.held`

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.scale = attention_factor(spec)
        self.table = torch.empty(0, spec.dim)

    def prepare(self, batch: ForwardBatch) -> Tensor:
        """fp32 [tokens, rotary_dim]: cosines | sines of each token's position."""
        if self.spec.by_length:
            lengths = batch.lengths()
            frequencies = inverse_frequencies(self.spec, lengths)
            scale = length_factors(self.spec, lengths)
            return ops.rotary_table(
                batch.positions, frequencies, self.scale if scale is None else scale
            )
        # Through numpy: calling a torch operator on so little costs several times as much.
        positions = batch.positions.numpy()
        needed = int(positions.max()) + 1
        if needed > len(self.table):
            self._grow(needed)
        return torch.from_numpy(self.table.numpy().take(positions, axis=0))

    def _grow(self, needed: int) -> None:
        """At least double, so that long generations rarely come here."""
        blocks = [self.table]
        target = max(needed, min(2 * len(self.table), self.spec.max_positions))
        for first in range(len(self.table), target, _BLOCK):
            positions = torch.arange(first, first + _BLOCK)
            blocks.append(self._rows(positions))
        self.table = torch.cat(blocks)

    def _rows(self, positions: Tensor) -> Tensor:
        if self.spec.kind == TEMPERATURE:
            # As the cosine of a turn by nothing.
            factors = temperatures(self.spec, positions)[:, None].expand(-1, self.spec.dim // 2)
            return torch.cat((factors, torch.zeros_like(factors)), dim=1)
        frequencies = inverse_frequencies(self.spec, torch.empty(0))
        return ops.rotary_table(positions, frequencies, self.scale)


def prefix_scope(spec: RopeSpec, prompt_len: int) -> str:
    """Prompts with different scopes have other keys for the same tokens.

    Up to a boundary all are alike. Beyond it "longrope" has one set of frequencies, and "dynamic"
    one for each length.
    """
    if not spec.by_length:
        return ""
    if spec.kind == "longrope":
        return "long:" if prompt_len > spec.original else ""
    return f"length {prompt_len}:" if prompt_len > spec.max_positions else ""
