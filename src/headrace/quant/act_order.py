"""Matrices of integers in groups of inputs that do not lie in a row (act-order).

Inputs are put into an order in which every aligned run belongs to one group, so that kernels take
them: an element stays scale * (value - zero) to the bit. Knows no checkpoint format.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from headrace.dist.topology import Cut
from headrace.ops.packed import INT4_GROUPS, Quantized


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

    def quantized(self, size: int) -> Quantized:
        """As kernels take it, where every run of `size` inputs is of one group."""
        runs = self.group_of[::size]
        return in_groups(self.values, self.scales[:, runs], self.zeros[:, runs], self.bits, size)

    def floats(self) -> Tensor:
        """fp32 [out, in]"""
        scales, zeros = self.scales[:, self.group_of], self.zeros[:, self.group_of]
        return (self.values.float() - zeros.float()) * scales


def in_groups(values: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int) -> Quantized:
    """The same integers; `group` inputs that follow each other share a scale, 0: all."""
    zeros = zeros.float()
    if bits <= 4:
        return Quantized("int4", values, scales, group, scales * zeros)
    offsets = scales * (zeros - 128)
    signed = (values ^ 128).view(torch.int8)
    return Quantized("int8", signed, scales, group, offsets if bool(offsets.any()) else None)


def in_runs(parts: Sequence[Integers]) -> tuple[Quantized, Tensor | None] | None:
    """Parts that read the same inputs, stacked; and which inputs it takes, if not all in order.

    None where their groups differ: no order of inputs suits all.
    """
    first = parts[0]
    if any(not torch.equal(part.group_of, first.group_of) for part in parts):
        return None
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
    return whole.quantized(size), order


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
