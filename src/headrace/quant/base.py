"""The protocol of quantization methods, the method that does not quantize, and weight targets.

A linear layer describes its matrix and its cut (`LinearShape`); a method makes the local tensors,
says which checkpoint tensors fill them (`WeightTarget`), and multiplies. Does not know layers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.dist.topology import Cut, Span

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class WeightTarget:
    """Where one checkpoint tensor goes.

    `shape`: of the whole checkpoint tensor. `copy`: puts this rank's part of it in place.
    `covers`: names it stands for, when it is several checkpoint tensors stacked into one.
    """

    shape: tuple[int, ...]
    copy: Callable[[Tensor], None]
    covers: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = FLOATS


Targets = dict[str, WeightTarget]
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
    """One way to store the matrix of a linear layer. Stateless: tensors live in the layer."""

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        """Uninitialized local tensors by name; methods may keep packed ones beside them."""
        ...

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        """Checkpoint names that start with `prefix`, and how each fills `weights`."""
        ...

    def process_after_loading(self, weights: Weights) -> None:
        """Repack `weights` once all targets are filled."""
        ...

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [tokens, in] -> [tokens, out]."""
        ...

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        """x [tokens, in] -> act(gate) * up [tokens, out / 2], where `apply` gives gate | up."""
        ...


class Unquantized:
    """The matrix as it is, in the model's dtype."""

    def create_weights(self, shape: LinearShape, dtype: torch.dtype) -> Weights:
        return {"weight": torch.empty(shape.local_rows, shape.columns.local, dtype=dtype)}

    def targets(self, shape: LinearShape, weights: Weights, prefix: str) -> Targets:
        return part_targets(weights["weight"], shape, prefix, "weight", shape.columns)

    def process_after_loading(self, weights: Weights) -> None:
        weights["packed"] = ops.pack(weights["weight"])
        weights["weight"] = placeholder(weights["weight"])

    def apply(self, weights: Weights, x: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_packed(x, weights["packed"], bias)

    def apply_gated(
        self, weights: Weights, x: Tensor, bias: Tensor | None, activation: ops.Activation
    ) -> Tensor:
        return ops.gated_packed(x, weights["packed"], activation, bias)


def quant_method(hf: Mapping[str, Any]) -> QuantMethod:
    """The method that a config.json asks for."""
    config = hf.get("quantization_config")
    if config:
        name = config.get("quant_method") if isinstance(config, dict) else config
        raise LoadError(
            f"the checkpoint is quantized (quantization_config.quant_method={name!r}), "
            "which is not supported; use the unquantized checkpoint",
            field="quantization_config",
        )
    return Unquantized()


def placeholder(tensor: Tensor) -> Tensor:
    """Stands for a tensor that was packed: has its shape, holds no memory, cannot be filled."""
    return torch.empty_like(tensor, device="meta")


def part_targets(
    tensor: Tensor, shape: LinearShape, prefix: str, suffix: str, columns: Cut | None
) -> Targets:
    """Targets of `tensor`, the stacked rows of all parts; a vector if `columns` is None."""
    pieces = torch.split(tensor, [part.rows.local for part in shape.parts])
    return {
        f"{prefix}{part.name}.{suffix}": cut_target(piece, part.rows, columns)
        for part, piece in zip(shape.parts, pieces, strict=True)
    }


def cut_target(tensor: Tensor, rows: Cut, columns: Cut | None = None) -> WeightTarget:
    """Fill `tensor` [rows.local, columns.local] (or [rows.local]) from the whole tensor."""

    def copy(source: Tensor) -> None:
        if tensor.is_meta:
            raise LoadError(
                "these weights are packed already: build the model again to load others"
            )
        if rows.padded or (columns is not None and columns.padded):
            tensor.zero_()
        for span in rows.spans:
            _copy_rows(_narrow(tensor, 0, span), source.narrow(0, span.source, span.count), columns)

    shape = (rows.full,) if columns is None else (rows.full, columns.full)
    return WeightTarget(shape=shape, copy=copy)


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
