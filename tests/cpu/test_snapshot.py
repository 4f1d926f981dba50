"""Packed weights on disk: the same model, whatever happens to the file."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace import ops
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.layers.build import Build
from headrace.layers.held import held, held_bytes
from headrace.loader import load_model
from headrace.loader.snapshot import snapshot_path
from headrace.ops.packed import PackedWeight
from headrace.quant import quantization_of
from tests.support.checkpoints import make_case


def load(
    folder: Path, cache: Path, dtype: torch.dtype = torch.float32, quantization: str = "none"
) -> Any:
    return load_model(
        read_model_info(folder),
        dtype,
        SoloGroup(),
        quantization=quantization,
        weight_cache=str(cache),
    )


def contents(model: Any) -> dict[Any, list[Any]]:
    """Everything held, as values that can be compared."""
    found = {}
    for way, value in held(model):
        items = vars(value).values() if isinstance(value, PackedWeight) else [value]
        found[way] = [x.tolist() if isinstance(x, torch.Tensor) else x for x in items]
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_case(tmp_path / "model", "qwen3")
    return tmp_path / "model"


CASES = ["llama-tied", "llama-bias", "qwen3", "qwen2-moe", "gpt2", "deepseek-v3", "bloom"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
def test_a_second_load_maps_the_same_weights(tmp_path: Path, case: str, quantization: str) -> None:
    dtype = torch.bfloat16 if case == "llama-bias" else torch.float32
    make_case(tmp_path / "model", case)
    first = load(tmp_path / "model", tmp_path / "cache", dtype, quantization)
    (file,) = (tmp_path / "cache").iterdir()
    stamp = file.stat().st_mtime_ns
    second = load(tmp_path / "model", tmp_path / "cache", dtype, quantization)
    assert file.stat().st_mtime_ns == stamp
    assert contents(first) == contents(second)
    assert held_bytes(second) >= held_bytes(first) > 0
    x = torch.randn(3, first.embedding.columns.full).to(dtype)
    assert torch.equal(first.logits(x), second.logits(x))
    ids = torch.arange(5)
    assert torch.equal(first.embedding(ids), second.embedding(ids))
    packed = first.layers[0].attention.out.weights["packed"]
    assert packed.format == (
        str(dtype).removeprefix("torch.") if quantization == "none" else quantization
    )
    x = torch.randn(3, packed.in_size).to(dtype)
    restored = second.layers[0].attention.out.weights["packed"]
    assert torch.equal(ops.linear_packed(x, packed), ops.linear_packed(x, restored))


def test_a_changed_checkpoint_has_another_snapshot(tmp_path: Path, folder: Path) -> None:
    load(folder, tmp_path / "cache")
    (folder / "config.json").touch()
    load(folder, tmp_path / "cache")
    load(folder, tmp_path / "cache", torch.bfloat16)
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "another model"])
def test_a_damaged_snapshot_costs_time_only(
    tmp_path: Path, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = load(folder, tmp_path / "cache")
    info = read_model_info(folder)
    build = Build(torch.float32, SoloGroup(), quantization_of(info))
    path = snapshot_path(tmp_path / "cache", info, build, "auto")
    good = path.read_bytes()
    if damage == "another model":
        make_case(tmp_path / "other", "llama")
        load(tmp_path / "other", tmp_path / "others")
        (other,) = (tmp_path / "others").iterdir()
        path.write_bytes(other.read_bytes().replace(b"embedding", b"embeddinx"))
    else:
        path.write_bytes({"cut": good[:-64], "empty": b"", "noise": b"\1" * 5000}[damage])
    with caplog.at_level(logging.WARNING):
        again = load(folder, tmp_path / "cache")
    assert "the weight cache is not used" in caplog.text
    assert contents(again) == contents(first)
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with caplog.at_level(logging.WARNING):
        model = load(folder, tmp_path / "cache")
    assert "the weight cache cannot be written" in caplog.text
    assert held_bytes(model) > 0
