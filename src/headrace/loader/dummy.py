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

from headrace.core.model_info import ModelInfo
from headrace.dist.comm import Group, SoloGroup
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.models import Model, model_class

_POOL = 1_048_573  # a prime, so that rows of a matrix begin at different places
_RANGE = 0.02


class DummyModelLoader(BaseModelLoader):
    """Format dummy; needs only config.json."""

    def load_model(self, info: ModelInfo, dtype: torch.dtype, group: Group) -> Model:
        with logged_load(info, dtype, group):
            model = model_class(info.architecture)(info, dtype, group)
            model.load_weights(_as_stored(info, dummy_weights(model.checkpoint_shapes())))
        return model


def dummy_checkpoint(info: ModelInfo) -> dict[str, Tensor]:
    """Every tensor that format dummy makes up for this model, as a checkpoint would store it."""
    model = model_class(info.architecture)(info, getattr(torch, info.dtype), SoloGroup())
    return dict(_as_stored(info, dummy_weights(model.checkpoint_shapes())))


def _as_stored(
    info: ModelInfo, weights: Iterator[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Rounded as a real checkpoint of this model is."""
    for name, tensor in weights:
        yield name, tensor.to(getattr(torch, info.dtype))


def dummy_weights(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """fp32 tensors, uniform in +-0.02; norm weights are around 1, so that activations live."""
    for name, shape in shapes.items():
        tensor = dummy_tensor(name, shape)
        yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def dummy_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    """fp32 values in +-0.02 that depend on `name` and the element's index only."""
    tensor = torch.empty(shape)
    flat = tensor.view(-1)
    place, filled = zlib.crc32(name.encode()) % _POOL, 0
    while filled < len(flat):
        piece = _pool()[place : place + len(flat) - filled]
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
