"""Which implementation serves each operator, and what depends on that.

The first one in a table that has the operator does. Knows no operator but by its name.
"""

from types import ModuleType
from typing import Any

import torch

from headrace.ops import cpu, ref
from headrace.ops.packed import FORMATS, PackedWeight

# Best first; `ref` has every operator.
_IMPLEMENTATIONS: dict[str, ModuleType] = {"cpu": cpu, "ref": ref}
_serving: dict[str, str] = {}


def implementations() -> dict[str, str]:
    """Operator name -> name of the implementation that serves it."""
    return dict(_serving)


def packing() -> str:
    """Names the layout that `pack` makes; weights packed under one name fit no other."""
    return f"{_serving['pack']}-{cpu.library.ABI if _serving['pack'] == 'cpu' else 0}"


def check_packed(weight: PackedWeight) -> None:
    """Whether memory that `pack` did not make can be used as a packed weight.

    Raises:
        ValueError: unknown format, sizes that do not fit, or scales that are no numbers.
    """
    if weight.format not in FORMATS or min(weight.out_size, weight.in_size) < 1:
        raise ValueError(f"format {weight.format!r} [{weight.out_size}, {weight.in_size}]")
    for scales in (weight.scales, weight.offsets):
        if scales is not None and not bool(scales.isfinite().all()):
            raise ValueError("its scales are not all finite")
    if _serving["pack"] == "cpu":
        cpu.packing.check_packed(weight)


def set_threads(count: int) -> None:
    """Threads that one operator may use, the caller included."""
    torch.set_num_threads(count)
    if cpu.LIBRARY is not None:
        cpu.library.set_threads(count)


def best(operator: str) -> Any:
    for name, module in _IMPLEMENTATIONS.items():
        if operator in module.__all__:
            _serving[operator] = name
            return getattr(module, operator)
    raise LookupError(f"no implementation of operator {operator}")
