"""Experts and latent attention: quantized in checkpoints, or from floats while they are loaded."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.layers.build import Build
from headrace.loader import load_model
from headrace.models import make_model
from headrace.models.decoder import Decoder
from headrace.quant import quantization_of
from headrace.runner.pool import KvPool
from tests.cpu.test_models_parity import random_ids
from tests.cpu.test_quantized_checkpoints import CASES, EXPERTS, difference, shuffled
from tests.cpu.test_quantized_integers import DATA, values
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.quantized import compressed_config, edit_config, oracle_of, rewrite, spoil
from tests.support.threads import run_ranks

LATENT = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "attention_bias": False,
}
LATENT_MODULES = r".*(self_attn|mlp|experts\.\d+|shared_experts)\.\w+(_proj|_mqa)"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, group: Group | None = None, **options: Any) -> Decoder:
    info = read_model_info(folder)
    model = load_model(info, torch.float32, group or SoloGroup(), **options)
    assert isinstance(model, Decoder)
    return model


def up_values(model: Any, layer: int) -> Tensor:
    """kv_b_proj of this rank, out of the matrices of its heads."""
    up = model.layers[layer].attention.up
    heads = []
    for keys, mixed in zip(up.packed("keys").heads, up.packed("values").heads, strict=True):
        wide = [
            ops.embedding_packed(torch.arange(head.out_size), head, torch.float32)
            for head in (keys, mixed)
        ]
        heads += [wide[0].T, wide[1]]
    return torch.cat(heads)


@pytest.mark.parametrize("case", ["fp8 blocks", "fp8 tensor", "w8a8", "w4a16", "act-order"])
def test_latent_attention(tmp_path: Path, case: str) -> None:
    """kv_b_proj becomes floats; everything else is kept, experts and shared ones too."""
    config, store, format = CASES.get(case) or ORDERED
    make_case(tmp_path, "deepseek-v3", **LATENT)
    names = rewrite(tmp_path, config, store, LATENT_MODULES)
    model: Any = load(tmp_path)
    for layer in (0, 1):
        expected = names[f"model.layers.{layer}.self_attn.kv_b_proj.weight"]
        torch.testing.assert_close(up_values(model, layer), expected, rtol=1e-6, atol=1e-6)
        assert model.layers[layer].attention.down.weights["packed"].format == format
    matrices = model.layers[1].mlp.experts[0].weights.values()
    assert {weights["packed"].format for weights in matrices} == {format}
    if format == "fp8":  # others round x, and may so choose another expert
        assert difference(model, oracle_of(tmp_path, names), random_ids(30)[0]) < 1e-4
    halves = [up_values(one, 1) for one in run_ranks(2, lambda group: load(tmp_path, group))]
    torch.testing.assert_close(torch.cat(halves), expected, rtol=1e-6, atol=1e-6)


_GROUPS = {"num_bits": 4, "strategy": "group", "group_size": 16}


def ordered_config() -> dict[str, Any]:
    config = compressed_config(_GROUPS, "pack-quantized", ignore=["lm_head", "re:.*gate$"])
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    return config


ORDERED = ordered_config(), shuffled(_GROUPS), "int4"


def experts_of(model: Any, layer: int) -> dict[str, Tensor]:
    """Every matrix of an expert on this rank, its inputs in the model's order."""
    (experts,) = model.layers[layer].mlp.experts
    return {name: values(weights) for name, weights in experts.weights.items()}


def test_experts_in_the_order_of_activations(tmp_path: Path) -> None:
    """Each matrix takes the inputs in an order of its own, and stays in 4 bits."""
    config, store, _ = ORDERED
    make_case(tmp_path, "qwen3-moe", **EXPERTS["qwen3-moe"])
    names = rewrite(tmp_path, config, store)
    model, ids = load(tmp_path), random_ids(20)[0]
    for name, found in experts_of(model, 1).items():
        expected = names[f"model.layers.1.mlp.experts.{name}.weight"]
        torch.testing.assert_close(found[:, : expected.shape[1]], expected, rtol=1e-6, atol=1e-6)
        weights = model.layers[1].mlp.experts[0].weights[name]
        assert (weights["packed"].format, "order" in weights) == ("int4", True)
    alone = run_all(model, [ids])[0]
    assert torch.isfinite(alone).all()
    for one in run_ranks(2, lambda group: load(tmp_path, group)):
        for name, found in experts_of(one, 1).items():
            half = names[f"model.layers.1.mlp.experts.{name}.weight"].chunk(
                2, dim=1 if name.endswith("down_proj") else 0
            )
            same = [torch.allclose(found[:, : h.shape[1]], h, rtol=1e-6, atol=1e-6) for h in half]
            assert any(same), name


