"""Checkpoints that bitsandbytes quantized, and floats that become NF4 as they are read.

The files are safetensors; what a matrix is stored as is the business of `quant.bnb`.
"""

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.default import DefaultModelLoader
from headrace.models import Model


class BitsAndBytesModelLoader(DefaultModelLoader):
    """Format bitsandbytes: any other quantization is refused."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        if build.quant.name != "bitsandbytes":
            raise LoadError(
                f"--load-format bitsandbytes does not read a checkpoint of {build.quant.name}",
                field="load_format",
            )
        return super().load_model(info, build)
