"""Loads checkpoints as transformers and Mistral write them, one tensor at a time.

What to read (`Source`), how (mapped, read, by threads, through numpy files), and in which names.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from torch import Tensor

from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, Settings, logged_load
from headrace.loader.checksum import verify
from headrace.loader.files import WeightFiles, kind_of, weight_files
from headrace.loader.iterators import (
    Weights,
    drop_cached,
    file_reads,
    iterate_weights,
    prefetched,
    streamed,
)
from headrace.loader.mistral_folder import weights_folder
from headrace.models import Model, make_model

_LAYER = re.compile(r"\blayers\.(\d+)\.")


@dataclass(frozen=True)
class Source:
    """Files with weights of a model; `prefix` goes before the names of their tensors."""

    folder: Path
    files: WeightFiles
    prefix: str = ""


class DefaultSettings(Settings, frozen=True):
    """`enable_multithread_load`: `num_threads` tensors are read at a time, from any files."""

    enable_multithread_load: bool = False
    num_threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class DefaultModelLoader(BaseModelLoader):
    """Formats auto, safetensors, pt, npcache and mistral."""

    settings_type = DefaultSettings
    settings: DefaultSettings

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        sources = self.sources(info)
        paths = [path for source in sources for path in source.files.paths]
        if self.options.model_checksum:
            manifest = Path(self.options.model_checksum).expanduser()
            verify(manifest, sources[0].folder, sources[0].files.paths)
        with logged_load(info, build), ExitStack() as inside:
            if self.options.weight_loader_prefetch_checkpoints:
                threads = self.options.weight_loader_prefetch_num_threads
                inside.enter_context(prefetched(paths, threads))
            model = make_model(info, build)
            total = sum(path.stat().st_size for path in paths)
            weights = without_drafts(info, self.all_weights(info, sources))
            model.load_weights(with_progress(weights, total, quiet=build.group.rank != 0))
        if self.options.weight_loader_drop_cache_after_load:
            drop_cached(paths)
        return model

    def sources(self, info: ModelInfo) -> list[Source]:
        """The checkpoint, then the folders of sentence-transformers' Dense modules."""
        kind, folder = kind_of(self.load_format), weights_folder(info)
        found = [Source(folder, weight_files(folder, kind))]
        for dense in info.pooling.dense if info.pooling else ():
            own = folder / dense.folder
            found.append(Source(own, weight_files(own, kind), f"{dense.folder}."))
        return found

    def all_weights(self, info: ModelInfo, sources: list[Source]) -> Weights:
        """Every tensor of every source by the name that the model knows."""
        for source in sources:
            for name, tensor in self.renamed(info, self.weights(source)):
                yield source.prefix + name, tensor

    def renamed(self, info: ModelInfo, weights: Weights) -> Weights:
        """The names of transformers for those of Mistral."""
        if self.load_format != "mistral":
            return weights
        from headrace.loader.mistral import usual_weights

        return usual_weights(info, weights)

    def weights(self, source: Source) -> Weights:
        """The tensors of one source, as the options say to read them."""
        if self.load_format == "npcache":
            from headrace.loader.npcache import np_cache_weights

            return np_cache_weights(source.folder, source.files)
        mapped = self.threads == 1 and not self.options.weight_loader_disable_mmap
        if mapped or self.load_format == "pt":
            return iterate_weights(source.files)
        return streamed(file_reads(source.files), self.threads)

    @property
    def threads(self) -> int:
        """How many tensors are read at a time."""
        return self.settings.num_threads if self.settings.enable_multithread_load else 1


def without_drafts(info: ModelInfo, weights: Weights) -> Weights:
    """Leaves out the layers behind the last that predict further tokens (config.json tells)."""
    if not info.text.get("num_nextn_predict_layers"):
        return weights

    def is_draft(name: str) -> bool:
        layer = _LAYER.search(name)
        return layer is not None and int(layer[1]) >= info.num_layers

    return ((name, tensor) for name, tensor in weights if not is_draft(name))


def with_progress(weights: Weights, total: int, quiet: bool) -> Iterator[tuple[str, Tensor]]:
    """A bar in bytes per second, on a terminal, of rank 0."""
    if quiet or not sys.stderr.isatty():
        yield from weights
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading weights") as bar:
        for name, tensor in weights:
            size = tensor.nbytes
            yield name, tensor
            bar.update(size)