STACKED = r"experts\.gate_up_proj|\.input_linear"


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("family", ["qwen3-moe", "deepseek-v3", "granite-moe"])
def test_quantized_on_load(tmp_path: Path, family: str, quantization: str) -> None:
    """Experts too, one by one or stacked in the checkpoint; routers and kv_b_proj stay floats."""
    sizes = LATENT if family == "deepseek-v3" else EXPERTS.get(family, {"hidden_size": 64})
    oracle = make_case(tmp_path, family, **sizes)
    model: Any = load(tmp_path, quantization=quantization)
    state, last = oracle.state_dict(), len(model.layers) - 1
    layer = model.layers[last]
    assert layer.mlp.router.weights["packed"].format == "float32"
    step = {"int8": 1 / 127, "int4": 1 / 8, "fp8": 1 / 16}[quantization]
    ups = next(key for key in state if f"layers.{last}." in key and re.search(STACKED, key))
    for name, found in experts_of(model, last).items():
        assert layer.mlp.experts[0].weights[name]["packed"].format == quantization
        index, part = name.split(".")
        if part != "down_proj":
            expected = state[ups][int(index)].chunk(2)[part == "up_proj"]
            assert float((found - expected).abs().max()) < step * float(expected.abs().max())
    if family == "deepseek-v3":
        assert layer.attention.down.weights["packed"].format == quantization
        expected = state[f"model.layers.{last}.self_attn.kv_b_proj.weight"]
        torch.testing.assert_close(up_values(model, last), expected)


def test_one_expert_of_floats_at_a_time(tmp_path: Path) -> None:
    """A matrix is packed as soon as it is there, before others come."""
    make_case(tmp_path, "qwen3-moe", **EXPERTS["qwen3-moe"])
    info = read_model_info(tmp_path)
    model: Any = make_model(info, Build(torch.float32, SoloGroup(), quantization_of(info, "int8")))
    (experts,) = model.layers[0].mlp.experts
    experts.targets("")["0.up_proj.weight"].copy(torch.randn(32, 64))
    assert experts.weights["0.up_proj"]["packed"].format == "int8"
    assert "packed" not in experts.weights["1.up_proj"]


@pytest.mark.parametrize("place", ["self_attn", "self_attn.attn_mqa", "self_attn.mla_attn"])
def test_latent_caches_have_a_scale(tmp_path: Path, place: str) -> None:
    make_case(tmp_path, "deepseek-v3", **LATENT)
    ids = random_ids(30)[0]
    plain = run_all(load(tmp_path), [ids], dtype=torch.float8_e4m3fn)[0]
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.{place}.k_scale"] = torch.tensor(0.25)
        tensors[f"model.layers.{layer}.{place}.v_scale"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "model.safetensors")
    model = load(tmp_path)
    assert model.kv_scales() == [(0.25, 0.25)] * 2
    pool = KvPool(model.state_specs(), 2, 4, torch.float8_e4m3fn, model.kv_scales())
    assert {cache.key_scale for cache in pool.caches} == {0.25}
    # A power of two changes no mantissa, only where numbers become too small.
    scaled = run_all(model, [ids], dtype=torch.float8_e4m3fn)[0]
    torch.testing.assert_close(scaled, plain, rtol=0, atol=0.05)
    model.set_kv_scale(1, 2.0)
    assert model.kv_scales()[1] == (2.0, 2.0)


FILES = {"gptq-8": "quantize_config.json", "awq": "quant_config.json"}


@pytest.mark.parametrize("case", FILES)
def test_a_configuration_in_a_file_of_its_own(tmp_path: Path, case: str) -> None:
    """As AutoGPTQ and AutoAWQ wrote it: nothing in config.json, biases of zero everywhere."""
    config = json.loads((DATA / case / "config.json").read_text())
    own = config.pop("quantization_config")
    if case == "awq":
        own = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    else:
        own = {key: own[key] for key in ("bits", "group_size", "desc_act", "sym")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / FILES[case]).write_text(json.dumps(own))
    tensors = load_file(DATA / case / "model.safetensors")
    if case == "gptq-8":
        for name in list(tensors):
            if name.endswith("_proj.scales"):
                bias = torch.zeros(tensors[name].shape[1], dtype=torch.float16)
                tensors[name.replace("scales", "bias")] = bias
    save_file(tensors, tmp_path / "gptq_model-8bit-32g.safetensors")
    ids = random_ids(20)[0]
    assert torch.equal(run_all(load(tmp_path), [ids])[0], run_all(load(DATA / case), [ids])[0])


def test_a_bias_without_a_place_must_be_zero(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((DATA / "gptq-8" / "config.json").read_text())
    tensors = load_file(DATA / "gptq-8" / "model.safetensors")
    place = "model.layers.0.mlp.down_proj.bias"
    save_file(tensors | {place: torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=f"{place} is not zero"):
        load(tmp_path)
    spoil(tmp_path, place, lambda bias: bias * 0)
    load(tmp_path)
    (tmp_path / "quantize_config.json").write_text("[]")
    edit_config(tmp_path, quantization_config=None)
    with pytest.raises(LoadError, match=r"quantize_config\.json holds list"):
        load(tmp_path)
