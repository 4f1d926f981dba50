"""Weights from files (or from nothing) into models.

`load_model` is what a runner calls; `get_model_loader` maps a --load-format to its loader.
Importing this package imports no torch; `loader.files` never does.
"""

from typing import TYPE_CHECKING

from headrace.core.errors import BadRequest
from headrace.core.model_info import ModelInfo

if TYPE_CHECKING:
    import torch

    from headrace.dist.comm import Group
    from headrace.layers.build import Split
    from headrace.loader.base import BaseModelLoader
    from headrace.models import Model

LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")


def load_model(
    info: ModelInfo,
    dtype: "torch.dtype",
    group: "Group",
    load_format: str = "auto",
    *,
    quantization: str = "none",
    weight_cache: str = "",
    model_impl: str = "auto",
    split: "Split | None" = None,
) -> "Model":
    """Build the model of `info` for this rank and fill its weights.

    `quantization`: a format to quantize to while loading. `weight_cache`: a folder of packed
    weights, used and filled; empty for none. `model_impl`: whose implementation runs; "auto"
    takes transformers' where there is none of ours. `split`: how the model is cut beyond `group`.

    Raises:
        LoadError: unknown architecture, or the checkpoint does not fit it.
    """
    from headrace.layers.build import WHOLE, Build
    from headrace.loader.gguf_folder import GGUF_KEY
    from headrace.models import borrowed
    from headrace.quant import quant_method

    build = Build(dtype, group, quant_method(info.hf, quantization), split or WHOLE)
    if model_impl == "transformers" or (model_impl == "auto" and borrowed(info.architecture)):
        from headrace.loader.fallback import TransformersModelLoader

        return TransformersModelLoader().load_model(info, build)
    if load_format == "auto" and GGUF_KEY in info.hf:
        load_format = "gguf"
    loader = get_model_loader(load_format)
    if not weight_cache:
        return loader.load_model(info, build)
    from headrace.loader.snapshot import load_through

    return load_through(weight_cache, loader, load_format, info, build)


def get_model_loader(load_format: str) -> "BaseModelLoader":
    """The loader of a --load-format."""
    if load_format == "dummy":
        from headrace.loader.dummy import DummyModelLoader

        return DummyModelLoader()
    if load_format == "gguf":
        from headrace.loader.gguf_loader import GgufModelLoader

        return GgufModelLoader()
    if load_format in LOAD_FORMATS:
        from headrace.loader.default import DefaultModelLoader

        return DefaultModelLoader()
    raise BadRequest(
        f"--load-format must be one of {', '.join(LOAD_FORMATS)}, not {load_format!r}",
        field="load_format",
    )
