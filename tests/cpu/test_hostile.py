"""Files of a checkpoint that lie: a `LoadError` that says where, never another error or a hang.

Readers of tensors (safetensors, GGUF, .bin, saved states) have such tests beside their own; here
are the JSON files, NumPy's files, and whole GGUF models.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.loader.files import INDEX, TORCH, resolve_model_path, weight_files
from headrace.loader.gguf import GgufFile
from headrace.loader.gguf_folder import parts_of
from headrace.loader.kv_scales import kv_cache_scales_loader
from headrace.loader.npcache import np_cache_weights
from headrace.models import Model
from headrace.quant.checkpoint import from_checkpoint
from headrace.text.tokenizer import load_tokenizer
from tests.cpu.test_gguf_models import write as write_gguf
from tests.cpu.test_kv_scales import GOOD as SCALES
from tests.cpu.test_quantized_checkpoints import CASES as QUANTIZED
from tests.support.checkpoints import make_case
from tests.support.hostile import changed

FUZZ = settings(deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("hostile")


def load(folder: Path) -> Model:
    return load_model(read_model_info(folder), torch.float32, SoloGroup())


def bounded(work: Callable[[], Any]) -> Any:
    """What `work` gives, None where it refuses."""
    try:
        return work()
    except LoadError as error:
        assert error.message
        return None


FAMILIES = ["llama-yarn", "gemma3", "qwen3-moe", "deepseek-v3", "gpt2", "llama4", "gpt-oss"]


@settings(FUZZ, max_examples=50)
@given(data=st.data())
def test_config_json(folder: Path, data: st.DataObject) -> None:
    case = data.draw(st.sampled_from(FAMILIES))
    place = folder / case
    if not place.exists():
        make_case(place, case)
        (place / "sound.json").write_bytes((place / "config.json").read_bytes())
    config = data.draw(changed(json.loads((place / "sound.json").read_text())))
    (place / "config.json").write_text(json.dumps(config))
    bounded(lambda: load(place))


_OTHERS: list[dict[str, Any]] = [
    {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"-:x": {}, "y": {"bits": 8}}},
    {"quant_method": "awq", "bits": 4, "group_size": 32, "modules_to_not_convert": ["x"]},
    {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4", "load_in_4bit": True},
    {"quant_method": "mxfp4", "modules_to_not_convert": ["x"]},
    {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["x*"]}},
    {
        "quant_method": "torchao",
        "quant_type": {
            "default": {
                "_type": "IntxWeightOnlyConfig",
                "_data": {
                    "weight_dtype": {"_data": "int4"},
                    "granularity": {"_type": "PerGroup", "_data": {"group_size": 32}},
                    "intx_packing_format": {"_data": "UNPACKED_TO_INT8"},
                },
            }
        },
    },
]
CONFIGS = [config for config, _, _ in QUANTIZED.values()] + _OTHERS


@settings(FUZZ, max_examples=150)
@given(config=st.sampled_from(CONFIGS).flatmap(changed))
def test_quantization_config(folder: Path, config: dict[str, Any]) -> None:
    place = folder / "floats"
    if not place.exists():
        make_case(place, "qwen3")
    info = read_model_info(place)

    def describe() -> None:
        quant = from_checkpoint(config, info, ["model.layers.0.mlp.up_proj.weight_scale"])
        for kind in ("linear", "expert", "head"):
            quant.method(["model.layers.0.mlp.up_proj"], kind)  # type: ignore[arg-type]

    bounded(describe)


TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    "post_processor": None,
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "bos_token": "<s>",
    "added_tokens_decoder": {"3": {"content": "<s>", "special": True, "lstrip": False}},
    "extra_special_tokens": ["<t>"],
}


@settings(FUZZ, max_examples=80)
@given(model=changed(TOKENIZER), own=changed(TOKENIZER_CONFIG), which=st.booleans())
def test_tokenizer_json(folder: Path, model: Any, own: Any, which: bool) -> None:
    (folder / "tokenizer.json").write_text(json.dumps(model if which else TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG if which else own))
    tokenizer = bounded(lambda: load_tokenizer(folder))
    if tokenizer is not None:
        assert tokenizer.vocab_size >= 0


@settings(FUZZ, max_examples=50)
@given(scales=changed(SCALES))
def test_scales_of_a_cache(folder: Path, scales: Any) -> None:
    path = folder / "scales.json"
    path.write_text(json.dumps(scales))
    found = bounded(lambda: dict(kv_cache_scales_loader(str(path), 0, 2, 3, "llama")))
    assert found is None or all(0 < scale < float("inf") for scale in found.values())


@settings(FUZZ, max_examples=50)
@given(index=changed({"metadata": {}, "weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
def test_index(folder: Path, index: Any) -> None:
    place = folder / "index"
    place.mkdir(exist_ok=True)
    for name in ("a.safetensors", "b.safetensors", "x"):
        (place / name).touch()
    (place / INDEX).write_text(json.dumps(index))
    found = bounded(lambda: weight_files(place))
    assert found is None or {path.suffix for path in found.paths} == {".safetensors"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "x" * 400 + ".safetensors", "a\0b"])
def test_an_index_names_files_of_its_kind(tmp_path: Path, name: str) -> None:
    """Not those that hold programs, which are read only when asked for."""
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LoadError, match=r"plain file name|no \*\.safetensors file"):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", INDEX])
@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "\udcff", "null", "[1]", ""])
def test_what_is_no_object(tmp_path: Path, name: str, text: str) -> None:
    for path, content in ((INDEX, "{}"), ("config.json", "{}"), ("tokenizer.json", TOKENIZER)):
        (tmp_path / path).write_text(json.dumps(content))
    (tmp_path / name).write_text(text, errors="surrogateescape")
    read: Callable[[Path], Any] = load_tokenizer if "token" in name else read_model_info
    with pytest.raises(LoadError, match=str(tmp_path)):
        (weight_files if name == INDEX else read)(tmp_path)


# files of numpy


@pytest.fixture(scope="module")
def cached(folder: Path) -> tuple[Path, bytes]:
    place = folder / "numpy"
    place.mkdir()
    torch.save({"a": torch.ones(3)}, place / "pytorch_model.bin")
    list(np_cache_weights(place, weight_files(place, TORCH)))
    return place, (place / "np" / "a.npy").read_bytes()


@settings(FUZZ, max_examples=100)
@given(
    changes=st.lists(st.tuples(st.integers(0, 139), st.integers(0, 255)), max_size=3),
    shape=st.sampled_from(["(3,)", "(1<<40,)", "(-3,)", "(9999999999999,)", "(" * 60, "(0, 1e9)"]),
    kind=st.sampled_from(["<i4", "|O", ">i4", "zzz", "<f4", "<i8"]),
    cut=st.integers(0, 12),
)
def test_numpy_files(
    cached: tuple[Path, bytes],
    changes: list[tuple[int, int]],
    shape: str,
    kind: str,
    cut: int,
) -> None:
    place, sound = cached
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}"
    content = bytearray(sound[:10] + text.ljust(117).encode() + b"\n" + sound[128:])
    for position, byte in changes:
        content[position] = byte
    (place / "np" / "a.npy").write_bytes(content[: len(content) - cut])
    found = bounded(lambda: dict(np_cache_weights(place, weight_files(place, TORCH))))
    assert found is None or sum(t.clone().nbytes for t in found.values()) <= len(content)


# GGUF


@settings(FUZZ, max_examples=50)
@given(data=st.data())
def test_metadata_of_gguf(folder: Path, data: st.DataObject) -> None:
    """Values of other types and sizes, beside tensors that are as they were."""
    place = folder / "gguf"
    if not place.exists():
        write_gguf(folder / "m.gguf", make_case(place, "llama"), "llama")
    file = GgufFile(folder / "m.gguf")
    file.metadata = data.draw(changed(file.metadata))

    def whole() -> None:
        for name, content in parts_of(file).items():
            (place / name).write_text(json.dumps(content))
        load(place)
        load_tokenizer(place)

    bounded(whole)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.attn_q.weight", (63, 32), r"blk\.0\.attn_q\.weight .*cannot be"),
        ("blk.0.ffn_gate.weight", (45, 32), r"gate_proj\.weight has shape \(45, 32\)"),
        ("blk.1.ffn_down.weight", (0, 32), r"blk\.1\.ffn_down\.weight .*empty"),
    ],
)
def test_tensors_of_gguf(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shape: tuple[int, ...],
    message: str,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    oracle = make_case(tmp_path / "hf", "llama")
    added = gguf.GGUFWriter.add_tensor

    def add(self: gguf.GGUFWriter, own: str, values: np.ndarray) -> None:
        added(self, own, np.ones(shape, np.float32) if own == name else values)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", add)
    write_gguf(tmp_path / "m.gguf", oracle, "llama")
    with pytest.raises(LoadError, match=message):
        load(resolve_model_path(str(tmp_path / "m.gguf")))
