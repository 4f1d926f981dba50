"""What a checkpoint's configuration says about its quantization: which method for which module.

`BUILDERS` has a function for each `quant_method`: it reads the configuration into a `Scheme`, which
names the storage of a module. Knows no layers and reads no weights.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from headrace.core.errors import LoadError
from headrace.core.model_info import WRONG_FIELD, ModelInfo
from headrace.quant import awq, bnb, compressed_tensors, fp8, gptq, modelopt, mxfp4, torchao
from headrace.quant.base import Kind, QuantMethod
from headrace.quant.dense import AS_IS
from headrace.quant.parts import by_part
from headrace.quant.scheme import Builder, Config, Scheme
from headrace.quant.stored import StoredWeights

BUILDERS: dict[str, Builder] = {
    "compressed-tensors": compressed_tensors.scheme,
    "fp8": fp8.scheme,
    "fbgemm_fp8": fp8.scheme,
    "modelopt": modelopt.scheme,
    "torchao": torchao.scheme,
    "awq": awq.scheme,
    "gptq": gptq.scheme,
    "bitsandbytes": bnb.scheme,
    "mxfp4": mxfp4.scheme,
}
"""By `quant_method`."""

_ALIASES: dict[str, tuple[str, ...]] = {
    "compressed-tensors": ("w8a8_int8", "w8a8_fp8"),
    "fbgemm_fp8": ("fp8",),
    "modelopt": ("modelopt_fp8",),
    "awq": ("awq_marlin",),
    "gptq": ("gptq_marlin",),
}
"""What else --quantization may say for a `quant_method`."""


_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",  # of AutoGPTQ
    "quant_config.json": "awq",  # of AutoAWQ
}
"""What tools wrote beside config.json -> the `quant_method` that it means where it says none."""


def method_names(method: str) -> tuple[str, ...]:
    """What --quantization may say where a checkpoint says `quant_method`."""
    return (method, *_ALIASES.get(method, ()))


def stored_config(info: ModelInfo) -> dict[str, Any] | None:
    """The checkpoint's own description, None if it is not quantized.

    Raises:
        LoadError: it is no object, or cannot be read.
    """
    for place in (info.hf, info.text):
        for key in ("quantization_config", "compression_config"):
            found = place.get(key)
            if found and not isinstance(found, dict):
                raise LoadError(f"{key} must be an object, not {found!r}", field=key)
            if found:
                return dict(found)
    for name, method in _FILES.items():
        if (Path(info.path) / name).is_file():
            return {"quant_method": method} | _read(Path(info.path) / name)
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise LoadError(f"{path} holds {type(found).__name__}, not an object")
    return found


def from_checkpoint(config: Config, info: ModelInfo, stored: Iterable[str]) -> "FromCheckpoint":
    """Raises LoadError for what is not supported."""
    method = str(config.get("quant_method", ""))
    builder = BUILDERS.get(method)
    if builder is None:
        raise LoadError(
            f"the checkpoint is quantized (quantization_config.quant_method={method!r}), which is "
            f"not supported; supported are {', '.join(sorted(BUILDERS))}",
            field="quantization_config",
        )
    try:
        scheme = builder(config)
    except WRONG_FIELD as error:
        raise LoadError(
            f"quantization_config of {method} has a field of a wrong type: {error!r}",
            field="quantization_config",
        ) from error
    wide: torch.dtype = getattr(torch, info.dtype)
    return FromCheckpoint(method, scheme, wide, tuple(stored))


@dataclass(frozen=True)
class FromCheckpoint:
    """The `Quantization` of a quantized checkpoint.

    `wide`: what a matrix becomes that no kernel multiplies as it is stored. `stored`: names of
    tensors in the checkpoint; `rename` turns them into the model's.
    """

    name: str
    scheme: Scheme
    wide: torch.dtype
    stored: tuple[str, ...] = ()
    rename: Callable[[str], str] = field(default=str)

    def renamed(self, rename: Callable[[str], str]) -> "FromCheckpoint":
        return replace(self, rename=rename)

    def method(self, modules: Sequence[str], kind: Kind, stacked: str = "") -> QuantMethod:
        names = [self._raw(module) for module in modules]
        if stacked and not any(names):
            names = [self._raw(stacked)] * len(modules)
        return by_part([self._one(n or m, kind) for n, m in zip(names, modules, strict=True)])

    def _one(self, module: str, kind: Kind) -> QuantMethod:
        storage = self.scheme(module, kind)
        if storage is None:
            return AS_IS
        # Configurations are silent about these, so the checkpoint itself decides.
        small = kind in ("router", "head", "embedding")
        if small and self.stored and f"{module}.{storage.marker}" not in self._names:
            return AS_IS
        # Others are multiplied by operators that take x as it is.
        return StoredWeights(storage, self.wide, reorders=kind in ("linear", "expert"))

    def _raw(self, module: str) -> str | None:
        """The checkpoint's name of a module, None if it is not there under this name."""
        return self._modules.get(module) or self._modules.get(module.removeprefix("model."))

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.stored)

    @cached_property
    def _modules(self) -> dict[str, str]:
        """The model's name of each module in the checkpoint -> the checkpoint's."""
        return {
            self.rename(name).rpartition(".")[0]: name.rpartition(".")[0] for name in self.stored
        }
