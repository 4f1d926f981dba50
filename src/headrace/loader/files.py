"""Finds a checkpoint: a local folder or a hub id, and the weight files in it. No torch.

A local folder never touches the network. File names that come out of an index are checked: they
must be plain names of files in the same folder.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from headrace.core.errors import LoadError

INDEX = "model.safetensors.index.json"

_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "tokenizer*", "*.tiktoken"]
_UNWANTED = ["consolidated*", "original/*", "onnx/*", "openvino*", "adapter_*", "training_args*"]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")


@dataclass(frozen=True)
class WeightFiles:
    """`paths`: files to read. `index`: tensor name -> file name, if the checkpoint has an index."""

    paths: tuple[Path, ...]
    index: dict[str, str] | None = None

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.paths)

    def wants(self, name: str, path: Path) -> bool:
        """Whether tensor `name` is to be read from `path`, not from another file."""
        return self.index is None or self.index.get(name, path.name) == path.name


def resolve_model_path(path: str, revision: str = "", download_dir: str = "") -> Path:
    """A local folder as it is, or a hub id downloaded (weights, config and tokenizer only).

    Raises:
        LoadError: neither a folder nor a hub id, or the download failed.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_file() and local.suffix == ".gguf":
        from headrace.loader.gguf_folder import model_folder

        return model_folder(local)
    if local.exists():
        raise LoadError(
            f"{path} is a file; give the folder that holds config.json, or a .gguf file"
        )
    if not _HUB_ID.fullmatch(path):
        raise LoadError(f"{path} is neither a folder nor a hub id (owner/name)")
    return _download(path, revision, download_dir)


def _download(repo: str, revision: str, download_dir: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            revision=revision or None,
            cache_dir=download_dir or None,
            allow_patterns=_WANTED,
            ignore_patterns=_UNWANTED,
        )
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise LoadError(
            f"{repo} is no local folder, and getting it from the hub failed: {error}"
        ) from error
    return Path(folder)


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors files of a checkpoint, without duplicates of the same weights.

    Raises:
        LoadError: there are none, or the index names one that is not there.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    paths = sorted(path for path in folder.glob("*.safetensors") if not _is_duplicate(path.name))
    if not paths:
        other = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.gguf")
        )
        found = f"; it has {other[0]}, a format that is not supported" if other else ""
        raise LoadError(f"{folder} has no *.safetensors files{found}")
    return WeightFiles(tuple(paths))


def _is_duplicate(name: str) -> bool:
    """Mistral's own layout next to the usual one, and adapters, are not the model."""
    return name.startswith(("consolidated", "adapter_"))


def _indexed(folder: Path) -> WeightFiles:
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{path} is no weight index: {error!r}") from error
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise LoadError(f"{path}: weight_map must map tensor names to file names")
    names = sorted(set(index.values()))
    for name in names:
        if Path(name).name != name:
            raise LoadError(f"{path} names {name!r}, which is not a plain file name")
        if not (folder / name).is_file():
            raise LoadError(f"{path} names {name}, which does not exist")
    if not names:
        raise LoadError(f"{path} names no files")
    return WeightFiles(tuple(folder / name for name in names), index)
