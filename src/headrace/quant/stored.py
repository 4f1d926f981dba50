"""Matrices that a checkpoint brings quantized, from its tensors to packed weights.

A `Storage` says which tensors hold a matrix and reads them; everything else is the same for all
formats and stands here: this rank's window of each tensor, the exact cut, parts stacked in one
matrix, packing. What a kernel multiplies is packed with the checkpoint's integers and scales;
what none does is widened to floats, which is logged once for each storage.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import Cut
from headrace.ops.packed import PackedWeight, Quantized
from headrace.quant.base import FLOATS, LinearShape, Part, Targets, Weights, WeightTarget
from headrace.quant.local import Local, Window, joined, local_part, window_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Axis:
    """Dimension `dim` of a tensor runs along rows or columns of the matrix, `per` to an element."""

    dim: int
    per: int = 1


@dataclass(frozen=True)
class Stored:
    """One tensor of a stored matrix, where it runs along `rows` and `columns` of it.

    Of several `shapes` the first is the usual one, none is a vector of any length; an axis is that
    of shapes long enough for it. `wrong` says what is wrong with the values, "" for nothing. What
    is `unused` may be missing.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    rows: Axis | None = None
    columns: Axis | None = None
    wrong: Callable[[Tensor], str] | None = None
    unused: bool = False


class Storage(Protocol):
    """How a checkpoint stores matrices. Equal storages store them alike.

    `marker`: a tensor that every matrix stored so has. `align`: rows and columns that cannot be
    read apart.
    """

    @property
    def name(self) -> str: ...

    @property
    def marker(self) -> str: ...

    @property
    def align(self) -> tuple[int, int]: ...

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        """By suffix, for a matrix [rows, columns]; raises ValueError if there is none."""
        ...

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Local:
        """The matrix in `window`, or its values as floats if kernels know no such format.

        `tensors`: what of each lies in the window. Raises ValueError for values that cannot be.
        """
        ...


