"""Made-up weights, to start a server without a checkpoint.

The value of an element is a function of the tensor's name and the element's index in the whole
tensor, so it does not depend on how the model is cut. A pool of hashed numbers of prime length
is laid end to end from a place that the name decides, which costs no more than a copy.
"""

import zlib
from collections.abc import Iterator
from functools import cache

import numpy as np
import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.dist.comm import SoloGroup
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.models import Model, make_model
from headrace.quant import quantization_of
from headrace.quant.checkpoint import FromCheckpoint

_POOL = 1_048_573  # a prime, so that rows of a matrix begin at different places
_RANGE = 0.02


class DummyModelLoader(BaseModelLoader):
    """Format dummy; needs only config.json."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        if isinstance(build.quant, FromCheckpoint):
            raise LoadError(
                "--load-format dummy makes up floats only; take quantization_config away with "
                "--json-model-override-args '{\"quantization_config\": null}'",
                field="load_format",
            )
        with logged_load(info, build):
            model = make_model(info, build)
            # Rounded as a real checkpoint of this model is.
            stored = getattr(torch, info.dtype)
            model.fill(dummy_weights(model.checkpoint_shapes(), stored))
        return model


def dummy_checkpoint(info: ModelInfo) -> dict[str, Tensor]:
    """Every tensor that format dummy makes up for this model, by the model's own names."""
    dtype: torch.dtype = getattr(torch, info.dtype)
    build = Build(dtype, SoloGroup(), quantization_of(info))
    model = make_model(info, build)
    return dict(dummy_weights(model.checkpoint_shapes(), dtype))


def dummy_weights(
    shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Uniform in +-0.02; norm weights are around 1, so that activations live."""
    for name, shape in shapes.items():
        center = 1.0 if name.lower().endswith("norm.weight") else 0.0
        yield name, dummy_tensor(name, shape, dtype, center)


def dummy_tensor(
    name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, center: float = 0.0
) -> Tensor:
    """Values around `center` that depend on `name` and the element's index only."""
    tensor = torch.empty(shape, dtype=dtype)
    flat, pool = tensor.view(-1), (_pool() + center).to(dtype)
    place, filled = zlib.crc32(name.encode()) % _POOL, 0
    while filled < len(flat):
        piece = pool[place : place + len(flat) - filled]
        flat[filled : filled + len(piece)] = piece
        filled, place = filled + len(piece), 0
    return tensor


@cache
def _pool() -> Tensor:
    """fp32 [_POOL]: a hash of the index (murmur3's finalizer) as a number in +-0.02."""
    hashed = np.arange(_POOL, dtype=np.uint32)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        hashed ^= hashed >> np.uint32(shift)
        hashed *= np.uint32(factor)
    hashed ^= hashed >> np.uint32(16)
    unit = hashed.astype(np.float64) / 2**32
    return torch.from_numpy(((2 * unit - 1) * _RANGE).astype(np.float32))
