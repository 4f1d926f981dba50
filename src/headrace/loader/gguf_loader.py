"""Weights from a GGUF file: kept as the blocks they are, or widened while they are read."""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import ModelInfo
from headrace.layers.build import Build
from headrace.loader.base import BaseModelLoader, logged_load
from headrace.loader.gguf import GgufFile, GgufTensor
from headrace.loader.gguf_blocks import BLOCKS
from headrace.loader.gguf_config import family_of, single_names, usual_name, usual_values
from headrace.loader.gguf_families import Family
from headrace.loader.gguf_folder import GGUF_KEY
from headrace.models import Model, make_model
from headrace.ops.packed import Quantized
from headrace.quant.gguf import FromGguf, GgufBlocks

_VIEWS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ELSEWHERE = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""In config.json."""
_HALVES = {
    "ffn_gate_exps.bias": ("ffn_up_exps.bias", "experts.gate_up_proj_bias"),
    "attn_k_b.weight": ("attn_v_b.weight", "attn_kv_b.weight"),
}
"""The first half of what is one tensor here, the second, and the whole."""
_WIDE = re.compile(r"^position_embd\.|\.attn_[kv]_b\.")
"""Whose blocks no kernel multiplies."""


class GgufModelLoader(BaseModelLoader):
    """Format gguf; auto where --model-path is a GGUF file."""

    def load_model(self, info: ModelInfo, build: Build) -> Model:
        kept = build.quant.name == "gguf"
        with logged_load(info, build):
            model = make_model(info, build)
            model.load_weights(gguf_weights(_file_of(info), info, kept))
        return model


def _file_of(info: ModelInfo) -> GgufFile:
    path = info.hf.get(GGUF_KEY)
    if not isinstance(path, str):
        raise LoadError(f"{info.path} is no GGUF file", field="load_format")
    return GgufFile(Path(path))


def gguf_quantization(info: ModelInfo) -> FromGguf:
    """How the matrices of a file are stored."""
    file = _file_of(info)
    family = family_of(file)
    storages = {
        name.removesuffix(".weight"): _storage(tensor.kind)
        for tensor in file
        if _is_blocks(tensor)
        for name in single_names(usual_name(family, tensor.name), tensor.shape)
    }
    wide: torch.dtype = getattr(torch, info.dtype)
    return FromGguf(storages, wide)


def _is_blocks(tensor: GgufTensor) -> bool:
    several = tensor.kind not in _VIEWS and len(tensor.shape) in (2, 3)
    return several and not _WIDE.search(tensor.name)


def _storage(kind: str) -> GgufBlocks:
    block = BLOCKS[kind]
    return GgufBlocks(f"GGUF {kind}", block.size, block.bytes, partial(_matrix, kind))


def gguf_weights(file: GgufFile, info: ModelInfo, kept: bool) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by the name that checkpoints give it; views of the file where they can be.

    What is not floats is widened, or, if it is `kept`, comes as its bytes under the name `blocks`.
    """
    family, halves = family_of(file), _halves(file)
    seconds = {second.name for second, _ in halves.values()}
    for tensor in file:
        if tensor.name in _ELSEWHERE or tensor.name in seconds or _after_last(tensor.name, info):
            continue
        try:
            if tensor.name in halves:
                second, whole = halves[tensor.name]
                joined = _joined(_values(file, tensor, False), _values(file, second, False))
                found = [(usual_name(family, whole), joined)]
            else:
                found = _usual(family, file, tensor, info, kept)
        except (RuntimeError, ValueError) as error:
            raise LoadError(
                f"{file.path}: tensor {tensor.name} with shape {tensor.shape} cannot be: {error}"
            ) from error
        yield from found


def _usual(
    family: Family, file: GgufFile, tensor: GgufTensor, info: ModelInfo, kept: bool
) -> list[tuple[str, Tensor]]:
    """A tensor as checkpoints have it; stacked experts one by one."""
    name = usual_name(family, tensor.name)
    values = _values(file, tensor, kept)
    usual = usual_values(family, name, values, info.hf)
    if values.dtype == torch.uint8:
        name = f"{name.removesuffix('weight')}blocks"
    ones = usual if usual.dim() == 3 else [usual]
    return list(zip(single_names(name, tensor.shape), ones, strict=True))


def _values(file: GgufFile, tensor: GgufTensor, kept: bool) -> Tensor:
    """Floats, or the bytes of blocks that are `kept`; ValueError for what is no number."""
    dtype, raw = _VIEWS.get(tensor.kind), file.bytes_of(tensor)
    if not raw.size:
        raise ValueError("it is empty")
    if dtype is not None:
        aligned = raw.copy() if tensor.begin % dtype.itemsize else raw
        return torch.frombuffer(aligned, dtype=dtype).view(tensor.shape)
    if kept and _is_blocks(tensor):
        return torch.frombuffer(raw, dtype=torch.uint8).view(*tensor.shape[:-1], -1)
    values = torch.from_numpy(file.values(tensor))
    if not bool(torch.isfinite(values).all()):
        raise ValueError("a scale is no finite number")
    return values


def _after_last(name: str, info: ModelInfo) -> bool:
    """Whether it is of the layers behind the last, which predict more tokens at once (MTP)."""
    found = re.match(r"blk\.(\d+)\.", name)
    return found is not None and int(found[1]) >= info.num_layers


def _halves(file: GgufFile) -> dict[str, tuple[GgufTensor, str]]:
    """Each first half's second, and the name of both together; an error if there is no second."""
    found = {}
    for name in file.tensors:
        for first, (second, whole) in _HALVES.items():
            if not name.endswith(f".{first}"):
                continue
            layer = name.removesuffix(first)
            if layer + second not in file.tensors:
                raise LoadError(f"{file.path}: tensor {name} is there without {layer}{second}")
            found[name] = file.tensors[layer + second], layer + whole
    return found


def _joined(one: Tensor, other: Tensor) -> Tensor:
    """An expert's gate and up biases; or a head's keys, turned back, and values."""
    if one.dim() == 2:
        return torch.cat([one, other], dim=1)
    return torch.cat([one.float().transpose(1, 2), other.float()], dim=1).flatten(0, 1)


def _matrix(kind: str, raw: Tensor) -> Quantized:
    """Rows of blocks, uint8 [rows, bytes], for kernels."""
    parts, rows = BLOCKS[kind].parts(raw.contiguous().numpy()), len(raw)
    values = torch.from_numpy(parts.values).reshape(rows, -1)
    scales = torch.from_numpy(parts.scales).reshape(rows, -1)
    mins = None if parts.mins is None else torch.from_numpy(parts.mins).reshape(rows, -1)
    for numbers in (scales, mins):
        if numbers is not None and not bool(torch.isfinite(numbers).all()):
            raise ValueError("a scale is no finite number")
    group = values.shape[1] // scales.shape[1]
    if parts.table == "mxfp4":  # its table has twice the values
        return Quantized("mxfp4", values, 2 * scales, group)
    if parts.table:
        return Quantized(parts.table, values, scales, group)
    if parts.bits == 8:
        return Quantized("int8", values.to(torch.int8), scales, group, mins)
    if mins is None:
        values = (values + 8).to(torch.uint8)
    return Quantized("int4", values, scales, group, mins)
