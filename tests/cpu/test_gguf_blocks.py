"""GGUF's blocks kept as they are: every value is llama.cpp's own package's, whatever the type."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from torch import Tensor

from headrace import ops
from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.layers.held import held
from headrace.loader import load_model
from headrace.loader.files import resolve_model_path
from headrace.loader.gguf_blocks import BLOCKS
from headrace.loader.gguf_loader import _matrix
from headrace.models.decoder import Decoder
from headrace.ops.packed import PackedWeight
from headrace.quant.dense import ON_LOAD
from tests.cpu import test_gguf_models
from tests.cpu.test_models_parity import random_ids
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.threads import run_ranks

FLOATS = ("F32", "F16", "BF16")
FORMATS = {"Q4_0": "int4", "Q4_1": "int4", "Q5_0": "int8", "Q5_1": "int8", "Q8_0": "int8",
           "Q2_K": "int4", "Q3_K": "int4", "Q4_K": "int4", "Q5_K": "int8", "Q6_K": "int8",
           "IQ4_NL": "iq4_nl", "MXFP4": "mxfp4"}  # fmt: skip
BITS = {"Q4_0": 4.5, "Q4_1": 6, "Q5_0": 8.5, "Q5_1": 10, "Q8_0": 8.5, "Q2_K": 8, "Q3_K": 8,
        "Q4_K": 6, "Q5_K": 10, "Q6_K": 10, "IQ4_NL": 5, "MXFP4": 4.5}  # fmt: skip
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82],
          "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0]}  # fmt: skip
"""Where f16 numbers lie in a block."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.set_num_threads(1)


def blocks(kind: str, rows: int, columns: int) -> np.ndarray:
    """Random blocks with numbers of ordinary size, [rows, bytes]."""
    block, rng = BLOCKS[kind], np.random.default_rng(4)
    count = rows * columns // block.size
    raw = rng.integers(0, 256, (count, block.bytes), dtype=np.uint8)
    for place in HALVES.get(kind, []):
        halves = (rng.random((count, 1)) / 100).astype(np.float16)
        raw[:, place : place + 2] = halves.view(np.uint8)
    if kind == "MXFP4":
        raw[:, 0] = rng.integers(115, 128, count)
    return raw.reshape(rows, -1)


def test_all_types_are_kept() -> None:
    assert set(FORMATS) == set(BLOCKS) - set(FLOATS)


@pytest.mark.parametrize("kind", FORMATS)
def test_values_are_those_of_gguf(kind: str) -> None:
    raw = blocks(kind, 40, 512)
    theirs = torch.from_numpy(dequantize(raw, gguf.GGMLQuantizationType[kind])).float()
    found = _matrix(kind, torch.from_numpy(raw))
    packed = ops.pack_quantized(
        found.values, found.scales, found.format, found.group, found.offsets
    )
    assert packed.format == FORMATS[kind]
    assert torch.equal(ops.embedding_packed(torch.arange(40), packed, torch.float32), theirs)
    assert packed.nbytes * 8 / (64 * 512) == pytest.approx(BITS[kind], abs=0.02)  # 40 of 64 used


# Each token takes all experts: rounding of x then changes shares, and never the choice.
EXPERTS = {"moe_intermediate_size": 32, "decoder_sparse_step": 1, "num_experts_per_tok": 6}


def write(path: Path, kinds: tuple[str, ...], case: str = "llama") -> None:
    """A model whose matrices are of these types in turn, quantized by llama.cpp's package."""
    fields = {"hidden_size": 64, "intermediate_size": 96, **(EXPERTS if "moe" in case else {})}
    oracle = make_case(path.parent / "hf", case, **fields)
    made: list[str] = []

    class Writer(gguf.GGUFWriter):
        def add_tensor(self, name: str, tensor: np.ndarray) -> None:  # type: ignore[override]
            if tensor.ndim > 1 and "gate_inp" not in name:
                kind = gguf.GGMLQuantizationType[kinds[len(made) % len(kinds)]]
                made.append(name)
                super().add_tensor(name, quantize(tensor, kind), raw_dtype=kind)
            else:
                super().add_tensor(name, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFWriter", Writer)
        test_gguf_models.write(path, oracle, test_gguf_models.CASES[case])


def load(path: Path, quantization: str = "none", group: Group | None = None) -> Decoder:
    info = read_model_info(resolve_model_path(str(path)))
    model = load_model(info, torch.float32, group or SoloGroup(), quantization=quantization)
    assert isinstance(model, Decoder)
    return model


def divergence(one: Tensor, other: Tensor) -> float:
    one, other = one.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((one.exp() * (one - other)).sum(-1).mean())


@pytest.mark.parametrize(
    ("kinds", "case"),
    [
        (("Q8_0",), "llama"),
        (("Q4_0",), "llama"),
        (("Q4_1", "Q5_0", "Q8_0"), "llama"),
        (("Q8_0", "Q4_0"), "qwen3-moe"),
    ],
)
def test_logits_are_those_of_the_widened_file(
    kinds: tuple[str, ...], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "m.gguf", kinds, case)
    kept, ids = load(tmp_path / "m.gguf", "gguf"), random_ids(30)[0]
    formats = {value.format for _, value in held(kept) if isinstance(value, PackedWeight)}
    assert formats & {"int4", "int8"}
    assert formats <= {"int4", "int8", "float32"}  # routers
    ours = run_all(kept, [ids])[0]
    # The same file on the path that widens; nothing then quantizes.
    monkeypatch.setitem(ON_LOAD, "int8", ON_LOAD["none"])
    widened = run_all(load(tmp_path / "m.gguf", "int8"), [ids])[0]
    assert 0 < divergence(widened, ours) < 2e-3


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_hold_the_same_values(size: int, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", ("Q4_0", "Q8_0"))
    ids = random_ids(20)[0]
    alone = run_all(load(tmp_path / "m.gguf"), [ids])[0]
    for ours in run_ranks(
        size, lambda group: run_all(load(tmp_path / "m.gguf", group=group), [ids])[0]
    ):
        assert divergence(alone, ours) < 2e-3


def test_scales_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", ("Q8_0",))
    raw = bytearray((tmp_path / "m.gguf").read_bytes())
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.1.ffn_down.weight")
    raw[tensor.data_offset : tensor.data_offset + 2] = b"\xff\x7f"
    (tmp_path / "bad.gguf").write_bytes(raw)
    with pytest.raises(LoadError, match=r"layers\.1\.mlp\.down_proj.*no finite number"):
        load(tmp_path / "bad.gguf")
