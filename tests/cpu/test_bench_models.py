"""`bench write-model` and `bench roofline --shape` on a small shape; transformers as the oracle."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headrace.bench import write_model
from headrace.bench.shapes import SHAPES
from headrace.cli.main import main
from headrace.core.model_info import read_model_info
from headrace.loader.dummy import dummy_weights
from headrace.ops import cpu

SMALL = {
    "vocab_size": 3200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SHAPES, request.param, SHAPES[request.param] | SMALL)
    monkeypatch.setattr("sys.argv", ["headrace", "bench", "x"])
    return request.param


def test_transformers_reads_the_same_weights(shape: str, tmp_path: Path) -> None:
    write_model.write_config(shape, tmp_path)
    write_model.write_tokenizer(tmp_path, SHAPES[shape])
    write_model.write_weights(tmp_path)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    name = "model.layers.1.mlp.down_proj.weight"
    state = model.state_dict()[name]
    [(_, oracle)] = dummy_weights({name: tuple(state.shape)})
    assert torch.equal(state, oracle.to(torch.bfloat16))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == read_model_info(tmp_path).vocab_size


@pytest.mark.skipif(cpu.LIBRARY is None, reason="the native kernels are not built")
def test_roofline_of_a_shape(
    shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "roofline.png"
    words = ["bench", "roofline", "--shape", shape, "--plot", str(picture), "--json", "--operators"]
    words += ["--seconds", "0.01", "--batches", "1", "3", "--prompts", "20", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["headrace", *words])
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"] == shape
    steps = {step["name"]: step for step in result["steps"]}
    assert list(steps) == ["prefill 20", "decode batch 1", "decode batch 3"]
    for step in steps.values():
        assert step["runs"] >= max(3, step["runs_alone"])
        operators = step["operators"]
        assert operators["paged_attention"]["calls"] == 2
        spent = sum(each["milliseconds"] for each in operators.values())
        assert spent > 0
        assert 0 < step["fraction_of_limit"] <= step["best_fraction_of_limit"]
    assert picture.read_bytes().startswith(b"\x89PNG")
