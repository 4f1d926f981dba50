"""Checkpoints that GPTQModel, llm-compressor and AutoRound wrote (tests/data/quantized/make.py),
value by value: beside each lie matrices as these tools dequantize them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.loader import load_model
from headrace.models.decoder import Decoder
from headrace.quant.act_order import arrangement
from headrace.quant.base import Weights
from headrace.quant.bits import unpack_columns, unpack_rows
from tests.cpu.test_models_parity import expected, random_ids
from tests.support.paged import run_all
from tests.support.threads import run_ranks

DATA = Path(__file__).parents[1] / "data" / "quantized"
CASES = {"gptq-4-act-order": "int4", "gptq-4-v2": "int4", "gptq-8": "int8", "gptq-3": "int4",
         "awq": "int4"}  # fmt: skip
# What other tools wrote, and experts: in which format they are multiplied.
TOOLS = {"llmc-w4": "int4", "llmc-w8-groups": "int8", "llmc-w8a8": "int8", "llmc-fp8-blocks": "fp8",
         "llmc-fp8-kv": "fp8", "autoround-gptq": "int4", "autoround-awq": "int4",
         "gptq-experts": "int4"}  # fmt: skip
ORDERED = ("gptq-4-act-order", "gptq-experts")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, group: Group | None = None) -> Decoder:
    model = load_model(read_model_info(folder), torch.float32, group or SoloGroup())
    assert isinstance(model, Decoder)
    return model


def values(weights: Weights) -> Tensor:
    """What the packed matrix holds, fp32 [out, in], its inputs in the model's order."""
    packed = weights["packed"]
    found = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
    if "order" not in weights:
        return found
    order = weights["order"]
    whole = torch.zeros(packed.out_size, int(order.max()) + 1)
    return whole.index_add_(1, order, found)  # inputs taken twice weigh nothing the second time


def weights_of(model: Decoder, name: str) -> Weights:
    """Of the linear layer whose first rows are this matrix of the checkpoint's first layer."""
    layer: Any = model.layers[0]
    if ".experts." in name:
        found: Weights = layer.mlp.experts[0].weights[name.split(".experts.")[1]]
        return found
    linear = layer.attention.qkv if name.endswith("q_proj") else layer.mlp.down
    return linear.weights


@pytest.mark.parametrize("case", [*CASES, *TOOLS])
def test_every_value_is_the_tools(case: str) -> None:
    model, theirs = load(DATA / case), load_file(DATA / f"{case}.safetensors")
    assert len(theirs) > 1
    for name, their in theirs.items():
        weights = weights_of(model, name)
        assert weights["packed"].format == (CASES | TOOLS)[case]
        assert ("order" in weights) == (case in ORDERED)
        ours = values(weights)[: len(their), : their.shape[1]]
        # Theirs is rounded to f16 or bf16; ours is exact.
        rounding = 2**-8 if their.dtype == torch.bfloat16 else 2**-10
        torch.testing.assert_close(ours, their.float(), rtol=rounding, atol=1e-7)


def test_scales_of_the_cache_are_the_tools() -> None:
    """llm-compressor measured them: one of the keys and one of the values of the layer."""
    stored = load_file(DATA / "llmc-fp8-kv" / "model.safetensors")
    place = "model.layers.0.self_attn."
    scales = tuple(float(stored[f"{place}{kind}_scale"]) for kind in "kv")
    assert load(DATA / "llmc-fp8-kv").kv_scales() == [scales]
    assert all(0 < scale < 1 for scale in scales)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_these_values(case: str) -> None:
    model = load(DATA / case)
    config = transformers.LlamaConfig.from_pretrained(DATA / case)
    config.quantization_config = None
    oracle = transformers.LlamaForCausalLM(config).eval()
    stored = load_file(DATA / case / "model.safetensors")
    state = {name: stored[name].float() for name in oracle.state_dict() if name in stored}
    layer, place = model.layers[0], "model.layers.0."
    for name, linear, parts in (
        ("self_attn", layer.attention.qkv, ("q_proj", "k_proj", "v_proj")),
        ("self_attn", layer.attention.out, ("o_proj",)),
        ("mlp", layer.mlp.up, ("gate_proj", "up_proj")),
        ("mlp", layer.mlp.down, ("down_proj",)),
    ):
        pieces = values(linear.weights).chunk(len(parts))
        state |= {f"{place}{name}.{part}.weight": w for part, w in zip(parts, pieces, strict=True)}
    oracle.load_state_dict(state)
    for ids in random_ids(30, 3):
        theirs = expected(oracle, ids).double().log_softmax(-1)
        ours = run_all(model, [ids])[0].double().log_softmax(-1)
        # The only difference: x is rounded to 8 bits.
        assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 2e-3


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_values(case: str, size: int) -> None:
    """Their parts of down_proj side by side: 128 inputs by 2, and by 3 with padding."""
    whole = values(load(DATA / case).layers[0].mlp.down.weights)
    models = run_ranks(size, lambda group: load(DATA / case, group))
    parts = [values(model.layers[0].mlp.down.weights) for model in models]
    found = torch.cat(parts, 1)[:, :128]
    if size == 3 and "act-order" not in case:  # 43 inputs are no groups: some ranks widen to bf16
        torch.testing.assert_close(found, whole, rtol=2**-8, atol=0)
    else:
        assert torch.equal(found, whole)


