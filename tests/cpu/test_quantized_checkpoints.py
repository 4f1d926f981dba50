"""Checkpoints that are quantized already: the values that their tools define, and their logits."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.dist.topology import Cut, Grid
from headrace.layers.build import Split
from headrace.layers.linear import ColumnLinear, RowLinear
from headrace.loader import build_of, load_built, load_model
from headrace.models import Model
from headrace.quant.stored import _tell
from tests.cpu.test_models_parity import expected, random_ids
from tests.cpu.test_quantized_integers import values as inputs_in_order
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.quantized import (
    PROJECTIONS,
    compressed,
    compressed_config,
    edit_config,
    fp8_blocks,
    fp8_tensor,
    oracle_of,
    rewrite,
    scale_range,
    spoil,
)
from tests.support.threads import run_grid, run_ranks

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def _ct(format: str, scale: torch.dtype = torch.float32, **weights: Any) -> tuple[Any, Any]:
    return compressed_config(weights, format), compressed(weights, format, scale=scale)


_INT4 = {"num_bits": 4, "strategy": "group", "group_size": 32}
_FLOAT = {"num_bits": 8, "type": "float"}
# name -> configuration, what stores a matrix, format in which kernels multiply it
CASES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "fp8 blocks": (FP8 | {"weight_block_size": [128, 128]}, fp8_blocks(), "fp8"),
    "fp8 small blocks": (FP8 | {"weight_block_size": [16, 16]}, fp8_blocks(16, 16), "float32"),
    "fp8 tensor": (FP8, fp8_tensor(), "fp8"),
    "fp8 static": (FP8 | {"activation_scheme": "static"}, fp8_tensor(static=True), "fp8"),
    "w8a8": (*_ct("int-quantized", strategy="channel"), "int8"),
    "w8a8 tensor": (*_ct("int-quantized", strategy="tensor"), "int8"),
    "w8a16": (*_ct("pack-quantized", strategy="channel"), "int8"),
    "w8a16 groups": (*_ct("pack-quantized", **_INT4 | {"num_bits": 8}), "int8"),
    "w8 zero points": (*_ct("int-quantized", strategy="channel", symmetric=False), "int8"),
    "w8 groups, zero points": (
        *_ct("pack-quantized", **_INT4 | {"num_bits": 8}, symmetric=False),
        "int8",
    ),
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


def divergence(model: Model, oracle: Any, ids: list[int]) -> float:
    """Mean KL divergence of the next-token distributions, in nats."""
    ours, theirs = (
        logits.double().log_softmax(-1)
        for logits in (run_all(model, [ids])[0], expected(oracle, ids))
    )
    return float((theirs.exp() * (theirs - ours)).sum(-1).mean())


def quantize_inputs(oracle: Any, group: int | None) -> None:
    """Let linear layers see x as the int8 and int4 kernels do: int8 by token, and by group."""

    def rounded(module: Any, inputs: tuple[Tensor]) -> Tensor:
        width = inputs[0].shape[-1]
        x = inputs[0].unflatten(-1, (-1, min(group or width, width)))
        top = x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        return ((x * (127 / top)).round() * (top / 127)).flatten(-2)

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


def check_values(
    model: Model, values: dict[str, Tensor], format: str | None, atol: float = 1e-6
) -> None:
    """Every linear layer holds this rank's part of the values."""
    for at, linear in linears(model).items():
        prefix = at.rpartition(".")[0]
        whole = [
            local(values[f"{prefix}.{part.name}.weight"], part.rows, linear.shape.columns)
            for part in linear.shape.parts
        ]
        packed = linear.weights["packed"]
        assert format in (packed.format, None), (at, packed.format)
        ours = inputs_in_order(linear.weights)[:, : linear.shape.columns.local]
        torch.testing.assert_close(ours, torch.cat(whole), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_means_what_its_tool_says(tmp_path: Path, case: str) -> None:
    config, store, format = CASES[case]
    make_case(tmp_path, "llama", **SIZES)
    values = rewrite(tmp_path, config, store)
    model = load(tmp_path)
    check_values(model, values, format)
    oracle = oracle_of(tmp_path, values)
    if format in ("int8", "int4"):
        quantize_inputs(oracle, linears(model)["model.layers.0.mlp."].weights["packed"].group)
        # A number of x halfway between two steps may fall to either side.
        assert divergence(model, oracle, random_ids(30)[0]) < 2e-4
    else:
        assert difference(model, oracle, random_ids(30)[0]) < 1e-4
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


def test_experts_dealt_to_ranks(tmp_path: Path) -> None:
    """4 experts on 2 and on 3 ranks: each whole and on one of them, the last lot with one empty."""
    config, store, format = CASES["fp8 blocks"]
    make_case(tmp_path, "qwen3-moe", **EXPERTS["qwen3-moe"])
    values, ids = rewrite(tmp_path, config, store), random_ids(30)[0]
    info, alone = read_model_info(tmp_path), run_all(load(tmp_path), [ids])[0]

    def one(group: Group, split: Split) -> tuple[set[str], Tensor]:
        model: Any = load_built(info, build_of(info, torch.float32, group, split=split))
        return check_experts(model, values), run_all(model, [ids])[0]

    for size in (2, 3):
        for formats, logits in run_grid(Grid(tp=size, ep=size), one):
            assert formats <= {format}
            torch.testing.assert_close(logits, alone, atol=2e-5, rtol=2e-5)


def check_experts(model: Any, values: dict[str, Tensor]) -> set[str]:
    """All matrices of experts hold what those of the checkpoint stand for; their formats."""
    rename = model.spec.layout.rename
    expected = {rename(name): value for name, value in values.items()}
    found = set()
    for index, layer in enumerate(model.layers):
        (experts,) = layer.mlp.experts
        for name, weights in experts.weights.items():
            packed, shape = weights["packed"], experts.shapes[name]
            ours = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
            whole = expected[f"model.layers.{index}.mlp.experts.{name}.weight"]
            theirs = local(whole, shape.parts[0].rows, shape.columns)
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
            found.add(packed.format)
    return found


@pytest.mark.parametrize("case", ["w4a16", "fp8 tensor", "fp8 small blocks"])
def test_parts_stored_in_different_ways(tmp_path: Path, case: str) -> None:
    """k stays as it is, so q, k and v are three matrices; so do a router and a head, by name."""
    config, store, _ = CASES[case]
    make_case(tmp_path, "llama-bias", **SIZES)
    left = [f"model.layers.{layer}.self_attn.k_proj" for layer in range(2)] + ["lm_head"]
    named = "ignore" if "config_groups" in config else "ignored_layers"
    values = rewrite(tmp_path, config | {named: left}, store, rf"(?!.*k_proj){PROJECTIONS}")
    assert f"{left[0]}.weight" in load_file(tmp_path / "model.safetensors")
    model, oracle = load(tmp_path), oracle_of(tmp_path, values)
    limit = 1e-4 if case.startswith("fp8") else 1.0
    assert difference(model, oracle, random_ids(30)[0]) < limit
    parts = model.layers[0].attention.qkv.weights  # type: ignore[attr-defined]
    formats = [parts[name]["packed"].format for name in ("q_proj", "k_proj", "v_proj")]
    usual = {"w4a16": "int4", "fp8 tensor": "fp8", "fp8 small blocks": "float32"}[case]
    assert formats == [usual, "float32", usual]


@pytest.mark.parametrize("case", ["w4a16", "fp8 tensor", "w8a8", "float outputs"])
def test_stacked_matrices(tmp_path: Path, case: str) -> None:
    """Phi-3 stores q, k, v as one matrix, gate and up as another."""
    config, store, format = CASES[case]
    make_case(tmp_path, "phi3", **SIZES)
    values = rewrite(tmp_path, config, store)
    model = load(tmp_path)
    packed = model.layers[0].attention.qkv.weights["packed"]  # type: ignore[attr-defined]
    assert packed.format == format
    ours = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
    expected = values["model.layers.0.self_attn.qkv_proj.weight"]
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_what_no_kernel_has_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_case(tmp_path, "llama", **SIZES)
    rewrite(tmp_path, *CASES["fp8 small blocks"][:2])
    _tell.cache_clear()
    load(tmp_path)
    assert caplog.text.count("they are widened to float32") == 1


def shuffled(weights: dict[str, Any]) -> Any:
    """A `store` with `weight_g_idx`: scattered groups, alike for matrices of the same inputs."""
    store = compressed(weights, "pack-quantized")

    def stored(module: str, weight: Tensor) -> Any:
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(1))
        small, values = store(module, weight)
        words = small["weight_packed"]
        numbers = (words[:, :, None] >> torch.arange(0, 32, 4) & 15).flatten(1)[:, order]
        packed = (numbers.unflatten(1, (-1, 8)) << torch.arange(0, 32, 4)).sum(-1)
        index = (torch.arange(weight.shape[1]) // weights["group_size"])[order].int()
        own = {"weight_packed": packed.to(torch.int32), "weight_g_idx": index}
        return small | own, values[:, order]

    return stored


def test_order_of_activations(tmp_path: Path) -> None:
    config = compressed_config(_INT4, "pack-quantized")
    config["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    make_case(tmp_path, "llama", **SIZES)
    values = rewrite(tmp_path, config, shuffled(_INT4))
    check_values(load(tmp_path), values, "int4")
    for one in run_ranks(3, lambda group: load(tmp_path, group)):
        check_values(one, values, None)
    spoil(tmp_path, "model.layers.1.self_attn.q_proj.weight_g_idx", lambda t: t + 1)
    with pytest.raises(LoadError, match="weight_g_idx names a group that is none of 2"):
        load(tmp_path)


TORCHAO = Path(__file__).parents[1] / "data" / "torchao"


@pytest.mark.parametrize(
    ("case", "format"),
    [("int8", "int8"), ("int8-dynamic", "int8"), ("float8", "fp8"), ("int4", "int4")],
)
def test_torchao(case: str, format: str) -> None:
    """Written by torchao (tests/data/torchao/make.py), which dequantizes to bf16."""
    model, values = load(TORCHAO / case), load_file(TORCHAO / case / "values")
    for at, linear in linears(model).items():
        packed = linear.weights["packed"]
        assert packed.format == format
        ours = ops.embedding_packed(torch.arange(packed.out_size), packed, torch.float32)
        names = [f"{at.rpartition('.')[0]}.{part.name}.weight" for part in linear.shape.parts]
        assert torch.equal(ours.bfloat16(), torch.cat([values[name] for name in names]))
    for one in run_ranks(2, lambda group: load(TORCHAO / case, group)):
        check_values(one, values, None, atol=0.002)


def test_fp8_blocks_as_transformers_reads_them(tmp_path: Path) -> None:
    make_case(tmp_path, "qwen3", **SIZES)
    config = FP8 | {"weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    rewrite(tmp_path, config, fp8_blocks())
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=transformers.FineGrainedFP8Config(dequantize=True),
        attn_implementation="eager",
        dtype=torch.float32,
    )
    assert difference(load(tmp_path), oracle.eval(), random_ids(30)[0]) < 1e-4


def test_a_whole_model_compressed_and_read_by_transformers(tmp_path: Path) -> None:
    """The path of llm-compressor: scales on modules, compressed in memory, saved."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = make_case(tmp_path / "plain", "llama", **SIZES)
    given = {"g": {"targets": ["Linear"], "weights": _INT4 | {"symmetric": False}}}
    apply_quantization_config(model, QuantizationConfig(config_groups=given, ignore=["lm_head"]))
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            args = module.quantization_scheme.weights
            low, high = scale_range(module.weight.data, args)
            module.weight_scale.data, module.weight_zero_point.data = calculate_qparams(
                low, high, args
            )
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path / "small")
    compressor.update_config(str(tmp_path / "small"))
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "small",
        quantization_config=transformers.CompressedTensorsConfig(run_compressed=False),
        attn_implementation="eager",
    ).eval()
    ours = load(tmp_path / "small")
    values = {name: value for name, value in oracle.state_dict().items() if "_proj" in name}
    check_values(ours, values, "int4")
    quantize_inputs(oracle, 32)
    assert difference(ours, oracle, random_ids(30)[0]) < 0.02


@pytest.mark.parametrize("place", ["config.json", "hf_quant_config.json"])
def test_modelopt(tmp_path: Path, place: str) -> None:
    make_case(tmp_path, "llama", **SIZES)
    own = {"quant_algo": "FP8", "exclude_modules": ["lm_head", "model.layers.*.mlp*"]}
    stored = fp8_tensor(static=True)
    values = rewrite(tmp_path, {"quant_method": "modelopt"} | own, stored, r".*attn\.\w_proj")
    if place != "config.json":
        edit_config(tmp_path, quantization_config=None)
        (tmp_path / place).write_text(json.dumps({"quantization": own}))
    model = load(tmp_path)
    check_values(model, values, None)
    formats = [linear.weights["packed"].format for linear in linears(model).values()]
    assert formats == ["fp8", "fp8", "float32", "float32"] * 2
    edit_config(tmp_path, quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    with pytest.raises(LoadError, match="quant_algo is NVFP4"):
        load(tmp_path)


@pytest.mark.parametrize("case", ["w4a16", "fp8 blocks"])
def test_packed_weights_are_cached(tmp_path: Path, case: str) -> None:
    config, store, format = CASES[case]
    make_case(tmp_path / "model", "qwen3-moe", **EXPERTS["qwen3-moe"])
    values = rewrite(tmp_path / "model", config, store)
    info, folder = read_model_info(tmp_path / "model"), str(tmp_path / "cache")
    for _ in range(2):
        model = load_model(info, torch.float32, SoloGroup(), weight_cache=folder)
        assert check_experts(model, values) == {format}
    assert len(list((tmp_path / "cache").iterdir())) == 1
