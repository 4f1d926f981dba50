"""Checkpoint files: the reader against the safetensors package, and every way to be wrong."""

import itertools
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace import ops
from headrace.core.config import LOAD_FORMATS
from headrace.core.errors import BadRequest, LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.dist.topology import Cut, Span
from headrace.loader import LOADERS, get_model_loader, load_model
from headrace.loader.default import DefaultModelLoader
from headrace.loader.dummy import dummy_tensor, dummy_weights
from headrace.loader.files import INDEX, resolve_model_path, weight_files
from headrace.loader.iterators import iterate_weights
from headrace.loader.safetensors import _AHEAD, iterate_tensors, read_header
from headrace.models import Model
from headrace.ops.packed import PackedWeight
from headrace.quant.base import LinearShape, Part
from headrace.quant.dense import AS_IS
from tests.support.checkpoints import make_case
from tests.support.paged import run_all

IDS = [[5, 9, 33, 70, 21, 8]]


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    return load_model(read_model_info(folder), dtype, SoloGroup())


def write(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: Any, begin: Any, end: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# reading files


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).half(),
        "brain": torch.randn(7).bfloat16(),
        "single": torch.randn(2, 3, 4),
        "double": torch.randn(3).double(),
        "byte": torch.arange(5, dtype=torch.uint8),
        "long": torch.arange(3),
        "flag": torch.tensor([True, False, True]),
        "eight": torch.randn(6).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 4),
    }
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    found = {name: tensor.clone() for name, tensor in iterate_tensors(path)}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(raw(found[name]), raw(tensor))


