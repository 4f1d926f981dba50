"""Weights from files, stores, other servers (or from nothing) into models.

`load_built` is what a runner calls; `LOADERS` maps a --load-format to its loader, imported when
needed. Importing this package imports no torch; `loader.files` never does.
"""

import importlib
from typing import TYPE_CHECKING

from headrace.core.errors import BadRequest
from headrace.core.model_info import ModelInfo
from headrace.core.weight_options import LoadOptions

if TYPE_CHECKING:
    import torch

    from headrace.dist.comm import Group
    from headrace.layers.build import Build, Split
    from headrace.loader.base import BaseModelLoader
    from headrace.models import Model
    from headrace.quant.base import Quantization

_DEFAULTS = LoadOptions()
_FILES = "default:DefaultModelLoader"

LOADERS = {
    "auto": _FILES,
    "safetensors": _FILES,
    "pt": _FILES,
    "npcache": _FILES,
    "mistral": _FILES,
    "gguf": "gguf_loader:GgufModelLoader",
    "bitsandbytes": "bitsandbytes:BitsAndBytesModelLoader",
    "layered": "layered:LayeredModelLoader",
    "sharded_state": "sharded:ShardedStateLoader",
    "remote": "remote:RemoteModelLoader",
    "remote_instance": "remote_instance:RemoteInstanceModelLoader",
    "runai_streamer": "streamers:RunaiModelStreamerLoader",
    "fastsafetensors": "streamers:FastSafetensorsLoader",
    "dummy": "dummy:DummyModelLoader",
}
"""--load-format -> module:class in this package."""


def load_model(
    info: ModelInfo,
    dtype: "torch.dtype",
    group: "Group",
    load_format: "str | type[BaseModelLoader]" = "auto",
    *,
    quantization: str = "none",
    weight_cache: str = "",
    model_impl: str = "auto",
    options: LoadOptions = _DEFAULTS,
) -> "Model":
    """`load_built` of a model that is cut over `group` at most.

    `quantization`: a format to quantize to while loading.
    """
    return load_built(
        info,
        build_of(info, dtype, group, quantization, load_format=load_format),
        load_format,
        weight_cache=weight_cache,
        model_impl=model_impl,
        options=options,
    )


def load_built(
    info: ModelInfo,
    build: "Build",
    load_format: "str | type[BaseModelLoader]" = "auto",
    *,
    weight_cache: str = "",
    model_impl: str = "auto",
    options: LoadOptions = _DEFAULTS,
) -> "Model":
    """Build the model of `info` for this rank and fill its weights.

    `weight_cache`: a folder of packed weights, used and filled; empty for none. `model_impl`: whose
    implementation runs; "auto" takes transformers' where there is none of ours.

    Raises:
        LoadError: unknown architecture, or the checkpoint does not fit it.
    """
    from headrace.models import borrowed

    if model_impl == "transformers" or (model_impl == "auto" and borrowed(info.architecture)):
        from headrace.loader.fallback import TransformersModelLoader

        asked = load_format if isinstance(load_format, str) else load_format.__name__
        return TransformersModelLoader(asked, options).load_model(info, build)
    loader = get_model_loader(_settled(load_format, info), options)
    if not weight_cache or not loader.packs:
        return loader.load_model(info, build)
    from headrace.loader.snapshot import load_through

    return load_through(weight_cache, loader, info, build)


def build_of(
    info: ModelInfo,
    dtype: "torch.dtype",
    group: "Group",
    quantization: str = "none",
    split: "Split | None" = None,
    load_format: "str | type[BaseModelLoader]" = "auto",
) -> "Build":
    """What the layers of `info` are built with; `split`: how they are cut beyond `group`.

    `quantization`: what --quantization says. Formats bitsandbytes and gguf have their own.

    Raises:
        LoadError: quantized in a way that is not supported, or otherwise than was asked for.
    """
    from headrace.layers.build import WHOLE, Build
    from headrace.loader.gguf_folder import GGUF_KEY
    from headrace.loader.stored import stored_names
    from headrace.quant import quantization_of

    if load_format == "bitsandbytes" and quantization == "none":
        quantization = "bitsandbytes"
    if GGUF_KEY in info.hf and load_format != "dummy" and quantization in ("none", "gguf"):
        from headrace.loader.gguf_loader import gguf_quantization

        quant: Quantization = gguf_quantization(info)
    else:
        quant = quantization_of(info, quantization, stored_names)
    return Build(dtype, group, quant, split=split or WHOLE)


def get_model_loader(
    load_format: "str | type[BaseModelLoader]", options: LoadOptions = _DEFAULTS
) -> "BaseModelLoader":
    """The loader of a --load-format, or of a class that is one.

    Raises:
        BadRequest: there is no such format, or `options` has settings that it does not know.
    """
    if not isinstance(load_format, str):
        return load_format(load_format.__name__, options)
    if load_format not in LOADERS:
        raise BadRequest(
            f"--load-format must be one of {', '.join(LOADERS)}, not {load_format!r}",
            field="load_format",
        )
    module, _, name = LOADERS[load_format].partition(":")
    found: type[BaseModelLoader] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return found(load_format, options)


def _settled(
    load_format: "str | type[BaseModelLoader]", info: ModelInfo
) -> "str | type[BaseModelLoader]":
    """What auto means for a model whose config.json headrace wrote from something else."""
    from headrace.loader.gguf_folder import GGUF_KEY
    from headrace.loader.mistral_folder import MISTRAL_KEY
    from headrace.loader.remote_folder import REMOTE_KEY

    if load_format == "auto" and GGUF_KEY in info.hf:
        return "gguf"
    if load_format == "auto" and MISTRAL_KEY in info.hf:
        return "mistral"
    if load_format == "auto" and REMOTE_KEY in info.hf:
        return "remote"
    return load_format
