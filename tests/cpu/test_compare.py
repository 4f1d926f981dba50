"""`headrace test-model`: agreement is seen, and a wrong description is found in the right layer."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.cli.main import main
from headrace.models import model_class
from headrace.models.spec import DecoderSpec, LayerSpec
from tests.support.checkpoints import CASES, make_case

Change = Callable[[LayerSpec], LayerSpec]


def check(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    torch.set_num_threads(1)
    capsys.readouterr()
    code = main(["test-model", str(folder), "--tokens", "21", *options])
    return code, capsys.readouterr().out


def found(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code, text = check(folder, capsys, "--json")
    return code, json.loads(text)


@pytest.mark.parametrize(
    "case", ["qwen3", "gpt2", "deepseek-v3", "gemma2", "dbrx", "gpt-oss", "falcon-rw", "llama4"]
)
def test_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    make_case(tmp_path, case)
    code, result = found(tmp_path, capsys)
    assert code == 0 and result["first_difference"] is None
    names = [point["name"] for point in result["points"]]
    layers = [f"layer {index}" for index in range(4 if case == "llama4" else 3)]
    assert names == ["embedding", *layers, "final norm", "logits"]
    assert max(point["error"] for point in result["points"]) < 1e-4
    assert result["same_tokens"] == result["tokens"] == 21
    assert set(result["attention"]) == set(layers)


def scaled_attention(layer: LayerSpec) -> LayerSpec:
    return replace(layer, attention=replace(layer.attention, scale=0.3))


def other_activation(layer: LayerSpec) -> LayerSpec:
    return replace(layer, mlp=replace(layer.mlp, activation="gelu"))


@pytest.mark.parametrize(
    ("case", "change", "in_attention", "words"),
    [
        ("qwen3", scaled_attention, True, "is in layer 1: its attention"),
        ("qwen3", other_activation, False, "is in layer 1: not its attention"),
        ("deepseek-v3", scaled_attention, True, "is in layer 1: its attention"),
    ],
)
def test_a_wrong_description_is_found(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    change: Change,
    in_attention: bool,
    words: str,
) -> None:
    make_case(tmp_path, case)
    family = model_class(CASES[case][0])
    right = family.describe

    def wrong(info: Any) -> DecoderSpec:
        spec = right(info)
        first, second, *rest = spec.layers
        return replace(spec, layers=(first, change(second), *rest))

    monkeypatch.setattr(family, "describe", staticmethod(wrong))
    code, result = found(tmp_path, capsys)
    assert code == 1 and result["first_difference"] == "layer 1"
    assert result["in_attention"] is in_attention
    code, text = check(tmp_path, capsys)
    assert code == 1 and words in text.splitlines()[-1]


def test_what_cannot_be_compared_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_case(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    assert main(["test-model", str(tmp_path)]) == 1
    assert "weight has shape (32, 44) in the checkpoint" in capsys.readouterr().err