def test_zero_points_of_two_versions() -> None:
    """Version 1 stores them less one in as many bits: 0 is stored as 15."""
    words = torch.tensor([[0x01234567, -1]], dtype=torch.int32)
    assert unpack_columns(words, 4).tolist() == [[7, 6, 5, 4, 3, 2, 1, 0] + [15] * 8]
    assert unpack_rows(words.T, 8).tolist() == [[0x67], [0x45], [0x23], [1]] + [[255]] * 4


def test_three_bits_across_words() -> None:
    numbers = torch.randint(0, 8, (64, 5), generator=torch.Generator().manual_seed(0))
    words = [[0] * 5 for _ in range(6)]
    for k, row in enumerate(numbers.tolist()):
        for column, number in enumerate(row):
            wide = number << 3 * k
            for w in range(6):
                words[w][column] |= wide >> 32 * w & 0xFFFFFFFF
    packed = torch.tensor(words, dtype=torch.int64).to(torch.int32)
    assert torch.equal(unpack_rows(packed, 3).long(), numbers)


def test_arrangement_fills_groups_up() -> None:
    group_of = torch.tensor([2, 0, 2, 2, 0] + [1] * 30)
    size, order, added = arrangement(group_of)
    runs = group_of[order].view(-1, size)
    assert bool((runs == runs[:, :1]).all())
    assert sorted(order[~added].tolist()) == list(range(35))
    assert size == 16
    assert len(order) == 64


def nan(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[3] = float("nan")
    return tensor


BAD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "scales": (nan, "down_proj.scales holds a scale that is no finite"),
    "g_idx": (lambda g: g + 100, "down_proj.g_idx names a group that is none of 4"),
    "qweight": (lambda w: w[:-1].contiguous(), "down_proj.qweight has shape"),
    "qzeros": (lambda w: w.float(), "down_proj.qzeros has dtype float32"),
}


@pytest.mark.parametrize("suffix", BAD)
def test_bad_tensors_are_named(suffix: str, tmp_path: Path) -> None:
    damage, message = BAD[suffix]
    name = f"model.layers.0.mlp.down_proj.{suffix}"
    tensors = load_file(DATA / "gptq-4-act-order" / "model.safetensors")
    save_file(tensors | {name: damage(tensors[name])}, tmp_path / "model.safetensors")
    shutil.copy(DATA / "gptq-4-act-order" / "config.json", tmp_path)
    with pytest.raises(LoadError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("case", "field", "value"),
    [
        ("gptq-8", "bits", 5),
        ("gptq-8", "group_size", 0),
        ("gptq-8", "checkpoint_format", "marlin"),
        ("gptq-8", "dynamic", [1]),
        ("awq", "bits", 8),
        ("awq", "format", "gemv"),
    ],
)
def test_bad_configurations_are_named(case: str, field: str, value: object, tmp_path: Path) -> None:
    config = json.loads((DATA / case / "config.json").read_text())
    fields = config["quantization_config"]
    if field == "format":
        fields.pop("version", None)
        fields.pop("checkpoint_format", None)
    fields[field] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copy(DATA / case / "model.safetensors", tmp_path)
    with pytest.raises(LoadError, match=f"quantization_config.{field}|quantization_config.version"):
        load(tmp_path)
