"""Weights from a GGUF file. What is quantized in it is widened while it is read."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_config import family_of, usual_name, usual_values
from headrace.loader.gguf_folder import GGUF_KEY
from headrace.models import Model, make_model

_VIEWS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELSEWHERE = ("rope_freqs.weight",)  # in config.json


class GgufModelLoader(BaseModelLoader):
    """Format gguf; auto where --model-path is a GGUF file."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        path = info.hf.get(GGUF_KEY)
        if not isinstance(path, str):
            raise LoadError(f"{info.path} is no GGUF file", field="load_format")
        with logged_load(info, build):
            model = make_model(info, build)
            model.load_weights(gguf_weights(GgufFile(Path(path)), info))
        return model


def gguf_weights(file: GgufFile, info: ModelInfo) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by the name that checkpoints give it; views of the file where they can be."""
    family = family_of(file)
    for tensor in file:
        if tensor.name in _ELSEWHERE:
            continue
        name = usual_name(tensor.name)
        dtype = _VIEWS.get(tensor.kind)
        if dtype is None:
            values = torch.from_numpy(file.values(tensor))
        else:
            values = torch.frombuffer(file.bytes_of(tensor), dtype=dtype).view(tensor.shape)
        yield name, usual_values(family, name, values, info.hf)
