"""gpt-oss as it is published, experts in MXFP4, against transformers, which dequantizes them."""

from pathlib import Path

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
from headrace.ops.packed import PackedWeight
from tests.cpu.test_models_parity import expected, random_ids
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.threads import run_ranks

EXPERTS, HIDDEN, INNER = 5, 64, 96
FIELDS = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2,
          "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose experts are blocks and scales, and config.json says so."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("mxfp4")
    oracle = make_case(folder, "gpt-oss", dtype=torch.bfloat16, **FIELDS)
    oracle.config.quantization_config = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    oracle.config.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        _, columns, rows = tensors.pop(name).shape
        shape = EXPERTS, rows, columns // 32
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (*shape, 16), generator=generator, dtype=torch.uint8
        )
        scales = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
        scales[0, 0] = 0  # what an all but empty block may have
        tensors[f"{name}_scales"] = scales
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def oracle(folder: Path) -> transformers.PreTrainedModel:
    config = transformers.Mxfp4Config(dequantize=True)
    return transformers.GptOssForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def load(folder: Path, group: Group | None = None) -> Decoder:
    model = load_model(read_model_info(folder), torch.float32, group or SoloGroup())
    assert isinstance(model, Decoder)
    return model


def values(packed: PackedWeight) -> Tensor:
    return ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)


def test_values_are_kept_in_four_bits(folder: Path, oracle: transformers.PreTrainedModel) -> None:
    model = load(folder)
    for layer, theirs in zip(model.layers, oracle.model.layers, strict=True):
        ours = layer.mlp.experts[0].packed
        assert {w.format for w in (*ours.gates, *ours.ups, *ours.downs)} == {"mxfp4"}
        gate_up, down = theirs.mlp.experts.gate_up_proj, theirs.mlp.experts.down_proj
        for i in range(EXPERTS):
            assert torch.equal(values(ours.gates[i]), gate_up[i, :, ::2].T.float())
            assert torch.equal(values(ours.ups[i]), gate_up[i, :, 1::2].T.float())
            assert torch.equal(values(ours.downs[i]), down[i].T.float())


def test_logits(folder: Path, oracle: transformers.PreTrainedModel) -> None:
    model = load(folder)
    for ids in random_ids(30, 4):
        theirs = expected(oracle, ids).double().log_softmax(-1)
        ours = run_all(model, [ids])[0].double().log_softmax(-1)
        # The only difference: x is rounded to 8 bits.
        assert float((theirs.exp() * (theirs - ours)).sum(-1).mean()) < 2e-3


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks(folder: Path, size: int) -> None:
    """96 inputs of down by 2 (groups of 16), by 3, and by 5 (widened, with padding)."""
    ids = random_ids(20)
    alone = run_all(load(folder), ids)[0].double().log_softmax(-1)
    for ranks in run_ranks(size, lambda group: run_all(load(folder, group), ids)[0]):
        ours = ranks.double().log_softmax(-1)
        assert float((alone.exp() * (alone - ours)).sum(-1).mean()) < 2e-3


def test_bad_scales_and_shapes_are_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    for damage, message in (
        (torch.full_like(tensors[name], 255), "down_proj.scales holds a scale that is no number"),
        (tensors[name][:, 1:].contiguous(), "down_proj.scales has shape"),
        (tensors[name][:2].contiguous(), "down_proj_scales|down_proj.scales"),
    ):
        save_file(tensors | {name: damage}, tmp_path / "model.safetensors")
        with pytest.raises(LoadError, match=message):
            load(tmp_path)
