"""Reading by other packages: Run:ai Model Streamer and fastsafetensors, where they are installed.

They read the same files as format auto, with threads and buffers of their own.
"""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from headrace.core.errors import LoadError
from headrace.loader.base import Settings
from headrace.loader.default import DefaultModelLoader, Source
from headrace.loader.iterators import Weights
from headrace.loader.safetensors import read_header


class RunaiSettings(Settings, frozen=True):
    """`concurrency`: threads; `memory_limit`: bytes of its buffer, -1 for no limit."""

    concurrency: Annotated[int, msgspec.Meta(ge=1, le=1024)] | None = None
    memory_limit: Annotated[int, msgspec.Meta(ge=-1)] | None = None


class RunaiModelStreamerLoader(DefaultModelLoader):
    """Format runai_streamer."""

    settings_type = RunaiSettings  # type: ignore[assignment]
    settings: RunaiSettings  # type: ignore[assignment]

    def weights(self, source: Source) -> Weights:
        package = _package("runai_model_streamer", "runai-model-streamer", "runai")
        for name in ("concurrency", "memory_limit"):
            if (value := getattr(self.settings, name)) is not None:
                os.environ[f"RUNAI_STREAMER_{name.upper()}"] = str(value)
        check_headers(source.files.paths)
        with package.SafetensorsStreamer() as streamer:
            for path in source.files.paths:
                streamer.stream_file(str(path))
                for name, tensor in streamer.get_tensors():
                    if source.files.wants(name, path):
                        yield name, tensor


class FastSafetensorsLoader(DefaultModelLoader):
    """Format fastsafetensors."""

    settings_type = Settings  # type: ignore[assignment]

    def weights(self, source: Source) -> Weights:
        package = _package("fastsafetensors", "fastsafetensors", "fastsafetensors")
        check_headers(source.files.paths)
        loader = package.SafeTensorsFileLoader(package.SingleGroup(), device="cpu", nogds=True)
        for path in source.files.paths:
            loader.add_filenames({0: [str(path)]})
            buffer = loader.copy_files_to_device()
            try:
                for name in loader.get_keys():
                    if source.files.wants(name, path):
                        yield name, buffer.get_tensor(name)
            finally:
                buffer.close()
                loader.reset()
        loader.close()


def check_headers(paths: Sequence[Path]) -> None:
    """Raises LoadError for a file that a package must not be given."""
    for path in paths:
        read_header(path)


def _package(module: str, name: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise LoadError(
            f"this load format needs the package {name}: pip install 'headrace[{extra}]' ({error})",
            field="load_format",
        ) from error
