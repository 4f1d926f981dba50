"""What every loader does: read its settings, make the model, fill it, say how long it took."""

import ctypes
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import msgspec
import psutil

from headrace.core.errors import BadRequest
from headrace.core.hardware import detect
from headrace.core.model_info import ModelInfo
from headrace.core.weight_options import LoadOptions
from headrace.layers.build import Build
from headrace.loader.files import resolve_model_path
from headrace.models import Model

logger = logging.getLogger(__name__)

_DEFAULTS = LoadOptions()


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What --model-loader-extra-config may say; a loader with settings has a subclass."""


class BaseModelLoader(ABC):
    """One way to get weights. Stateless but for its settings; chosen by --load-format.

    `packs`: it packs weights, so that a cache of packed ones saves time.

    Raises:
        BadRequest: --model-loader-extra-config has what this format does not know.
    """

    settings_type: ClassVar[type[Settings]] = Settings
    packs: ClassVar[bool] = True

    def __init__(self, load_format: str = "auto", options: LoadOptions = _DEFAULTS) -> None:
        self.load_format, self.options = load_format, options
        self.settings = self._read_settings()

    def _read_settings(self) -> Settings:
        text, known = self.options.model_loader_extra_config, self.settings_type
        try:
            return msgspec.json.decode(text, type=known)
        except msgspec.DecodeError as error:
            names = ", ".join(known.__struct_fields__) or "none"
            raise BadRequest(
                f"--model-loader-extra-config of --load-format {self.load_format}: {error}; "
                f"settings it has: {names}",
                field="model_loader_extra_config",
            ) from None

    def download_model(self, path: str, revision: str = "", download_dir: str = "") -> Path:
        """Make the checkpoint available locally, without loading it; returns its folder."""
        return resolve_model_path(path, revision, download_dir, self.load_format)

    @abstractmethod
    def load_model(self, info: ModelInfo, build: Build) -> Model:
        """The model of `info` with this rank's weights, from the local folder `info.path`.

        Raises:
            LoadError: unknown architecture, or the checkpoint does not fit it.
        """


@contextmanager
def logged_load(info: ModelInfo, build: Build) -> Iterator[None]:
    """Log the beginning and the end of a load, with time and memory."""
    begin, before = time.perf_counter(), _resident()
    logger.info("Load weight begin. avail mem=%.2f GB", detect().memory_available / 2**30)
    yield
    _trim()
    logger.info(
        "Load weight end. elapsed=%.2f s, type=%s, dtype=%s, rank=%d/%d, avail mem=%.2f GB, "
        "mem usage=%.2f GB.",
        time.perf_counter() - begin,
        info.architecture,
        str(build.dtype).removeprefix("torch."),
        build.group.rank,
        build.group.size,
        detect().memory_available / 2**30,
        (_resident() - before) / 2**30,
    )


def _resident() -> int:
    resident: int = psutil.Process().memory_info().rss
    return resident


def _trim() -> None:
    """Give back to the system what loading needed for a while; glibc keeps it for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
