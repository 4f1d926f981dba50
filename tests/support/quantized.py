"""Quantized checkpoints: matrices stored by the compressors of compressed-tensors or by hand.

Each function rewrites the checkpoint in a folder and gives the dequantized values back, by the
names of the checkpoint, as the one who wrote it defines them.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

Stored = tuple[dict[str, Tensor], Tensor]
"""Tensors by suffix, and the values that they stand for."""

PROJECTIONS = r".*(self_attn|mlp|experts\.\d+|block_sparse_moe\.experts\.\d+)\.(\w+_proj|w[123])"


def rewrite(
    folder: Path,
    config: dict[str, Any],
    store: Callable[[str, Tensor], Stored | None],
    modules: str = PROJECTIONS,
) -> dict[str, Tensor]:
    """Store every module that matches; `store` gives None for those that stay."""
    path = folder / "model.safetensors"
    tensors, values = {}, {}
    for name, tensor in load_file(path).items():
        module, _, suffix = name.rpartition(".")
        fits = suffix == "weight" and re.fullmatch(modules, module)
        found = store(module, tensor) if fits else None
        if found is None:
            tensors[name] = values[name] = tensor
            continue
        tensors |= {f"{module}.{key}": value.contiguous() for key, value in found[0].items()}
        values[name] = found[1].float().contiguous()
    save_file(tensors, path, metadata={"format": "pt"})
    edit_config(folder, quantization_config=config)
    return values


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def oracle_of(folder: Path, values: dict[str, Tensor]) -> transformers.PreTrainedModel:
    """transformers' model of the same checkpoint with these values."""
    plain = folder / "plain"
    plain.mkdir()
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config")
    (plain / "config.json").write_text(json.dumps(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        plain, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def compressed(weights: dict[str, Any], format: str, *, scale: torch.dtype = torch.float32) -> Any:
    """A `store` by a compressor of compressed-tensors, with scales of the largest values."""
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(format)

    def store(module: str, weight: Tensor) -> Stored:
        low, high = scale_range(weight, args)
        scales, zeros = calculate_qparams(low, high, args)
        state = {"weight": weight, "weight_scale": scales.to(scale), "weight_zero_point": zeros}
        small = compressor.compress(state, scheme)
        # Decompressed in the type of the scales, which may round.
        exact = small | {"weight_scale": small["weight_scale"].float()}
        return small, compressor.decompress(exact, scheme)["weight"]

    return store


def scale_range(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest of what shares a scale."""
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "group":
        groups = weight.unflatten(1, (-1, args.group_size))
        return groups.amin(2), groups.amax(2)
    blocks = in_blocks(weight, *args.block_structure)
    return blocks.amin((1, 3)), blocks.amax((1, 3))


def compressed_config(weights: dict[str, Any], format: str, **fields: Any) -> dict[str, Any]:
    """`quantization_config` as compressed-tensors writes it."""
    from compressed_tensors.quantization import QuantizationConfig

    group = {"targets": ["Linear"], "weights": weights}
    config = QuantizationConfig(
        config_groups={"group_0": group}, format=format, **{"ignore": ["lm_head"]} | fields
    )
    found: dict[str, Any] = json.loads(config.model_dump_json())
    return found


def in_blocks(weight: Tensor, high: int, wide: int) -> Tensor:
    """[rows, columns] -> [row blocks, high, column blocks, wide], padded with zeros."""
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % wide, 0, -rows % high))
    return padded.view(-(-rows // high), high, -(-columns // wide), wide)


def fp8_blocks(high: int = 128, wide: int = 128) -> Callable[[str, Tensor], Stored]:
    """As DeepSeek-V3 and Qwen3-FP8: e4m3 and `weight_scale_inv` of each block."""

    def store(module: str, weight: Tensor) -> Stored:
        blocks = in_blocks(weight, high, wide)
        scales = blocks.abs().amax((1, 3)) / 448
        small = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        rows, columns = weight.shape

        def matrix(four: Tensor) -> Tensor:
            return four.reshape(four.shape[0] * high, -1)[:rows, :columns].contiguous()

        values = matrix(small.float() * scales[:, None, :, None])
        return {"weight": matrix(small.float()).to(small.dtype), "weight_scale_inv": scales}, values

    return store


def fp8_tensor(static: bool = False) -> Callable[[str, Tensor], Stored]:
    """As vLLM and AutoFP8: e4m3 and one `weight_scale`."""

    def store(module: str, weight: Tensor) -> Stored:
        scale = weight.abs().max() / 448
        small = (weight / scale).to(torch.float8_e4m3fn)
        found = {"weight": small, "weight_scale": scale}
        if static:
            found["input_scale"] = torch.tensor(0.02)
        return found, small.float() * scale

    return store


def spoil(folder: Path, name: str, change: Callable[[Tensor], Tensor | None]) -> None:
    """Change a stored tensor; None takes it away."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))
    tensors |= {} if changed is None else {name: changed}
    save_file(tensors, folder / "model.safetensors")
