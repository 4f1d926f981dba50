"""Quantized checkpoints that are wrong or of a kind that is not read: errors name the place."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.models import Model
from tests.cpu.test_quantized_checkpoints import CASES, FP8, SIZES, load
from tests.support.checkpoints import make_case
from tests.support.quantized import edit_config, rewrite, spoil

Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("case", "suffix", "change", "message"),
    [
        ("fp8 blocks", "weight_scale_inv", lambda t: t * torch.nan, "no finite number"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t * 0, "not positive"),
        ("fp8 blocks", "weight_scale_inv", lambda t: -t, "not positive"),
        ("fp8 blocks", "weight_scale_inv", lambda t: t.repeat(2, 1), "has shape (2, 1)"),
        ("fp8 blocks", "weight_scale_inv", lambda t: None, "missing tensor"),
        ("fp8 blocks", "weight", lambda t: t.float(), "dtype float32, not float8_e4m3fn"),
        (
            "fp8 blocks",
            "weight",
            lambda t: torch.full_like(t.view(torch.uint8), 0x7F).view(t.dtype),
            "not a number",
        ),
        ("w4a16", "weight_packed", lambda t: t[:, 1:].contiguous(), "has shape (64, 7)"),
        ("w4a16", "weight_scale", lambda t: t * torch.inf, "no finite number"),
        ("w4 plain", "weight", lambda t: t + 9, "an int4 value is"),
        ("w4a16 zero points", "weight_zero_point", lambda t: None, "missing tensor"),
        ("w8a8", "weight_scale", lambda t: t[1:].contiguous(), "has shape (63, 1)"),
    ],
)
def test_wrong_tensors_are_named(
    tmp_path: Path, case: str, suffix: str, change: Any, message: str
) -> None:
    config, store, _ = CASES[case]
    make_case(tmp_path, "llama", **SIZES)
    rewrite(tmp_path, config, store)
    spoil(tmp_path, f"{Q}.{suffix}", change)
    with pytest.raises(LoadError, match=re.escape(message)) as raised:
        load(tmp_path)
    assert "q_proj" in raised.value.message


_GROUP = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 32}}


def _with_group(**weights: Any) -> dict[str, Any]:
    group = _GROUP | {"weights": _GROUP["weights"] | weights, "format": "pack-quantized"}
    return {"quant_method": "compressed-tensors", "config_groups": {"g": group}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "magic"}, "quant_method='magic'"),
        ({}, None),
        (3, "quantization_config must be an object"),
        (FP8 | {"activation_scheme": "odd"}, "activation_scheme must be"),
        (FP8 | {"weight_block_size": [128]}, "weight_block_size must be"),
        (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list"),
        ({"quant_method": "compressed-tensors"}, "config_groups must be an object"),
        (_with_group(num_bits=3), "weights.num_bits is 3"),
        (_with_group(strategy="tensor_group"), "weights.strategy is 'tensor_group'"),
        (_with_group(group_size=0), "weights.group_size is"),
        (_with_group(group_size=48), "not whole groups of 48"),
        (_with_group(type="float"), "stores type 'float' as 'pack-quantized'"),
        (_with_group() | {"ignore": ["re:("]}, "ignore has a pattern"),
        (_with_group() | {"sparsity_config": {"format": "sparse-24"}}, "sparsity_config.format"),
        (_with_group() | {"transform_config": {"config_groups": {"a": {}}}}, "transform_config"),
    ],
)
def test_wrong_configurations_are_named(tmp_path: Path, config: Any, message: str | None) -> None:
    make_case(tmp_path, "llama", **SIZES)
    edit_config(tmp_path, quantization_config=config)
    if message is None:
        load(tmp_path)
        return
    with pytest.raises(LoadError, match=re.escape(message)):
        load(tmp_path)


def test_the_option_and_the_checkpoint_agree(tmp_path: Path) -> None:
    make_case(tmp_path, "llama", **SIZES)

    def load_as(asked: str) -> Model:
        info = read_model_info(tmp_path)
        return load_model(info, torch.float32, SoloGroup(), quantization=asked)

    with pytest.raises(LoadError, match="gptq needs a checkpoint that is stored so"):
        load_as("gptq")
    rewrite(tmp_path, *CASES["fp8 tensor"][:2])
    load_as("fp8")
    for asked in ("int8", "gptq"):
        with pytest.raises(LoadError, match=f"{asked} was asked for, .* quantized with fp8"):
            load_as(asked)


def test_torchao_kinds_without_a_reader_are_named(tmp_path: Path) -> None:
    make_case(tmp_path, "llama", **SIZES)
    kind = {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}}}
    edit_config(tmp_path, quantization_config={"quant_method": "torchao", "quant_type": kind})
    with pytest.raises(LoadError, match=r"Int4WeightOnlyConfig .* is not supported"):
        load(tmp_path)


def test_made_up_weights_are_floats(tmp_path: Path) -> None:
    make_case(tmp_path, "llama", **SIZES)
    edit_config(tmp_path, quantization_config=FP8)
    with pytest.raises(LoadError, match="json-model-override-args"):
        load_model(read_model_info(tmp_path), torch.float32, SoloGroup(), "dummy")
    info = read_model_info(tmp_path, {"quantization_config": None})
    load_model(info, torch.float32, SoloGroup(), "dummy")
