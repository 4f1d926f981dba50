"""From .bin files to safetensors: the same names, shapes and bits, without programs in the file."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.loader.files import INDEX, TORCH, weight_files
from headrace.loader.safetensors import iterate_tensors
from headrace.loader.torch_file import read_torch_file

_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken")


def convert_folder(folder: Path, target: Path) -> list[Path]:
    """Write the weights of `folder` and what belongs to them to `target`; returns the new files.

    Raises:
        LoadError: there is nothing to convert, `target` has weights, or it cannot be written.
    """
    files = weight_files(folder, TORCH)
    if any(target.glob("*.safetensors")):
        raise LoadError(f"{target} has *.safetensors files already")
    index: dict[str, str] = {}
    try:
        target.mkdir(parents=True, exist_ok=True)
        for path in files.paths:
            name = path.stem.replace("pytorch_model", "model") + ".safetensors"
            for tensor in convert_bin_to_safetensors(path, target / name):
                index.setdefault(tensor, name)
        if len(files.paths) > 1:
            (target / INDEX).write_text(json.dumps({"weight_map": index}), encoding="utf-8")
        if target.resolve() != folder.resolve():
            for pattern in _BESIDE:
                for path in folder.glob(pattern):
                    if not path.name.endswith(".index.json"):
                        shutil.copyfile(path, target / path.name)
    except OSError as error:
        raise LoadError(f"{target} cannot be written: {error}") from error
    return sorted(target.glob("*.safetensors"))


def convert_bin_to_safetensors(source: Path, target: Path) -> list[str]:
    """Convert one file and compare what was written; returns the names of its tensors.

    Tensors that share memory are written once each.

    Raises:
        LoadError: `source` is no file of weights, or what was written differs.
    """
    tensors = read_torch_file(source)
    fresh = target.with_suffix(".tmp")
    try:
        save_file(_separate(tensors), fresh, metadata={"format": "pt"})
        for name, tensor in iterate_tensors(fresh):
            if tensor.dtype != tensors[name].dtype or not _same_bits(tensor, tensors[name]):
                raise LoadError(f"{target}: tensor {name} differs from that of {source}")
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)
    return list(tensors)


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        shared = storage in seen
        seen.add(storage)
        found[name] = tensor.clone() if shared else tensor.contiguous()
    return found


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    raw = (t.contiguous().view(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(*raw)