def raw(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, for types that torch does not compare."""
    return tensor.reshape(-1).view(torch.uint8)


def test_unaligned_tensors_are_read(tmp_path: Path) -> None:
    values = torch.randn(4)
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [4], 1, 17)}
    path = write(tmp_path / "x.safetensors", header, b"\7" + values.numpy().tobytes())
    found = {name: tensor.clone() for name, tensor in iterate_tensors(path)}
    assert torch.equal(found["b"], values)


GOOD = {"a": entry("F32", [2, 2], 0, 16), "b": entry("F16", [3], 16, 22)}
DATA = bytes(range(22))


def test_the_good_header_is_good(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, DATA)
    assert [e.name for e in read_header(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a safetensors file"),
        (b"1234567", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "cut off"),
        (struct.pack("<Q", 2**63) + b"{}", "cut off"),
        (struct.pack("<Q", 2) + b"[]", "not an object"),
        (struct.pack("<Q", 2) + b"{]", "broken"),
        (struct.pack("<Q", 2) + b"\xff\xfe", "broken"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "broken"),
        (struct.pack("<Q", 13) + b'{"a":1,"a":2}', "twice"),
    ],
)
def test_broken_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=message):
        read_header(path)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (entry("F32", [2, 2], 0, 12), "needs 16 bytes"),
        (entry("F32", [0, 2**63], 0, 0), "none can have"),
        (entry("F32", [0, 2**40, 2**40], 0, 0), "none can have"),
        (entry("F32", [1] * 65, 0, 4), "none can have"),
        (entry("F32", [2**62, 2**62], 0, 16), "needs"),
        (entry("F32", [-2, -2], 0, 16), "no natural number"),
        (entry("F32", [2.0, 2], 0, 16), "no natural number"),
        (entry("F32", [True, 4], 0, 16), "no natural number"),
        (entry("F32", "22", 0, 16), "no natural number"),
        (entry("F32", [2, 2], -16, 0), "no natural number"),
        (entry("F32", [2, 2], 16, 0), "offsets give -16"),
        (entry("F32", [2, 2], 2**70, 2**70 + 16), "hole|cut off"),
        (entry("F32", [2, 2], 4, 20), "hole"),
        (entry("Q99", [2, 2], 0, 16), "dtype 'Q99'"),
        (entry(["F32"], [2, 2], 0, 16), "not supported"),  # type: ignore[arg-type]
        ({"dtype": "F32", "shape": [2, 2]}, "data_offsets"),
        ({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 8, 16]}, "data_offsets"),
        (17, "needs dtype"),
    ],
)
def test_bad_entries_are_refused_by_name(tmp_path: Path, bad: Any, message: str) -> None:
    path = write(tmp_path / "x.safetensors", {**GOOD, "a": bad}, DATA)
    with pytest.raises(LoadError, match=message) as caught:
        read_header(path)
    assert re.search("tensor [ab] ", str(caught.value))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(path, "pt").__enter__()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DATA[:-1], "tensor b ends at byte .* the file has .* cut off"),
        (b"", "tensor a ends at byte"),
        (DATA + b"!", "its tensors end at"),
    ],
)
def test_cut_or_padded_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", GOOD, data)
    with pytest.raises(LoadError, match=message):
        read_header(path)


@settings(max_examples=100, deadline=None)
@given(position=st.integers(8, 200), byte=st.integers(0, 255), cut=st.integers(0, 30))
def test_damaged_headers_never_pass_where_the_package_refuses(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: int
) -> None:
    """One changed byte and a cut end: LoadError, or the very tensors that safetensors reads."""
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    write(path, GOOD, DATA)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = byte
    path.write_bytes(content[: len(content) - cut % 3])
    try:
        ours = {name: tensor.clone() for name, tensor in iterate_tensors(path)}
    except LoadError:
        return
    theirs = safetensors.torch.load_file(path)
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert tensor.shape == theirs[name].shape
        assert torch.equal(raw(tensor), raw(theirs[name]))


# choosing files


def test_sharded_checkpoint_loads_like_one_file(tmp_path: Path) -> None:
    make_case(tmp_path / "one", "llama")
    make_case(tmp_path / "many", "llama", max_shard_size="20KB")
    files = weight_files(tmp_path / "many")
    assert len(files.paths) > 3
    assert files.total_bytes > 0
    one, many = (run_all(load(tmp_path / name), IDS)[0] for name in ("one", "many"))
    assert torch.equal(one, many)


def test_other_files_beside_the_weights_are_left_alone(tmp_path: Path) -> None:
    make_case(tmp_path, "llama", max_shard_size="20KB")
    for name in ("consolidated.safetensors", "adapter_model.safetensors", "stray.safetensors"):
        (tmp_path / name).write_bytes(b"junk")
    assert run_all(load(tmp_path), IDS)[0].isfinite().all()


def test_consolidated_files_are_left_alone_without_an_index(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    (tmp_path / "consolidated.safetensors").write_bytes(b"junk")
    assert [path.name for path in weight_files(tmp_path).paths] == ["model.safetensors"]


def test_a_tensor_in_two_shards_is_read_from_the_one_in_the_index(tmp_path: Path) -> None:
    first, second = torch.ones(2), torch.zeros(2)
    safetensors.torch.save_file({"a": first, "b": second}, tmp_path / "1.safetensors")
    safetensors.torch.save_file({"a": second, "c": second.clone()}, tmp_path / "2.safetensors")
    index = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    found = [(name, tensor.clone()) for name, tensor in iterate_weights(weight_files(tmp_path))]
    assert [name for name, _ in found] == ["a", "b", "c"]
    assert torch.equal(found[0][1], first)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors, which does not exist"),
        ({"weight_map": {"a": "../x.safetensors"}}, "plain file name"),
        ({"weight_map": {"a": "/etc/passwd"}}, "plain file name"),
        ({"weight_map": {"a": ".."}}, r"no \*\.safetensors file"),
        ({"weight_map": {"a": 3}}, "must map"),
        ({"weight_map": {}}, "names no files"),
        ({}, "no weight index"),
        ([], "no weight index"),
    ],
)
def test_bad_index_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(LoadError, match=message):
        weight_files(tmp_path)


def test_no_weights_names_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"no \*.safetensors files$"):
        weight_files(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(LoadError, match=r"pytorch_model.bin: --load-format pt reads it"):
        weight_files(tmp_path)


# finding checkpoints


def test_local_folder_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert resolve_model_path(str(tmp_path), "", "") == tmp_path
    assert DefaultModelLoader().download_model(str(tmp_path)) == tmp_path


def test_paths_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").touch()
    with pytest.raises(LoadError, match="is a file"):
        resolve_model_path(str(tmp_path / "x.onnx"))
    with pytest.raises(LoadError, match="neither a folder nor a hub id"):
        resolve_model_path(str(tmp_path / "missing"))


def test_hub_ids_take_only_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fnmatch

    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model_path("owner/name", "v1", "/cache") == tmp_path
    assert (asked["repo"], asked["revision"], asked["cache_dir"]) == ("owner/name", "v1", "/cache")

    def taken(name: str) -> bool:
        def match(key: str) -> bool:
            return any(fnmatch.fnmatch(name, pattern) for pattern in asked[key])

        return match("allow_patterns") and not match("ignore_patterns")

    needed = ["model-00001-of-2.safetensors", INDEX, "config.json", "tokenizer.json", "merges.txt"]
    assert all(taken(name) for name in [*needed, "tokenizer.model", "chat_template.jinja"])
    unneeded = ["pytorch_model.bin", "consolidated.safetensors", "original/params.json", "x.onnx"]
    assert not any(taken(name) for name in unneeded)


def test_hub_offline_is_an_error_at_once(tmp_path: Path) -> None:
    code = (
        "from headrace.loader.files import resolve_model_path\n"
        "from headrace.core.errors import LoadError\n"
        "try: resolve_model_path('nobody/nothing', '', " + repr(str(tmp_path)) + ")\n"
        "except LoadError as error: print('refused:', error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert "refused: nobody/nothing is no local folder" in result.stdout, result.stderr


def test_files_module_needs_no_torch() -> None:
    code = "import headrace.loader.files, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


@pytest.mark.slow
def test_loader_and_models_need_no_transformers() -> None:
    code = (
        "import headrace.loader.default, headrace.loader.dummy, headrace.models.llama, sys\n"
        "print(sorted({'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# filling models


def whole(packed: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    return ops.embedding_packed(torch.arange(packed.out_size), packed, dtype)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_any_dtype_load_into_any_dtype(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype
) -> None:
    oracle = make_case(tmp_path, "llama", dtype=stored)
    model: Any = load(tmp_path, wanted)
    for ours, theirs in (
        (whole(model.embedding.packed, wanted), oracle.model.embed_tokens.weight),
        (
            whole(model.layers[0].mlp.down.weights["packed"], wanted),
            oracle.model.layers[0].mlp.down_proj.weight,
        ),
    ):
        assert ours.dtype == wanted
        assert torch.equal(ours, theirs.detach().to(wanted))


def edited(folder: Path, change: Any) -> Path:
    """A qwen2 checkpoint whose tensors went through `change`."""
    make_case(folder, "qwen2")
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return folder


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: tensors.pop("model.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(
        LoadError, match=r"missing tensor model.layers.1.self_attn.k_proj.bias with shape \(32,\)"
    ):
        load(tmp_path)


def test_unexpected_tensor_is_named(tmp_path: Path) -> None:
    edited(tmp_path, lambda tensors: tensors.update({"model.extra": torch.ones(3, 2)}))
    with pytest.raises(LoadError, match=r"unexpected tensor model.extra with shape \(3, 2\)"):
        load(tmp_path)


def test_wrong_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    edited(tmp_path, lambda tensors: tensors.update({name: torch.ones(32, 45)}))
    with pytest.raises(LoadError, match=rf"{name} has shape \(32, 45\).*\(32, 44\)"):
        load(tmp_path)


def test_wrong_dtype_is_named(tmp_path: Path) -> None:
    name = "model.norm.weight"
    edited(tmp_path, lambda tensors: tensors.update({name: torch.ones(32, dtype=torch.int8)}))
    with pytest.raises(LoadError, match=rf"{name} has dtype int8"):
        load(tmp_path)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edited(tmp_path, lambda tensors: tensors.update({name: torch.ones(8)}))
    assert run_all(load(tmp_path), IDS)[0].isfinite().all()


def test_tied_checkpoint_may_carry_the_head(tmp_path: Path) -> None:
    make_case(tmp_path, "llama-tied")
    path = tmp_path / "model.safetensors"
    before = run_all(load(tmp_path), IDS)[0]
    tensors = safetensors.torch.load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(tensors, path)
    assert torch.equal(run_all(load(tmp_path), IDS)[0], before)


def fuse(tensors: dict[str, Tensor]) -> None:
    """q, k, v and gate, up stacked, as some checkpoints store them."""
    for layer in range(3):
        for block, parts, stacked in (
            ("self_attn", ("q_proj", "k_proj", "v_proj"), "qkv_proj"),
            ("mlp", ("gate_proj", "up_proj"), "gate_up_proj"),
        ):
            for suffix in ("weight", "bias"):
                names = [f"model.layers.{layer}.{block}.{part}.{suffix}" for part in parts]
                if names[0] in tensors:
                    joined = torch.cat([tensors.pop(name) for name in names])
                    tensors[f"model.layers.{layer}.{block}.{stacked}.{suffix}"] = joined


def test_fused_checkpoints_load(tmp_path: Path) -> None:
    make_case(tmp_path / "plain", "qwen2")
    edited(tmp_path / "fused", fuse)
    plain, fused = (run_all(load(tmp_path / name), IDS)[0] for name in ("plain", "fused"))
    assert torch.equal(plain, fused)


def test_the_same_weight_twice_is_refused(tmp_path: Path) -> None:
    make_case(tmp_path, "qwen2")
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    fuse(tensors)
    safetensors.torch.save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(LoadError, match="twice"):
        load(tmp_path)


# made-up weights


def test_dummy_values_depend_on_name_and_index_only() -> None:
    small, large = dummy_tensor("a", (1000,)), dummy_tensor("a", (2_500_000,))
    assert torch.equal(small, large[:1000])
    assert not torch.equal(small, dummy_tensor("b", (1000,)))
    assert large.abs().max() <= 0.02
    assert abs(large.mean().item()) < 1e-4
    assert large.std().item() == pytest.approx(0.02 / 3**0.5, rel=0.01)
    rows = dummy_tensor("m", (64, 4096))
    assert len(torch.unique(rows[:, 0])) == 64


def test_dummy_norms_are_around_one() -> None:
    found = dict(dummy_weights({"model.norm.weight": (8,), "x.bias": (8,)}))
    assert (found["model.norm.weight"] - 1).abs().max() <= 0.02
    assert found["x.bias"].abs().max() <= 0.02


def test_dummy_needs_only_the_config_and_stays_finite(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()
    model = load_model(read_model_info(tmp_path), torch.bfloat16, SoloGroup(), "dummy")
    result = run_all(model, IDS, dtype=torch.bfloat16)[0]
    assert result.isfinite().all()
    assert result.std() > 0


# the loaders


def test_load_formats() -> None:
    assert type(get_model_loader("auto")) is type(get_model_loader("safetensors"))
    assert type(get_model_loader("dummy")).__name__ == "DummyModelLoader"
    assert tuple(LOADERS) == LOAD_FORMATS
    for name in LOADERS:
        assert get_model_loader(name).load_format == name
    with pytest.raises(BadRequest, match="--load-format must be one of auto, safetensors, pt"):
        get_model_loader("pickle")


def test_a_class_is_a_load_format(tmp_path: Path) -> None:
    class Mine(DefaultModelLoader):
        pass

    make_case(tmp_path, "llama")
    assert type(get_model_loader(Mine)) is Mine
    model = load_model(read_model_info(tmp_path), torch.float32, SoloGroup(), Mine)
    assert torch.equal(run_all(model, IDS)[0], run_all(load(tmp_path), IDS)[0])


def test_a_load_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_case(tmp_path, "llama")
    with caplog.at_level("INFO", logger="headrace.loader"):
        load(tmp_path, torch.bfloat16)
    begin, end = (record.getMessage() for record in caplog.records)
    assert begin.startswith("Load weight begin. avail mem=")
    assert "type=LlamaForCausalLM, dtype=bfloat16" in end
    assert "elapsed=" in end
    assert "mem usage=" in end


@pytest.mark.slow
def test_reading_needs_one_tensor_of_memory(tmp_path: Path) -> None:
    """Over a 192 MB file of 12 MB tensors, in a process of its own: one of them and what is read
    ahead is resident at most, and all of that is pages of the file."""
    tensors = {f"t{i}": torch.full((3 << 20,), float(i)) for i in range(16)}
    path = tmp_path / "big.safetensors"
    safetensors.torch.save_file(tensors, path)
    code = (
        "import sys, pathlib, torch\n"
        "from headrace.loader.safetensors import iterate_tensors\n"
        "def status(key):\n"
        "    text = open('/proc/self/status').read().split(key + ':')[1]\n"
        "    return int(text.split()[0]) // 1024\n"
        "torch.ones(1000).sum()\n"
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before, own, total, most = status('VmRSS'), status('RssAnon'), 0.0, 0\n"
        "for name, tensor in iterate_tensors(pathlib.Path(sys.argv[1])):\n"
        "    total += float(tensor.sum())\n"
        "    most = max(most, status('RssAnon') - own)\n"
        "print(total / (3 << 20), most, status('VmHWM') - before)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120
    )
    total, own, peak = result.stdout.split()
    assert float(total) == sum(range(16)), result.stderr
    assert int(own) < 16
    assert int(peak) < 40 + (_AHEAD >> 20)


# packing while loading

PARTS = {"heads": (Span(32, 0, 32), Span(64, 32, 32), Span(0, 64, 32)), "odd": (Span(0, 0, 40),)}


@pytest.mark.parametrize("dtypes", itertools.product((torch.bfloat16, torch.float32), repeat=2))
@pytest.mark.parametrize("turned", [False, True])
def test_parts_go_where_the_whole_matrix_has_them(
    dtypes: tuple[torch.dtype, ...], turned: bool
) -> None:
    """Heads in another order, a last part that is no whole panel, some of the columns."""
    columns = Cut(48, 40, (Span(8, 0, 40),))
    cuts = [Cut(96, 96, PARTS["heads"]), Cut(40, 40, PARTS["odd"])]
    shape = LinearShape(tuple(Part(f"{i}", cut) for i, cut in enumerate(cuts)), columns)
    weights = AS_IS.create_weights(shape, torch.float32)
    targets = AS_IS.targets(shape, weights, "")
    sources = [
        torch.randn(48, cut.full).T.to(dtype) if turned else torch.randn(cut.full, 48).to(dtype)
        for cut, dtype in zip(cuts, dtypes, strict=True)
    ]
    for target, source in zip(targets.values(), sources, strict=True):
        target.copy(source)
    AS_IS.process_after_loading(weights)
    rows = [source[span.source :][: span.count] for source, cut in zip(sources, cuts, strict=True)
            for span in cut.spans]  # fmt: skip
    whole = torch.cat([part.float() for part in rows])[:, 8:]
    packed = weights["packed"]
    assert torch.equal(ops.embedding_packed(torch.arange(136), packed, torch.float32), whole)
    with pytest.raises(LoadError, match="packed already"):
        targets["0.weight"].copy(sources[0])