@dataclass(frozen=True)
class StoredWeights:
    """The `QuantMethod` of a `Storage`.

    `wide`: what floats are rounded to when it is widened. Without `reorders` the packed matrix
    takes x as it is, whoever multiplies.
    """

    storage: Storage
    wide: torch.dtype
    reorders: bool = True

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        parts = [_Reader(self.storage, part, shape.columns) for part in shape.parts]
        return {"parts": parts, "dtype": dtype}

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        found: Targets = {}
        for reader in weights["parts"]:
            found |= reader.targets(prefix)
        return found

    def stacked(self, shape: LinearShape, single: Targets, prefix: str, name: str) -> Targets:
        rows = sum(part.rows.full for part in shape.parts)
        found: Targets = {}
        for suffix, stored in self.storage.tensors(rows, shape.columns.full).items():
            names = [f"{prefix}{part.name}.{suffix}" for part in shape.parts]
            members = {name: single[name] for name in names}
            per = stored.rows.per if stored.rows else 1
            sizes = [-(-part.rows.full // per) for part in shape.parts]
            found[f"{prefix}{name}.{suffix}"] = _pour(members, stored, sizes)
        return found

    def process_after_loading(self, weights: Weights) -> None:
        matrix, order = joined([part.read() for part in weights["parts"]], self.reorders)
        weights["packed"] = self._pack(matrix, weights)
        if order is not None:
            weights["order"] = order
        weights["parts"] = []

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_packed(_ordered(x, weights), weights["packed"], bias)

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        return ops.gated_packed(_ordered(x, weights), weights["packed"], activation, bias)

    def _pack(self, matrix: Quantized | Tensor, weights: Weights) -> PackedWeight:
        if isinstance(matrix, Tensor):
            _tell(self.storage.name, self.wide)
            dtype: torch.dtype = weights["dtype"]
            return ops.pack(matrix.to(self.wide).to(ops.stored_dtype(self.wide, dtype)))
        try:
            return ops.pack_quantized(
                matrix.values, matrix.scales, matrix.format, matrix.group, matrix.offsets
            )
        except ValueError as error:
            names = ", ".join(part.name for part in weights["parts"])
            raise LoadError(f"the quantized weights of {names} are wrong: {error}") from error


def _ordered(x: Tensor, weights: Weights) -> Tensor:
    return ops.columns(x, weights["order"]) if "order" in weights else x


@cache
def _tell(storage: str, wide: torch.dtype) -> None:
    logger.warning(
        "No kernel multiplies weights stored as %s (or cut this way): they are widened to %s",
        storage,
        str(wide).removeprefix("torch."),
    )


@dataclass
class _Reader:
    """One part while its tensors come in: of each, what this rank's window needs."""

    storage: Storage
    part: Part
    columns: Cut
    prefix: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.prefix}{self.part.name}"

    def targets(self, prefix: str) -> Targets:
        self.prefix = prefix
        shape = self.part.rows.full, self.columns.full
        try:
            stored = self.storage.tensors(*shape)
        except ValueError as error:
            raise LoadError(
                f"{self.name} [{shape[0]}, {shape[1]}] cannot be stored as {self.storage.name}: "
                f"{error}"
            ) from error
        return {
            f"{self.name}.{suffix}": WeightTarget(
                shape=one.shapes[0] if one.shapes else (1,),
                other_shapes=one.shapes[1:],
                any_length=not one.shapes,
                copy=self._taker(suffix, one),
                dtypes=one.dtypes,
                optional=one.unused,
            )
            for suffix, one in stored.items()
        }

    def read(self) -> Local:
        window = self._window()
        try:
            matrix = self.storage.read(self.tensors, window)
        except ValueError as error:
            raise LoadError(f"the quantized weight {self.name} is wrong: {error}") from error
        self.tensors = {}
        return local_part(matrix, window, self.part.rows, self.columns)

    def _window(self) -> Window:
        rows, columns = self.storage.align
        return Window(window_of(self.part.rows, rows), window_of(self.columns, columns))

    def _taker(self, suffix: str, stored: Stored) -> Callable[[Tensor], None]:
        def take(source: Tensor) -> None:
            wrong = stored.wrong(source) if stored.wrong else ""
            if wrong:
                raise LoadError(f"tensor {self.name}.{suffix} {wrong}")
            if stored.unused:
                return
            window = self._window()
            source = _within(source, stored.rows, window.rows, self.part.rows.full)
            source = _within(source, stored.columns, window.columns, self.columns.full)
            self.tensors[suffix] = source.clone()

        return take


def _within(source: Tensor, axis: Axis | None, window: tuple[int, int], full: int) -> Tensor:
    """What lies in the window along `axis`; all of a tensor that does not run along it."""
    if axis is None or source.dim() <= axis.dim or source.shape[axis.dim] * axis.per < full:
        return source
    first, last = window[0] // axis.per, -(-window[1] // axis.per)
    return source.narrow(axis.dim, first, last - first)


def _pour(members: Targets, stored: Stored, sizes: list[int]) -> WeightTarget:
    """One target for a tensor of all parts: cut along its rows into `sizes`, or given to each."""
    targets, axis = tuple(members.values()), stored.rows

    def copy(source: Tensor) -> None:
        pieces = [source] * len(targets)
        if axis is not None and source.dim() > axis.dim and source.shape[axis.dim] > 1:
            if sum(sizes) != source.shape[axis.dim]:
                raise LoadError(f"the parts {', '.join(members)} of a stacked tensor share a scale")
            pieces = list(torch.split(source, sizes, dim=axis.dim))
        for target, piece in zip(targets, pieces, strict=True):
            target.copy(piece)

    return WeightTarget(
        shape=stored.shapes[0] if stored.shapes else (1,),
        other_shapes=stored.shapes[1:],
        any_length=not stored.shapes,
        copy=copy,
        covers=tuple(members),
        dtypes=stored.dtypes,
        optional=stored.unused,
    )


@dataclass(frozen=True)
class Renamed:
    """The same storage under other suffixes: (its own, the checkpoint's)."""

    storage: Storage
    suffixes: tuple[tuple[str, str], ...]

    @property
    def name(self) -> str:
        return self.storage.name

    @property
    def marker(self) -> str:
        return dict(self.suffixes).get(self.storage.marker, self.storage.marker)

    @property
    def align(self) -> tuple[int, int]:
        return self.storage.align

    def tensors(self, rows: int, columns: int) -> dict[str, Stored]:
        names = dict(self.suffixes)
        own = self.storage.tensors(rows, columns)
        return {names.get(suffix, suffix): stored for suffix, stored in own.items()}

    def read(self, tensors: Mapping[str, Tensor], window: Window) -> Local:
        names = {theirs: own for own, theirs in self.suffixes}
        own = {names.get(suffix, suffix): tensor for suffix, tensor in tensors.items()}
        return self.storage.read(own, window)


def wrong_scale(scale: Tensor) -> str:
    """What is wrong with scales, "" for nothing: each must be a positive number."""
    if not scale.numel():
        return ""
    values = scale.float()
    if not bool(torch.isfinite(values).all()):
        return "holds a scale that is no finite number"
    return "holds a scale that is not positive" if float(values.min()) <= 0 else ""
