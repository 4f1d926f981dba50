"""This rank's part of a quantized matrix, exactly: no number changes but where that is said.

A group of inputs shares a scale, so a cut may fall inside a group. Then groups get narrower, which
repeats scales; where that leaves no group that kernels know, the matrix becomes floats. Knows no
checkpoint format.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headrace.dist.topology import Cut, Span
from headrace.ops.packed import FP8_BLOCK, INT4_GROUPS, TABLES, Quantized, numbers
from headrace.quant.act_order import Integers, in_runs

# What `ops.pack_quantized` takes, widest first; 0: one scale for all inputs of an output.
_NARROWER = INT4_GROUPS[::-1]
_GROUPS = {
    "int8": (0, *_NARROWER),
    "int4": _NARROWER,
    "mxfp4": _NARROWER,
    **dict.fromkeys(TABLES, _NARROWER),
    "fp8": (0, FP8_BLOCK),
}


Local = Quantized | Integers | Tensor


@dataclass(frozen=True)
class Window:
    """Rows and columns of a matrix, from the first to behind the last."""

    rows: tuple[int, int]
    columns: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]


def window_of(cut: Cut, align: int) -> tuple[int, int]:
    """The smallest aligned range that holds all that a rank needs; one step if it needs nothing."""
    low = min((span.source for span in cut.spans), default=0)
    high = max((span.source + span.count for span in cut.spans), default=1)
    return low // align * align, min(-(-high // align) * align, cut.full)


def local_part(matrix: Local, window: Window, rows: Cut, columns: Cut) -> Local:
    """[rows.local, columns.local] out of what lies in `window`; padding is zero."""
    rows, columns = _moved(rows, window.rows[0]), _moved(columns, window.columns[0])
    if isinstance(matrix, Integers):
        return matrix.cut(rows, columns)
    if isinstance(matrix, Quantized):
        found = _with_known_group(matrix, columns)
        if found is not None:
            return _cut_quantized(found, rows, columns)
        matrix = widened(matrix)
    return _placed(_placed(matrix, 0, rows), 1, columns)


def joined(parts: Sequence[Local], reorders: bool) -> tuple[Quantized | Tensor, Tensor | None]:
    """Parts stacked by rows, and which inputs they take, if not all in order.

    Where nobody `reorders` inputs, or parts want other orders, they become floats.
    """
    integers = [part for part in parts if isinstance(part, Integers)]
    if reorders and len(integers) == len(parts):
        found = in_runs(integers)
        if found is not None:
            return found
    plain = [part.floats() if isinstance(part, Integers) else part for part in parts]
    return _stacked(plain), None


def _stacked(parts: Sequence[Quantized | Tensor]) -> Quantized | Tensor:
    if len(parts) == 1:
        return parts[0]
    low = [part for part in parts if isinstance(part, Quantized)]
    formats = {part.format for part in low}
    if len(low) < len(parts) or len(formats) > 1 or (formats == {"fp8"} and _unlike(low)):
        floats = [widened(part) if isinstance(part, Quantized) else part.float() for part in parts]
        return torch.cat(floats)
    group = min(part.group for part in low)
    low = [_regrouped(part, group) for part in low]
    offsets = None
    if any(part.offsets is not None for part in low):
        offsets = torch.cat([_offsets(part) for part in low])
    return replace(
        low[0],
        values=torch.cat([part.values.view(torch.uint8) for part in low]).view(low[0].values.dtype),
        scales=torch.cat([part.scales for part in low]),
        offsets=offsets,
    )


def widened(matrix: Quantized) -> Tensor:
    """Its values in fp32: value * scale - offset."""
    columns = matrix.values.shape[1]
    group = matrix.group or columns
    values = numbers(matrix.format, matrix.values)
    values *= matrix.scales.repeat_interleave(group, 1)[:, :columns]
    if matrix.offsets is not None or matrix.format == "int4":
        values -= _offsets(matrix).repeat_interleave(group, 1)[:, :columns]
    return values


def _offsets(matrix: Quantized) -> Tensor:
    middle = 8 if matrix.format == "int4" else 0
    return middle * matrix.scales if matrix.offsets is None else matrix.offsets


def _unlike(parts: Sequence[Quantized]) -> bool:
    return len({part.group for part in parts}) > 1


def _with_known_group(matrix: Quantized, columns: Cut) -> Quantized | None:
    """The same with the widest group that kernels take and the cut keeps whole."""
    for group in _GROUPS[matrix.format]:
        if group == matrix.group == 0 and matrix.offsets is None:
            return matrix
        if group and (matrix.group or group) % group == 0 and _keeps_whole(columns, group):
            return _regrouped(matrix, group)
    return None


def _keeps_whole(cut: Cut, group: int) -> bool:
    """Whether every span begins and ends between groups, or ends where the matrix does."""
    return all(
        span.source % group == span.target % group == 0
        and (span.count % group == 0 or span.target + span.count == cut.local)
        for span in cut.spans
    )


def _regrouped(matrix: Quantized, group: int) -> Quantized:
    if group == matrix.group:
        return matrix
    count = -(-matrix.values.shape[1] // group)
    times = matrix.group // group if matrix.group else count

    def spread(scales: Tensor) -> Tensor:
        return scales.repeat_interleave(times, 1)[:, :count].contiguous()

    offsets = None if matrix.offsets is None else spread(matrix.offsets)
    return replace(matrix, scales=spread(matrix.scales), offsets=offsets, group=group)


def _cut_quantized(matrix: Quantized, rows: Cut, columns: Cut) -> Quantized:
    def scales(tensor: Tensor) -> Tensor:
        tensor = _placed(tensor, 0, rows)
        return _placed(tensor, 1, _in_groups(columns, matrix.group)) if matrix.group else tensor

    return replace(
        matrix,
        values=_placed(_placed(matrix.values, 0, rows), 1, columns),
        scales=scales(matrix.scales),
        offsets=None if matrix.offsets is None else scales(matrix.offsets),
    )


def _in_groups(cut: Cut, group: int) -> Cut:
    spans = tuple(
        Span(span.source // group, span.target // group, -(-span.count // group))
        for span in cut.spans
    )
    return Cut(-(-cut.full // group), -(-cut.local // group), spans)


def _moved(cut: Cut, first: int) -> Cut:
    """The same cut of what begins at `first`, with spans that follow each other in one."""
    spans: list[Span] = []
    for span in cut.spans:
        span = replace(span, source=span.source - first)
        last = spans[-1] if spans else None
        if last and (last.source + last.count, last.target + last.count) == (
            span.source,
            span.target,
        ):
            spans[-1] = replace(last, count=last.count + span.count)
        else:
            spans.append(span)
    return replace(cut, spans=tuple(spans))


def _placed(tensor: Tensor, dim: int, cut: Cut) -> Tensor:
    """The local part of one dimension."""
    if len(cut.spans) == 1 and cut.spans[0].count == cut.local:
        return tensor.narrow(dim, cut.spans[0].source, cut.local)
    shape = list(tensor.shape)
    shape[dim] = cut.local
    found = torch.zeros(shape, dtype=tensor.dtype)
    for span in cut.spans:
        source = tensor.narrow(dim, span.source, span.count)
        found.narrow(dim, span.target, span.count).copy_(source)
    return found
