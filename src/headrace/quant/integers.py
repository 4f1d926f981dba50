"""Matrices of integers with a scale and a zero point per group of inputs, as checkpoints bring them.

A part is unpacked when its last tensor is there, cut for this rank, and laid out so that every
aligned run of inputs belongs to one group: the element stays scale * (value - zero) to the bit.
Inputs are put into another order where groups do not lie in a row (act-order). Knows no formats.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace import ops
from headrace.dist.topology import Cut
from headrace.ops.packed import INT4_GROUPS, PackedWeight

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Integers:
    """W [out, in]: `values` uint8 of `bits` bits, `scales` fp32 and `zeros` uint8 [out, groups].

    `group_of`: int64 [in], the group of each input.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor
    group_of: Tensor
    bits: int

    def cut(self, rows: Cut, columns: Cut) -> "Integers":
        """This rank's part; padding has weight zero."""
        sources = torch.zeros(columns.local, dtype=torch.int64)
        padding = torch.ones(columns.local, dtype=torch.bool)
        for span in columns.spans:
            place = slice(span.target, span.target + span.count)
            sources[place] = torch.arange(span.source, span.source + span.count)
            sources[place.stop :] = span.source + span.count - 1  # of the last group
            padding[place] = False
        values, scales, zeros = (_rows(x, rows) for x in (self.values, self.scales, self.zeros))
        group_of = self.group_of[sources]
        values = values[:, sources]
        values[:, padding] = zeros[:, group_of[padding]]
        return Integers(values, scales, zeros, group_of, self.bits)

    def reordered(self, order: Tensor, added: Tensor) -> "Integers":
        """Inputs `order`; those that are `added` have weight zero."""
        group_of, values = self.group_of[order], self.values[:, order]
        values[:, added] = self.zeros[:, group_of[added]]
        return Integers(values, self.scales, self.zeros, group_of, self.bits)

    def floats(self) -> Tensor:
        """fp32 [out, in]"""
        scales, zeros = self.scales[:, self.group_of], self.zeros[:, self.group_of]
        return (self.values.float() - zeros.float()) * scales


def pack_integers(parts: list[Integers], dtype: torch.dtype) -> tuple[PackedWeight, Tensor | None]:
    """Parts that read the same inputs, stacked; and which inputs it takes, if not all in order.

    Parts whose groups differ become floats of `dtype`: no kernel reads them at once.
    """
    first = parts[0]
    if any(not torch.equal(part.group_of, first.group_of) for part in parts):
        logger.info("matrices that share inputs have other groups: they are widened")
        return ops.pack(torch.cat([part.floats() for part in parts]).to(dtype)), None
    whole = Integers(
        torch.cat([part.values for part in parts]),
        torch.cat([part.scales for part in parts]),
        torch.cat([part.zeros for part in parts]),
        first.group_of,
        first.bits,
    )
    size, order = _run(whole.group_of), None
    if not size:
        size, order, added = arrangement(whole.group_of)
        whole = whole.reordered(order, added)
    return _packed(whole, size), order


def _packed(whole: Integers, size: int) -> PackedWeight:
    """Every run of `size` inputs is of one group."""
    runs = whole.group_of[::size]
    scales, zeros = whole.scales[:, runs], whole.zeros[:, runs].float()
    if whole.bits <= 4:
        return ops.pack_quantized(whole.values, scales, "int4", size, scales * zeros)
    values = (whole.values.short() - 128).to(torch.int8)
    return ops.pack_quantized(values, scales, "int8", size, scales * (zeros - 128))


def _run(group_of: Tensor) -> int:
    """The longest run that is always of one group, of those that kernels know; 0: none."""
    for size in sorted(INT4_GROUPS, reverse=True):
        missing = -len(group_of) % size
        runs = F.pad(group_of[None].float(), (0, missing), mode="replicate").view(-1, size)
        if bool((runs == runs[:, :1]).all()):
            return size
    return 0


def arrangement(group_of: Tensor) -> tuple[int, Tensor, Tensor]:
    """A length of runs, and which inputs to take so that every run is of one group.

    Groups come one after another; what a group lacks to whole runs is its last input again, marked
    in the third result. The length is the one with the least memory for 4 bits.
    """
    counts = torch.bincount(group_of)
    counts = counts[counts > 0]
    padded = {size: (counts + size - 1) // size * size for size in INT4_GROUPS}
    size = min(INT4_GROUPS, key=lambda size: int(padded[size].sum()) * (0.5 + 4 / size))
    ordered = torch.argsort(group_of, stable=True)
    ends = counts.cumsum(0)
    order, added = [], []
    for end, count, room in zip(ends.tolist(), counts.tolist(), padded[size].tolist(), strict=True):
        order += [ordered[end - count : end], ordered[end - 1 : end].expand(room - count)]
        added += [torch.zeros(count, dtype=torch.bool), torch.ones(room - count, dtype=torch.bool)]
    return size, torch.cat(order), torch.cat(added)


def _rows(tensor: Tensor, cut: Cut) -> Tensor:
    found = tensor.new_zeros(cut.local, *tensor.shape[1:])
    for span in cut.spans:
        found.narrow(0, span.target, span.count).copy_(tensor.narrow(0, span.source, span.count))
    return found
