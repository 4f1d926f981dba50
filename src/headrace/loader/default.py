"""Loads safetensors checkpoints as transformers writes them, one tensor at a time."""

import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.files import WeightFiles, weight_files
from headrace.loader.safetensors import iterate_tensors
from headrace.models import Model, make_model


class DefaultModelLoader(BaseModelLoader):
    """Formats auto and safetensors."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        files = weight_files(Path(info.path))
        with logged_load(info, build):
            model = make_model(info, build)
            weights = _with_progress(files, quiet=build.group.rank != 0)
            model.load_weights(chain(weights, _dense_weights(info)))
        return model


def iterate_weights(files: WeightFiles) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint once, as views that are valid until the next one."""
    for path in files.paths:
        for name, tensor in iterate_tensors(path):
            if files.wants(name, path):
                yield name, tensor


def _dense_weights(info: ModelInfo) -> Iterator[tuple[str, Tensor]]:
    """The tensors of sentence-transformers' Dense modules, named by their folders."""
    for dense in info.pooling.dense if info.pooling else ():
        for path in weight_files(Path(info.path) / dense.folder).paths:
            for name, tensor in iterate_tensors(path):
                yield f"{dense.folder}.{name}", tensor


def _with_progress(files: WeightFiles, quiet: bool) -> Iterator[tuple[str, Tensor]]:
    """A bar in bytes per second, on a terminal, of rank 0."""
    if quiet or not sys.stderr.isatty():
        yield from iterate_weights(files)
        return
    from tqdm import tqdm

    with tqdm(total=files.total_bytes, unit="B", unit_scale=True, desc="Loading weights") as bar:
        for name, tensor in iterate_weights(files):
            yield name, tensor
            bar.update(tensor.nbytes)
