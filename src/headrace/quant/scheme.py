"""What readers of quantization configurations share: the form of their answer, module lists."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from headrace.core.errors import LoadError
from headrace.quant.base import Kind
from headrace.quant.stored import Storage

Config = Mapping[str, Any]
"""`quantization_config` of a config.json."""

Scheme = Callable[[str, Kind], Storage | None]
"""Name of a module in the checkpoint and what it is -> how it is stored, None: as floats."""

Builder = Callable[[Config], Scheme]
"""Raises LoadError, which names the field, for what is not supported."""


def modules_from_config(config: Config, *keys: str) -> list[str]:
    """The first of these lists of names that is there, as it is written.

    Raises:
        LoadError: it is no list of names.
    """
    for key in keys:
        found = config.get(key)
        if found is None:
            continue
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise LoadError(f"quantization_config.{key} must be a list of names", field=key)
        return list(found)
    return []


def listed(module: str, names: Iterable[str]) -> bool:
    """Whether a name in the list is the module's, a whole part of it, or what it lies in."""
    return any(
        module == name or module.startswith(f"{name}.") or f".{name}." in f".{module}."
        for name in names
    )


def group_size(config: Config, *keys: str) -> int:
    """Inputs per scale, 0 for all: the first of these fields that is there, of which -1 is all.

    Raises:
        LoadError: no such number.
    """
    key = next((key for key in keys if key in config), keys[0])
    size = config.get(key)
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise LoadError(
            f"quantization_config.{key} must be a positive number or -1, not {size!r}", field=key
        )
    return max(size, 0)
