"""Checkpoints of llm-compressor: `quant_method` compressed-tensors.

Groups of modules, named, matched by "re:..." or by their class, each with its weights' type, bits
and strategy, and a list of modules to ignore. Formats int-quantized, float-quantized and
naive-quantized store a value per element, pack-quantized several to an int32.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from headrace.core.errors import LoadError
from headrace.quant.base import Kind
from headrace.quant.fp8 import Fp8
from headrace.quant.integers import Integers
from headrace.quant.scheme import Config, Scheme, modules_from_config
from headrace.quant.stored import Storage

_CLASSES: dict[Kind, str] = {"embedding": "Embedding"}  # others are Linear
_PLAIN = ("int-quantized", "float-quantized", "naive-quantized")
_PACKED = "pack-quantized"
_FORMATS = (*_PLAIN, _PACKED, "dense", "mixed-precision")
_BITS = (2, 4, 8)  # that fill an int32 without a rest


@dataclass(frozen=True)
class _Targets:
    """Modules named, matched, or of a class."""

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]

    def match(self, module: str, kind: Kind) -> bool:
        return (
            module in self.names
            or _CLASSES.get(kind, "Linear") in self.names
            or any(pattern.match(module) for pattern in self.patterns)
        )


def scheme(config: Config) -> Scheme:
    """The scheme of a `quantization_config` with quant_method compressed-tensors."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict):
        raise LoadError(
            f"quantization_config.config_groups must be an object, not {groups!r}",
            field="config_groups",
        )
    sparsity = config.get("sparsity_config") or {}
    if sparsity and sparsity.get("format", "dense") != "dense":
        raise _unsupported("sparsity_config.format", sparsity.get("format"), ("dense",))
    if (config.get("transform_config") or {}).get("config_groups"):
        raise _unsupported("transform_config", "given", ("none",))
    ignored = _targets(modules_from_config(config, "ignore"), "ignore")
    chosen = [_group(f"config_groups.{name}", group, config) for name, group in groups.items()]

    def of(module: str, kind: Kind) -> Storage | None:
        if ignored.match(module, kind):
            return None
        return next((stored for targets, stored in chosen if targets.match(module, kind)), None)

    return of


def _targets(names: list[str], field: str) -> _Targets:
    try:
        patterns = tuple(re.compile(name[3:]) for name in names if name.startswith("re:"))
    except re.error as error:
        raise LoadError(
            f"quantization_config.{field} has a pattern that cannot be read: {error}", field=field
        ) from error
    return _Targets(frozenset(name for name in names if not name.startswith("re:")), patterns)


def _group(field: str, group: Any, config: Config) -> tuple[_Targets, Storage | None]:
    """The modules of a group, and how they are stored; None where weights are floats."""
    if not isinstance(group, dict):
        raise LoadError(
            f"quantization_config.{field} must be an object, not {group!r}", field=field
        )
    targets = _targets(modules_from_config(group, "targets"), f"{field}.targets")
    format = group.get("format") or config.get("format") or "dense"
    if format not in _FORMATS:
        raise _unsupported(f"{field}.format", format, _FORMATS)
    weights = group.get("weights")
    if weights is None or format == "dense":
        return targets, None
    if not isinstance(weights, dict):
        raise LoadError(f"quantization_config.{field}.weights must be an object", field=field)
    kind = weights.get("type", "int")
    if kind == "float" and format in _PLAIN:
        return targets, _floats(f"{field}.weights", weights)
    if kind == "int" and format in (*_PLAIN, _PACKED):
        return targets, _integers(f"{field}.weights", weights, format == _PACKED)
    raise LoadError(
        f"quantization_config.{field} stores type {kind!r} as {format!r}, which is not supported",
        field=f"{field}.format",
    )


def _floats(field: str, weights: Mapping[str, Any]) -> Storage:
    if weights.get("num_bits", 8) != 8:
        raise _unsupported(f"{field}.num_bits", weights.get("num_bits"), (8,))
    strategy = weights.get("strategy") or "tensor"
    if strategy == "block":
        block = weights.get("block_structure")
        if not (isinstance(block, list) and [type(side) for side in block] == [int, int]):
            raise _unsupported(f"{field}.block_structure", block, ("[128, 128]",))
        return Fp8((block[0], block[1]))
    if strategy not in ("tensor", "channel"):
        raise _unsupported(f"{field}.strategy", strategy, ("tensor", "channel", "block"))
    return Fp8()


def _integers(field: str, weights: Mapping[str, Any], packed: bool) -> Storage:
    bits, strategy = weights.get("num_bits", 8), weights.get("strategy") or "tensor"
    if bits not in _BITS:
        raise _unsupported(f"{field}.num_bits", bits, _BITS)
    group = weights.get("group_size") or -1
    if strategy not in ("tensor", "channel", "group"):
        raise _unsupported(f"{field}.strategy", strategy, ("tensor", "channel", "group"))
    if strategy != "group":
        group = 0
    elif not isinstance(group, int) or group < 1:
        raise _unsupported(f"{field}.group_size", group, ("a positive number",))
    return Integers(
        bits=bits,
        group=group,
        packed=packed,
        symmetric=bool(weights.get("symmetric", True)),
        shuffled=weights.get("actorder") in (True, "group"),
    )


def _unsupported(field: str, value: Any, known: tuple[Any, ...]) -> LoadError:
    return LoadError(
        f"quantization_config.{field} is {value!r}; supported: {', '.join(map(str, known))}",
        field=field,
    )
