"""Checkpoints that transformers and bitsandbytes wrote (tests/data/quantized), value by value, and
floats that become NF4 as they are read.

Beside each lie matrices as bitsandbytes dequantizes them, in fp32.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.loader import load_model
from headrace.models.decoder import Decoder
from tests.cpu.test_models_parity import expected, random_ids
from tests.cpu.test_quantized_integers import DATA, values
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.threads import run_ranks

CASES = {"bnb-nf4": "nf4", "bnb-fp4": "fp4", "bnb-int8": "int8"}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path, group: Group | None = None, load_format: str = "auto") -> Decoder:
    model = load_model(read_model_info(folder), torch.float32, group or SoloGroup(), load_format)
    assert isinstance(model, Decoder)
    return model


@pytest.mark.parametrize("case", CASES)
def test_every_value_is_the_tools(case: str) -> None:
    layer = load(DATA / case).layers[0]
    theirs = load_file(DATA / f"{case}.safetensors")
    matrices = {"self_attn.q_proj": layer.attention.qkv, "mlp.down_proj": layer.mlp.down}
    for name, linear in matrices.items():
        assert linear.weights["packed"].format == CASES[case]
        expected = theirs.get(f"model.layers.0.{name}")
        if expected is None:
            expected = defined(case, f"model.layers.0.{name}.weight")
        torch.testing.assert_close(values(linear.weights)[:64], expected, rtol=3e-7, atol=0)


def defined(case: str, name: str) -> Tensor:
    """down_proj [64, 96], whose rows are not whole blocks, as arXiv 2305.14314 has it."""
    stored = load_file(DATA / case / "model.safetensors")
    absmax, octets = stored[f"{name}.absmax"], stored[name].flatten()
    if case == "bnb-nf4":
        state = json.loads(bytes(stored[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
        wide = stored[f"{name}.nested_quant_map"][absmax.long()]
        absmax = wide * stored[f"{name}.nested_absmax"] + state["nested_offset"]
    codes = torch.stack([octets // 16, octets % 16], 1).flatten().long()
    found = stored[f"{name}.quant_map"][codes] * absmax.repeat_interleave(64)
    return found.view(64, 96)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_values(case: str, size: int) -> None:
    """Their parts of down_proj side by side: 96 inputs by 2 and by 3, in groups of 16 or 32."""
    whole = values(load(DATA / case).layers[0].mlp.down.weights)
    models = run_ranks(size, lambda group: load(DATA / case, group))
    parts = [values(model.layers[0].mlp.down.weights) for model in models]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_floats_become_nf4(tmp_path: Path) -> None:
    """What is computed is the model with its weights rounded: the oracle has the same ones."""
    oracle = make_case(tmp_path, "llama", hidden_size=64, head_dim=16, intermediate_size=96)
    model = load(tmp_path, load_format="bitsandbytes")
    state = oracle.state_dict()
    for index, layer in enumerate(model.layers):
        place = f"model.layers.{index}."
        for linear, names in (
            (layer.attention.qkv, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            (layer.attention.out, ("self_attn.o_proj",)),
            (layer.mlp.up, ("mlp.gate_proj", "mlp.up_proj")),
            (layer.mlp.down, ("mlp.down_proj",)),
        ):
            assert linear.weights["packed"].format == "nf4"
            keys = [f"{place}{name}.weight" for name in names]
            pieces = values(linear.weights).split([len(state[key]) for key in keys])
            for key, piece in zip(keys, pieces, strict=True):
                far = (state[key] - piece).abs().max() / state[key].abs().max()
                assert 0.01 < float(far) < 0.16  # half the widest gap of the table
                state[key] = piece
    oracle.load_state_dict(state)
    ids = random_ids(20)[0]
    torch.testing.assert_close(
        run_all(model, [ids])[0].log_softmax(-1), expected(oracle, ids).log_softmax(-1),
        rtol=0, atol=1e-4,
    )  # fmt: skip


def test_another_quantization_is_refused() -> None:
    with pytest.raises(LoadError, match="bitsandbytes"):
        load(DATA / "awq", load_format="bitsandbytes")


def state(text: str) -> Callable[[Tensor], Tensor]:
    return lambda _: torch.tensor(list(text.encode()), dtype=torch.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
BAD: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "not json": (STATE, state("{"), "cannot be read"),
    "no blocks": (STATE, state('{"shape": [64, 96], "blocksize": 0}'), "its sizes are"),
    "other shape": (STATE, state('{"shape": [9, 9], "blocksize": 64}'), "not .64, 96."),
    "other blocks": (
        STATE,
        state('{"shape":[64,96],"blocksize":32,"nested_blocksize":256,"nested_offset":0}'),
        "96 scales for 6144 values in blocks of 32",
    ),
    "other table": ("weight.quant_map", lambda t: t + 1, "is not the table of nf4"),
    "nan": ("weight.nested_absmax", lambda t: t * float("nan"), "no finite number"),
    "negative": ("weight.nested_absmax", lambda t: -t, "a scale that is negative"),
    "short": ("weight", lambda t: t[:-1].contiguous(), "has shape"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_tensors_are_named(what: str, tmp_path: Path) -> None:
    suffix, damage, message = BAD[what]
    name = f"model.layers.0.mlp.down_proj.{suffix}"
    tensors = load_file(DATA / "bnb-nf4" / "model.safetensors")
    save_file(tensors | {name: damage(tensors[name])}, tmp_path / "model.safetensors")
    shutil.copy(DATA / "bnb-nf4" / "config.json", tmp_path)
    with pytest.raises(LoadError, match=f"down_proj.*{message}"):
        load(tmp_path)


def test_bad_configurations_are_named(tmp_path: Path) -> None:
    config = json.loads((DATA / "bnb-nf4" / "config.json").read_text())
    shutil.copy(DATA / "bnb-nf4" / "model.safetensors", tmp_path)
    for field, value in (("bnb_4bit_quant_type", "nf5"), ("bnb_4bit_quant_storage", "bfloat16")):
        changed = {**config["quantization_config"], field: value}
        (tmp_path / "config.json").write_text(
            json.dumps({**config, "quantization_config": changed})
        )
        with pytest.raises(LoadError, match=f"quantization_config.{field}"):
            load(tmp_path)
