"""Weights from a store (`loader.stores`), read over the network straight into the model.

A store has either a checkpoint in safetensors files, or what each rank holds, which `save_remote`
put there. Several ranges are read at a time, as one connection is rarely as fast as the network.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, Settings, logged_load
from headrace.loader.default import with_progress, without_drafts
from headrace.loader.files import INDEX, SAFETENSORS, is_weights, read_index
from headrace.loader.iterators import Read, Weights, as_tensor, streamed
from headrace.loader.remote_folder import REMOTE_KEY
from headrace.loader.safetensors import Entry, parse_header
from headrace.loader.sharded import DEFAULT_PATTERN, check_layout, files_beside, state_parts
from headrace.loader.state import by_name, fill, layout, state_from, write_blobs
from headrace.loader.stores import Store, open_store, redacted
from headrace.models import Model, make_model

_PART_BYTES = 256 << 20


class RemoteSettings(Settings, frozen=True):
    """`num_threads`: ranges that are read at a time."""

    num_threads: Annotated[int, msgspec.Meta(ge=1, le=256)] = 8


class RemoteModelLoader(BaseModelLoader):
    """Format remote; auto where --model-path is a URL."""

    settings_type = RemoteSettings
    settings: RemoteSettings
    packs = False

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        url = info.hf.get(REMOTE_KEY)
        if not isinstance(url, str):
            raise LoadError("--load-format remote needs a URL as --model-path", field="load_format")
        store = open_store(url)
        names = store.names()
        with logged_load(info, build):
            model = make_model(info, build)
            if DEFAULT_PATTERN.format(rank=0, part=0) in names:
                self._restore(model, store, names, layout(info, build))
                return model
            files = _weight_files(names, Path(info.path), redacted(url))
            reads = list(_reads(store, {name: names[name] for name in files[0]}, files[1]))
            total = sum(read.nbytes for read in reads)
            weights = without_drafts(info, self._streamed(reads))
            model.load_weights(with_progress(weights, total, quiet=build.rank != 0))
        return model

    def _streamed(self, reads: list[Read]) -> Weights:
        return streamed(reads, self.settings.num_threads)

    def _restore(
        self, model: object, store: Store, names: dict[str, int], wanted: dict[str, Any]
    ) -> None:
        """Fill in what this rank saved."""
        rank = wanted["rank"]
        if DEFAULT_PATTERN.format(rank=rank, part=0) not in names:
            raise LoadError(f"rank {rank} is not there: the model was saved for fewer ranks")
        part, reads = 0, list[Read]()
        first: dict[str, Any] = {}
        while (name := DEFAULT_PATTERN.format(rank=rank, part=part)) in names:
            entries, metadata = _header(store, name, names[name])
            first = first or state_from(metadata, name)
            reads += [_range(store, name, entry) for entry in entries]
            part += 1
        check_layout(first.get("layout"), wanted, DEFAULT_PATTERN.format(rank=rank, part=0))
        fill(model, first.get("places"), by_name(self._streamed(reads)), "the saved state")


def save_remote(model: object, info: ModelInfo, build: Build, url: str) -> list[str]:
    """Put what this rank holds into the store at `url`; returns the names of the files.

    Raises:
        LoadError: it cannot be written. BadRequest: unknown scheme.
    """
    store, names = open_store(url), []
    with tempfile.TemporaryDirectory(prefix="headrace-save-") as folder:
        path = Path(folder) / "file"

        def put(name: str) -> None:
            store.put(name, path)
            path.unlink()
            names.append(name)

        for part, (blobs, metadata) in enumerate(state_parts(model, info, build, _PART_BYTES)):
            write_blobs(path, blobs, metadata)
            put(DEFAULT_PATTERN.format(rank=build.rank, part=part))
        if build.rank == 0:
            for name, content in files_beside(info).items():
                path.write_bytes(content)
                put(name)
    return names


def _weight_files(
    names: dict[str, int], folder: Path, url: str
) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint, and its index if it has one."""
    if INDEX in names:
        index = read_index(folder / INDEX)
        files = sorted(set(index.values()))
        for name in files:
            if name not in names:
                raise LoadError(f"{url}/{INDEX} names {name}, which does not exist")
        return files, index
    files = sorted(n for n in names if n.endswith(".safetensors") and is_weights(n, SAFETENSORS))
    if not files:
        raise LoadError(f"{url} has no *.safetensors files")
    return files, None


def _reads(store: Store, sizes: dict[str, int], index: dict[str, str] | None) -> Iterator[Read]:
    for name, size in sizes.items():
        for entry in _header(store, name, size)[0]:
            if index is None or index.get(entry.name, name) == name:
                yield _range(store, name, entry)


def _header(store: Store, name: str, size: int) -> tuple[list[Entry], dict[str, str]]:
    def read(begin: int, end: int) -> bytes:
        return _exactly(store, name, begin, end)

    return parse_header(name, size, read)


def _exactly(store: Store, name: str, begin: int, end: int) -> bytes:
    content = store.read(name, begin, end)
    if len(content) != end - begin:
        raise LoadError(f"{name}: bytes {begin} to {end} are not there: it is cut off")
    return content


def _range(store: Store, name: str, entry: Entry) -> Read:
    def get() -> Tensor:
        if entry.begin == entry.end:
            return torch.empty(entry.shape, dtype=entry.dtype)
        content = bytearray(_exactly(store, name, entry.begin, entry.end))
        return as_tensor(torch.frombuffer(content, dtype=torch.uint8), entry)

    return Read(entry.name, entry.end - entry.begin, get)
