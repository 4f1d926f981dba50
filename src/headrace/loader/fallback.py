"""Models that transformers computes and loads: what runs where headrace has no implementation."""

import logging

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.models import Model

logger = logging.getLogger(__name__)


class TransformersModelLoader(BaseModelLoader):
    """Chosen by --model-impl, not by --load-format."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        from headrace.models.fallback import TransformersModel

        if self.load_format not in ("auto", "safetensors"):
            raise LoadError(
                f"--model-impl transformers reads safetensors files, not format {self.load_format}",
                field="load_format",
            )
        logger.warning(
            "%s runs on transformers' code: slower, and not bitwise the same in every batch",
            info.architecture,
        )
        with logged_load(info, build):
            return TransformersModel(info, build)
