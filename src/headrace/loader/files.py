"""Finds a checkpoint: a local folder, a hub id or a URL, and the weight files in it. No torch.

A local folder never touches the network. File names that come out of an index are checked: they
must be plain names of files in the same folder.
"""

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from headrace.core.errors import LoadError

INDEX = "model.safetensors.index.json"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+|[\w.-]+")
# What trainers leave beside the weights, and what is not the model itself.
_NEEDLESS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "adapter_")
_CONSOLIDATED = "consolidated"
_LONGEST = 255  # bytes of a file name


@dataclass(frozen=True)
class Kind:
    """How the files of one form are named: the first of `patterns` that fits, unless an index does
    name them. `hint`: what to do where there are none."""

    patterns: tuple[str, ...]
    index: str
    hint: str = ""


SAFETENSORS = Kind(
    ("*.safetensors",), INDEX, "--load-format pt reads it; headrace convert-weights converts it"
)
TORCH = Kind(("*.bin", "*.pt"), "pytorch_model.bin.index.json", "--load-format auto reads it")
MISTRAL = Kind(
    (f"{_CONSOLIDATED}*.safetensors",),
    "consolidated.safetensors.index.json",
    "--load-format auto or pt may read it",
)
_KINDS = {"pt": TORCH, "npcache": TORCH, "mistral": MISTRAL}


def kind_of(load_format: str) -> Kind:
    """The files that a --load-format reads."""
    return _KINDS.get(load_format, SAFETENSORS)


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


def resolve_model_path(
    path: str, revision: str = "", download_dir: str = "", load_format: str = "auto"
) -> Path:
    """A local folder as it is; what else `path` may name as a folder with a config.json.

    That is a .gguf file, a folder in Mistral's own form, a URL of format remote, or a hub id, which
    is downloaded: what `load_format` reads, config and tokenizer only.

    Raises:
        LoadError: none of these, or the download failed.
    """
    if "://" in path:
        from headrace.loader.remote_folder import model_folder as remote_folder

        return remote_folder(path)
    local = Path(path).expanduser()
    if local.is_file() and local.suffix == ".gguf":
        from headrace.loader.gguf_folder import model_folder

        return model_folder(local)
    if local.exists() and not local.is_dir():
        raise LoadError(
            f"{path} is a file; give the folder that holds config.json, or a .gguf file"
        )
    if not local.exists():
        if not _HUB_ID.fullmatch(path):
            raise LoadError(f"{path} is neither a folder nor a hub id (owner/name)")
        from headrace.loader.hub import download

        local = download(path, revision, download_dir, load_format)
    native = not (local / "config.json").exists() and (local / "params.json").exists()
    if load_format == "mistral" or (load_format == "auto" and native):
        from headrace.loader.mistral_folder import model_folder as mistral_folder

        return mistral_folder(local)
    return local


def weight_files(folder: Path, kind: Kind = SAFETENSORS) -> WeightFiles:
    """The files of a checkpoint, without duplicates of the same weights: the index decides.

    Raises:
        LoadError: there are none, or the index names one that is not there.
    """
    if (folder / kind.index).is_file():
        return _indexed(folder, kind)
    for pattern in kind.patterns:
        paths = sorted(path for path in folder.glob(pattern) if is_weights(path.name, kind))
        if paths:
            return WeightFiles(tuple(paths))
    other = [
        name
        for pattern in (*TORCH.patterns, *SAFETENSORS.patterns)
        for name in sorted(path.name for path in folder.glob(pattern))
        if not name.startswith(_NEEDLESS)
    ]
    found = f"; it has {other[0]}: {kind.hint}" if other else ""
    raise LoadError(f"{folder} has no {' or '.join(kind.patterns)} files{found}")


def is_weights(name: str, kind: Kind) -> bool:
    """Whether a file that fits a pattern of `kind` is part of the model itself."""
    if name.startswith(_NEEDLESS):
        return False
    return kind is MISTRAL or not name.startswith(_CONSOLIDATED)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> plain file name.

    Raises:
        LoadError: it is none.
    """
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoadError(f"{path} is no weight index: {error!r}") from error
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise LoadError(f"{path}: weight_map must map tensor names to file names")
    for name in sorted(set(index.values())):
        if Path(name).name != name or len(name.encode("utf-8", "replace")) > _LONGEST:
            raise LoadError(f"{path} names {name[:100]!r}, which is not a plain file name")
    if not index:
        raise LoadError(f"{path} names no files")
    return index


def _indexed(folder: Path, kind: Kind) -> WeightFiles:
    index = read_index(folder / kind.index)
    names = sorted(set(index.values()))
    for name in names:
        # An index of one kind is not to bring files of the other, which may hold programs.
        if not any(fnmatchcase(name, pattern) for pattern in kind.patterns):
            raise LoadError(
                f"{folder / kind.index} names {name}, which is no {' or '.join(kind.patterns)} file"
            )
        if not (folder / name).is_file():
            raise LoadError(f"{folder / kind.index} names {name}, which does not exist")
    return WeightFiles(tuple(folder / name for name in names), index)
