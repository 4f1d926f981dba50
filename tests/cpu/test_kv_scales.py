"""Scales of an fp8 KV cache: from a file, from checkpoints under several names, into the cache."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.dist.topology import Shard
from headrace.layers.kv_scale import maybe_remap_kv_scale_name
from headrace.loader import load_model
from headrace.loader.kv_scales import kv_cache_scales_loader, prepare_kv_scales
from headrace.models import Model
from headrace.runner.pool import KvPool
from tests.support.checkpoints import make_case

GOOD = {
    "model_type": "llama",
    "kv_cache": {
        "dtype": "float8_e4m3fn",
        "scaling_factor": {"0": {"0": 0.5, "1": 0.25, "2": 2}, "1": {"0": 1, "1": 1, "2": 1}},
    },
}


def written(folder: Path, **changes: Any) -> str:
    value = json.loads(json.dumps(GOOD))
    for name, change in changes.items():
        (value if name == "model_type" else value["kv_cache"])[name] = change
    path = folder / "scales.json"
    path.write_text(json.dumps(value))
    return str(path)


def test_a_file_has_scales_by_rank_and_layer(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert dict(kv_cache_scales_loader(path, 0, 2, 3, "llama")) == {0: 0.5, 1: 0.25, 2: 2.0}
    assert dict(kv_cache_scales_loader(path, 1, 2, 3, "llama")) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "model_type is 'qwen2'"),
        ({"dtype": "int8"}, "kv_cache.dtype must be float8_e4m3fn"),
        ({"scaling_factor": {"0": {"0": 1, "1": 1, "2": 1}}}, r"ranks 0 to 1, not for \[0\]"),
        ({"scaling_factor": {"0": {"0": 1}, "1": {}}}, "scaling_factor.0 must be for layers"),
        (
            {"scaling_factor": {"0": {"0": 1, "1": 0, "2": 1}, "1": {}}},
            "scaling_factor.0.1 must be a positive number, not 0.0",
        ),
        ({"scaling_factor": 3}, "cannot be read"),
    ],
)
def test_files_that_do_not_fit_are_told(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoadError, match=message):
        kv_cache_scales_loader(written(tmp_path, **changes), 0, 2, 3, "llama")
    with pytest.raises(LoadError, match="cannot be read"):
        kv_cache_scales_loader(str(tmp_path / "none.json"), 0, 2, 3, "llama")


def load(folder: Path) -> Model:
    return load_model(read_model_info(folder), torch.float32, SoloGroup())


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ("self_attn.k_scale", "self_attn.v_scale"),
        ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
        ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
        ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
        ("self_attn.kv_scale", "self_attn.kv_scale"),
    ],
)
def test_checkpoints_bring_scales(tmp_path: Path, keys: str, values: str) -> None:
    make_case(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        tensors[f"model.layers.{layer}.{keys}"] = torch.tensor(0.5 + layer)
        tensors[f"model.layers.{layer}.{values}"] = torch.tensor([0.25 + layer])
        tensors[f"model.layers.{layer}.self_attn.q_scale"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "model.safetensors")
    model: Any = load(tmp_path)
    both = keys == values
    expected = [(0.25 + i if both else 0.5 + i, 0.25 + i) for i in range(3)]
    assert model.kv_scales() == expected
    pool = KvPool(model.state_specs(), 2, 4, torch.float8_e4m3fn, model.kv_scales())
    assert [(cache.key_scale, cache.value_scale) for cache in pool.caches] == expected
    pool = KvPool(model.state_specs(), 2, 4, torch.float32, model.kv_scales())
    assert {cache.key_scale for cache in pool.caches} == {1.0}


def test_wrong_scales_of_a_checkpoint_are_named(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] = torch.tensor(float("nan"))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"layers.1.self_attn.v_scale holds a scale that is no"):
        load(tmp_path)


def test_a_scale_without_a_place_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert maybe_remap_kv_scale_name("model.layers.9.self_attn.k_proj.k_scale", {}) is None
    assert "model.layers.9.self_attn.k_scale" in caplog.text
    assert maybe_remap_kv_scale_name("model.norm.weight", {}) == "model.norm.weight"


def test_a_model_gets_the_file_or_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_case(tmp_path, "llama")
    model: Any = load(tmp_path)
    info = read_model_info(tmp_path)
    with caplog.at_level(logging.INFO):
        prepare_kv_scales(model, info, "", Shard())
        assert "Defaulting to scaling factors of 1.0" in caplog.text
        prepare_kv_scales(model, info, written(tmp_path), Shard(0, 2))
        assert "Loaded KV cache scaling factors from" in caplog.text
        caplog.clear()
        prepare_kv_scales(model, info, "", Shard())
        assert not caplog.text
    assert model.kv_scales() == [(0.5, 0.5), (0.25, 0.25), (2.0, 2.0)]
    with pytest.raises(LoadError, match="LlamaForCausalLM does not support"):
        prepare_kv_scales(object(), info, written(tmp_path), Shard())
