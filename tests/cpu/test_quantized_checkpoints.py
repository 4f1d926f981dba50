"""Checkpoints that are quantized already: the values that their tools define, and their logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import ops
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.dist.topology import Cut
from headrace.layers.linear import ColumnLinear, RowLinear
from headrace.loader import load_model
from headrace.models import Model
from tests.cpu.test_models_parity import expected, random_ids
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.quantized import (
    compressed,
    compressed_config,
    fp8_blocks,
    fp8_tensor,
    oracle_of,
    rewrite,
)
from tests.support.threads import run_ranks

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _ct(format: str, scale: torch.dtype = torch.float32, **weights: Any) -> tuple[Any, Any]:
    return compressed_config(weights, format), compressed(weights, format, scale=scale)


_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
_FLOAT = {"num_bits": 8, "type": "float"}
# name -> configuration, what stores a matrix, format in which kernels multiply it
CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "fp8 blocks": (_FP8 | {"weight_block_size": [128, 128]}, fp8_blocks(), "fp8"),
    "fp8 small blocks": (_FP8 | {"weight_block_size": [16, 16]}, fp8_blocks(16, 16), "float32"),
    "fp8 tensor": (_FP8, fp8_tensor(), "fp8"),
    "fp8 static": (_FP8 | {"activation_scheme": "static"}, fp8_tensor(static=True), "fp8"),
    "w8a8": (*_ct("int-quantized", strategy="channel"), "int8"),
    "w8a8 tensor": (*_ct("int-quantized", strategy="tensor"), "int8"),
    "w8a16": (*_ct("pack-quantized", strategy="channel"), "int8"),
    "w8a16 groups": (*_ct("pack-quantized", **_INT4 | {"num_bits": 8}), "float32"),
    "w8 zero points": (*_ct("int-quantized", strategy="channel", symmetric=False), "float32"),
    "w4a16": (*_ct("pack-quantized", **_INT4), "int4"),
    "w4a16 bf16": (*_ct("pack-quantized", torch.bfloat16, **_INT4), "int4"),
    "w4a16 zero points": (*_ct("pack-quantized", **_INT4, symmetric=False), "int4"),
    "w4a16 outputs": (*_ct("pack-quantized", num_bits=4, strategy="channel"), "int4"),
    "w4 plain": (*_ct("naive-quantized", **_INT4), "int4"),
    "w2": (*_ct("pack-quantized", **_INT4 | {"num_bits": 2}), "int4"),
    "float tensor": (*_ct("float-quantized", **_FLOAT, strategy="tensor"), "fp8"),
    "float outputs": (*_ct("float-quantized", **_FLOAT, strategy="channel"), "fp8"),
    "float blocks": (
        *_ct("float-quantized", **_FLOAT, strategy="block", block_structure=[128, 128]),
        "fp8",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, group: Any = None) -> Model:
    return load_model(read_model_info(folder), torch.float32, group or SoloGroup())


def difference(model: Model, oracle: Any, ids: list[int]) -> float:
    ours, theirs = run_all(model, [ids])[0].log_softmax(-1), expected(oracle, ids).log_softmax(-1)
    return float((ours - theirs).abs().max())


def quantize_inputs(oracle: Any, group: int | None) -> None:
    """Let linear layers see x as the int8 and int4 kernels do: int8 by token, and by group."""

    def rounded(module: Any, inputs: tuple[Tensor]) -> Tensor:
        width = inputs[0].shape[-1]
        x = inputs[0].unflatten(-1, (-1, min(group or width, width)))
        scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
        return ((x / scale).round() * scale).flatten(-2)

    for layer in oracle.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_pre_hook(rounded)


def linears(model: Any) -> dict[str, ColumnLinear | RowLinear]:
    found = {}
    for index, layer in enumerate(model.layers):
        at = f"model.layers.{index}."
        found |= {f"{at}self_attn.": layer.attention.qkv, f"{at}self_attn.o": layer.attention.out}
        found |= {f"{at}mlp.": layer.mlp.up, f"{at}mlp.down": layer.mlp.down}
    return found


def local(values: Tensor, rows: Cut, columns: Cut) -> Tensor:
    found = torch.zeros(rows.local, columns.local)
    for row in rows.spans:
        for column in columns.spans:
            part = values.narrow(0, row.source, row.count).narrow(1, column.source, column.count)
            place = found.narrow(0, row.target, row.count)
            place.narrow(1, column.target, column.count).copy_(part)
    return found


def check_values(model: Model, values: dict[str, Tensor], format: str | None) -> None:
    """Every linear layer holds this rank's part of the values."""
    for at, linear in linears(model).items():
        prefix = at.rpartition(".")[0]
        whole = [
            local(values[f"{prefix}.{part.name}.weight"], part.rows, linear.shape.columns)
            for part in linear.shape.parts
        ]
        packed = linear.weights["packed"]
        assert format in (packed.format, None), (at, packed.format)
        ours = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
        torch.testing.assert_close(ours, torch.cat(whole), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_means_what_its_tool_says(tmp_path: Path, case: str) -> None:
    config, store, format = CASES[case]
    make_case(tmp_path, "llama", **_SIZES)
    values = rewrite(tmp_path, config, store)
    model = load(tmp_path)
    check_values(model, values, format)
    oracle = oracle_of(tmp_path, values)
    limit = 1e-4
    if format in ("int8", "int4"):
        quantize_inputs(oracle, linears(model)["model.layers.0.mlp."].weights["packed"].group)
        limit = 0.02  # a number of x halfway between two steps may fall to either side
    assert difference(model, oracle, random_ids(30)[0]) < limit
    for ranks in (2, 3):
        for one in run_ranks(ranks, lambda group: load(tmp_path, group)):
            check_values(one, values, None)


MOE = {"hidden_size": 64, "num_hidden_layers": 2, "num_experts_per_tok": 2}
EXPERTS = {
    "qwen3-moe": MOE | {"num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1},
    "mixtral": MOE | {"num_local_experts": 4, "intermediate_size": 64},
}


@pytest.mark.parametrize("case", ["fp8 blocks", "w4a16", "w8a8"])
@pytest.mark.parametrize("family", EXPERTS)
def test_experts(tmp_path: Path, family: str, case: str) -> None:
    config, store, format = CASES[case]
    make_case(tmp_path, family, **EXPERTS[family])
    ignored = ["lm_head", "re:.*gate$"] if "config_groups" in config else None
    values = rewrite(tmp_path, config | ({"ignore": ignored} if ignored else {}), store)
    model = load(tmp_path)
    assert check_experts(model, values) == {format}
    if format == "fp8":  # others round x, and may so choose another expert
        assert difference(model, oracle_of(tmp_path, values), random_ids(30)[0]) < 1e-4
    for one in run_ranks(2, lambda group: load(tmp_path, group)):
        check_experts(one, values)


def check_experts(model: Any, values: dict[str, Tensor]) -> set[str]:
    """All matrices of experts hold what those of the checkpoint stand for; their formats."""
    rename = model.spec.layout.rename
    expected = {rename(name): value for name, value in values.items()}
    found = set()
    for index, layer in enumerate(model.layers):
        experts = layer.mlp.experts
        for name, shape in experts.shapes.items():
            packed = experts.weights[name]["packed"]
            ours = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
            whole = expected[f"model.layers.{index}.mlp.experts.{name}.weight"]
            theirs = local(whole, shape.parts[0].rows, shape.columns)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            found.add(packed.format)
    return found
