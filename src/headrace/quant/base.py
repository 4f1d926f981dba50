"""The protocol of quantization methods, matrices while they are loaded, and weight targets.

A linear layer describes its matrix and its cut (`LinearShape`); a method makes the local tensors,
says which checkpoint tensors fill them (`WeightTarget`), and multiplies. A `Quantization` knows
which method each module has. Does not know layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import Cut, Span
from headrace.ops.packed import PANEL, PackedWeight

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class WeightTarget:
    """Where one checkpoint tensor goes.

    `shape`: of the whole checkpoint tensor; `other_shapes` are as good. `copy`: puts this rank's
    part of it in place. `covers`: names it stands for, when it is several checkpoint tensors
    stacked into one. What is `optional` may be missing. `any_length`: a vector as long as it likes.
    """

    shape: tuple[int, ...]
    copy: Callable[[Tensor], None]
    covers: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS
    other_shapes: tuple[tuple[int, ...], ...] = ()
    optional: bool = False
    any_length: bool = False


Targets = dict[str, WeightTarget]
Place = Callable[[torch.dtype], Tensor]
"""Gives the local tensor that a tensor of some dtype is about to fill; targets hold no tensors, as
they live longer than what is packed."""
Weights = dict[str, Any]
"""Tensors and packed weights of one layer by name."""


@dataclass(frozen=True)
class Part:
    """One checkpoint matrix `name` [rows.full, in] among those stacked in a linear layer."""

    name: str
    rows: Cut


@dataclass(frozen=True)
class LinearShape:
    """A local matrix [sum of parts' rows.local, columns.local]."""

    parts: tuple[Part, ...]
    columns: Cut

    @property
    def local_rows(self) -> int:
        return sum(part.rows.local for part in self.parts)


class QuantMethod(Protocol):
    """One way to store the matrix of a linear layer. Stateless: tensors live in the layer.

    The packed matrix is `weights["packed"]`, for those who multiply without `apply`.
    """

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        """Uninitialized local tensors by name; methods may keep packed ones beside them."""
        ...

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        """Checkpoint names that start with `prefix`, and how each fills `weights`."""
        ...

    def stacked(self, shape: LinearShape, single: Targets, prefix: str, name: str) -> Targets:
        """The tensors of matrix `name`, all parts stacked; `single`: those of `targets`."""
        ...

    def process_after_loading(self, weights: Weights) -> None:
        """Repack `weights`; called as soon as all targets are filled."""
        ...

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        ...

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        """x [tokens, in] -> act(gate) * up [tokens, out / 2], where `apply` gives gate | up."""
        ...


Kind = Literal["linear", "expert", "router", "embedding", "head"]


class Quantization(Protocol):
    """Which method each module of a model has. `name` tells quantizations apart."""

    @property
    def name(self) -> str: ...

    def method(self, modules: Sequence[str], kind: Kind, stacked: str = "") -> QuantMethod:
        """For the parts of one linear layer, by the names that models give them.

        `stacked`: what a checkpoint that stacked them calls the whole.
        """
        ...

    def renamed(self, rename: Callable[[str], str]) -> "Quantization":
        """The same for a model whose checkpoints have other names, which `rename` turns."""
        ...


class Matrix:
    """A matrix [rows, columns] while it is loaded.

    It takes memory from its first values until it is packed. What is multiplied in `dtype` may be
    kept in a narrower one, if the checkpoint has it so.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (rows, columns), dtype
        self._values: Tensor | None = None
        self._filling: PackedWeight | None = None
        self._packed = self._borrowed = False

    def open(self, source: torch.dtype) -> Tensor:
        """The values, to be filled from a tensor of dtype `source`."""
        self._check_open()
        dtype = ops.stored_dtype(source, self.dtype)
        if self._filling is not None:
            rows = torch.arange(self.shape[0])
            self._values = ops.embedding_packed(rows, self._filling, self.dtype)
            self._filling = None
        if self._values is None:
            self._values = torch.empty(self.shape, dtype=dtype)
        elif self._values.dtype != dtype:  # parts of different precision
            self._values = self._values.to(self.dtype)
        return self._values

    def adopt(self, values: Tensor) -> None:
        """Take the whole matrix as it is, not copied: pack it before `values` go."""
        self._check_open()
        dtype = ops.stored_dtype(values.dtype, self.dtype)
        self._values, self._borrowed = values.to(dtype).contiguous(), True

    def fill(self, first: int, values: Tensor) -> bool:
        """Pack rows from `first` on at once, if nothing has to be known of the others; else False.

        To be packed as it is; `first` as `ops.pack_rows` says. fp32 waits: all may have been bf16.
        """
        self._check_open()
        dtype = ops.stored_dtype(values.dtype, self.dtype)
        if self._values is not None or dtype == torch.float32:
            return False
        if self._filling is None:
            self._filling = ops.open_packed(self.shape, dtype)
        if self._filling.format != str(dtype).removeprefix("torch."):
            return False
        values = values.to(dtype)
        ops.pack_rows(
            self._filling, first, values if values.stride(1) == 1 else values.contiguous()
        )
        return True

    def _check_open(self) -> None:
        if self._packed:
            raise LoadError(
                "these weights are packed already: build the model again to load others"
            )

    def pack(self, format: str = "", group: int = 0) -> PackedWeight:
        """The matrix in a format of `ops.pack`; the unpacked values go."""
        if self._filling is not None:
            filled, self._filling, self._packed = self._filling, None, True
            return filled
        assert self._values is not None
        packed = ops.pack(self._values, format, group)
        if self._borrowed and packed.data.data_ptr() == self._values.data_ptr():
            packed = replace(packed, data=packed.data.clone())
        self._values, self._packed = None, True
        return packed


def uncopied(targets: Targets, matrix: Matrix) -> Targets:
    """The same targets of a matrix that is packed when they are filled; a tensor that is all of it
    is not copied before."""
    whole = [target for target in targets.values() if target.shape == matrix.shape]
    if len(targets) != 1 or not whole:
        return targets
    return {name: replace(target, copy=matrix.adopt) for name, target in targets.items()}


def packed_at_once(targets: Targets, matrix: Matrix, shape: LinearShape) -> Targets:
    """The same targets of a matrix that is packed as it is: parts of whole panels go straight in.

    `targets`: one for each part, in order.
    """
    columns = _runs(shape.columns)
    if len(columns) != 1 or shape.columns.padded:
        return targets
    found, offset = {}, 0
    for (name, target), part in zip(targets.items(), shape.parts, strict=True):
        runs = [replace(run, target=run.target + offset) for run in _runs(part.rows)]
        offset += part.rows.local
        ends = [run.target + run.count for run in runs]
        whole = all(end % PANEL == 0 or end == matrix.shape[0] for end in ends)
        if whole and not part.rows.padded and all(run.target % PANEL == 0 for run in runs):
            target = replace(target, copy=_filling(matrix, runs, columns[0], target.copy))
        found[name] = target
    return found


def _filling(
    matrix: Matrix, runs: list[Span], columns: Span, otherwise: Callable[[Tensor], None]
) -> Callable[[Tensor], None]:
    def copy(source: Tensor) -> None:
        source_columns = source.narrow(1, columns.source, columns.count)
        pieces = ((run.target, source_columns.narrow(0, run.source, run.count)) for run in runs)
        if not all(matrix.fill(first, piece) for first, piece in pieces):
            otherwise(source)

    return copy


def _runs(cut: Cut) -> list[Span]:
    """The spans of a cut, those that continue each other as one."""
    runs: list[Span] = []
    for span in cut.spans:
        last = runs[-1] if runs else Span(-1, -1, 0)
        if (span.source - last.source, span.target - last.target) == (last.count, last.count):
            runs[-1] = replace(last, count=last.count + span.count)
        else:
            runs.append(span)
    return runs


def part_targets(
    stack: Place, shape: LinearShape, prefix: str, suffix: str, columns: Cut | None
) -> Targets:
    """Targets of the stacked rows of all parts; a vector if `columns` is None."""
    sizes = [part.rows.local for part in shape.parts]

    def piece(index: int) -> Place:
        return lambda source: torch.split(stack(source), sizes)[index]

    return {
        f"{prefix}{part.name}.{suffix}": cut_target(piece(index), part.rows, columns)
        for index, part in enumerate(shape.parts)
    }


def cut_target(place: Place, rows: Cut, columns: Cut | None = None) -> WeightTarget:
    """Fill a place [rows.local, columns.local] (or [rows.local]) from the whole tensor."""

    def copy(source: Tensor) -> None:
        tensor = place(source.dtype)
        if rows.padded or (columns is not None and columns.padded):
            tensor.zero_()
        for span in rows.spans:
            _copy_rows(_narrow(tensor, 0, span), source.narrow(0, span.source, span.count), columns)

    shape = (rows.full,) if columns is None else (rows.full, columns.full)
    return WeightTarget(shape=shape, copy=copy)


def when_filled(targets: Targets, then: Callable[[], None]) -> Targets:
    """The same targets; `then` runs as soon as all of them are filled."""
    left = {name for name, target in targets.items() if not target.optional}

    def counted(name: str, target: WeightTarget) -> WeightTarget:
        def copy(source: Tensor) -> None:
            target.copy(source)
            left.discard(name)
            if not left and not target.optional:
                then()

        return replace(target, copy=copy)

    return {name: counted(name, target) for name, target in targets.items()}


def merged(parts: Sequence[Targets]) -> Targets:
    """Targets of the same names that each checkpoint tensor fills all at once."""

    def one(name: str) -> WeightTarget:
        members = [targets[name] for targets in parts]

        def copy(source: Tensor) -> None:
            for member in members:
                member.copy(source)

        return replace(members[0], copy=copy)

    return {name: one(name) for name in parts[0]} if len(parts) > 1 else parts[0]


def stacked_target(targets: Targets) -> WeightTarget:
    """One target for the tensors of `targets` stacked along the first dimension, in order."""
    members = tuple(targets.values())
    rows = [target.shape[0] for target in members]

    def copy(source: Tensor) -> None:
        for target, piece in zip(members, torch.split(source, rows), strict=True):
            target.copy(piece)

    shape = (sum(rows), *members[0].shape[1:])
    return WeightTarget(shape=shape, copy=copy, covers=tuple(targets))


def _copy_rows(target: Tensor, source: Tensor, columns: Cut | None) -> None:
    if columns is None:
        target.copy_(source)
        return
    for span in columns.spans:
        _narrow(target, 1, span).copy_(source.narrow(1, span.source, span.count))


def _narrow(tensor: Tensor, dim: int, span: Span) -> Tensor:
    return tensor.narrow(dim, span.target, span.count)


def plain(tensor: Tensor) -> Place:
    """The place of a tensor that stays as it is."""
    return lambda source: tensor
