"""Every way to read a checkpoint gives the same model; files that lie are refused by name."""

import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.cli.main import main
from headrace.core.errors import BadRequest, LoadError
from headrace.core.model_info import read_model_info
from headrace.core.weight_options import LoadOptions
from headrace.dist.comm import SoloGroup
from headrace.loader import get_model_loader, load_model
from headrace.loader.checksum import verify
from headrace.loader.convert import convert_folder
from headrace.loader.files import TORCH, weight_files
from headrace.loader.iterators import Read, drop_cached, iterate_weights, prefetched, streamed
from headrace.loader.layered import module_order
from headrace.loader.npcache import np_cache_weights
from headrace.loader.torch_file import read_torch_file
from headrace.quant.base import Matrix
from tests.support.checkpoints import make_case
from tests.support.paged import run_all

IDS = [[5, 9, 33, 70, 21, 8]]


def logits(folder: Path, load_format: str = "auto", **options: Any) -> Tensor:
    info = read_model_info(folder)
    asked = LoadOptions(**options)
    model = load_model(info, torch.float32, SoloGroup(), load_format, options=asked)
    return run_all(model, IDS)[0]


def as_bin(folder: Path, files: int = 1) -> None:
    """The checkpoint of `folder` as torch.save writes it."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    shards = {f"pytorch_model-{i}.bin": names[i::files] for i in range(files)}
    for file, own in shards.items():
        torch.save({name: tensors[name] for name in own}, folder / file)
    index = {name: file for file, own in shards.items() for name in own}
    if files > 1:
        (folder / TORCH.index).write_text(json.dumps({"weight_map": index}))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("qwen")
    make_case(folder, "qwen3", max_shard_size="20KB")
    return folder, logits(folder)


# ways to read


@pytest.mark.parametrize(
    ("load_format", "options"),
    [
        ("safetensors", {}),
        ("layered", {}),
        ("layered", {"model_loader_extra_config": '{"enable_multithread_load": true}'}),
        ("auto", {"weight_loader_disable_mmap": True}),
        ("auto", {"model_loader_extra_config": '{"enable_multithread_load":true,"num_threads":3}'}),
        ("auto", {"weight_loader_prefetch_checkpoints": True}),
        ("auto", {"weight_loader_drop_cache_after_load": True}),
    ],
)
def test_every_way_gives_the_same_bits(
    qwen: tuple[Path, Tensor], load_format: str, options: dict[str, Any]
) -> None:
    assert torch.equal(logits(qwen[0], load_format, **options), qwen[1])


@pytest.mark.parametrize(
    ("load_format", "text", "message"),
    [
        ("auto", '{"num_thread": 3}', "num_thread.*enable_multithread_load, num_threads"),
        ("auto", '{"num_threads": 0}', "num_threads"),
        ("auto", '{"num_threads": "3"}', "num_threads"),
        ("auto", "[]", "settings it has"),
        ("auto", "{", "settings it has"),
        ("dummy", '{"num_threads": 3}', "settings it has: none"),
        ("sharded_state", '{"patern": "x"}', "settings it has: pattern"),
    ],
)
def test_settings_are_checked(load_format: str, text: str, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        get_model_loader(load_format, LoadOptions(model_loader_extra_config=text))
    assert caught.value.field == "model_loader_extra_config"


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 700 << 20), max_size=30), threads=st.integers(1, 5))
def test_streams_keep_their_order_and_their_bound(sizes: list[int], threads: int) -> None:
    """What is read and not yet used is at most 512 MB, or one tensor."""
    held = 0
    most = 0

    def reading(size: int, number: int) -> Tensor:
        nonlocal held, most
        held += size
        most = max(most, held)
        return torch.tensor(number)

    reads = [
        Read(str(i), size, lambda size=size, i=i: reading(size, i))  # type: ignore[misc]
        for i, size in enumerate(sizes)
    ]
    for index, (name, tensor) in enumerate(streamed(reads, threads)):
        assert name == str(index) and tensor.item() == index
        held -= sizes[index]
    assert most <= max([512 << 20, *sizes]) + (max(sizes, default=0) if threads > 1 else 0)


def test_a_stream_that_is_given_up_ends_its_threads() -> None:
    stream = streamed([Read(str(i), 1, lambda: torch.ones(1)) for i in range(50)], 4)
    next(stream)
    stream.close()


def test_an_error_of_a_thread_comes_out() -> None:
    def broken() -> Tensor:
        raise LoadError("tensor 1 cannot be read")

    reads = [Read("0", 1, lambda: torch.ones(1)), Read("1", 1, broken)]
    with pytest.raises(LoadError, match="tensor 1 cannot"):
        list(streamed(reads, 2))


def test_prefetching_ends_early_and_reads_all(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(3)]
    for path in paths:
        path.write_bytes(bytes(100_000))
    with prefetched(paths, 2):
        pass
    drop_cached(paths)


def test_modules_come_in_their_order() -> None:
    names = ["l.10.b.w", "l.9.a.w", "l.10.a.w", "embed", "l.9.b.10", "l.9.b.9"]
    assert sorted(names, key=module_order) == [
        *("embed", "l.9.a.w", "l.9.b.9", "l.9.b.10", "l.10.a.w", "l.10.b.w")
    ]


def watch_matrices(patch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of unpacked matrices after each change, from now on."""
    live: dict[int, int] = {}
    found = []
    opened, packed = Matrix.open, Matrix.pack

    def opening(self: Matrix, source: torch.dtype) -> Tensor:
        values = opened(self, source)
        live[id(self)] = values.nbytes
        found.append(sum(live.values()))
        return values

    def packing(self: Matrix, *args: Any) -> Any:
        live.pop(id(self), None)
        return packed(self, *args)

    patch.setattr(Matrix, "open", opening)
    patch.setattr(Matrix, "pack", packing)
    return found


@pytest.mark.parametrize("case", ["qwen3", "gpt2", "qwen2-moe", "falcon-40b", "mixtral"])
def test_layered_holds_one_module_at_a_time(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From files in which the parts of a matrix are far apart, other loaders hold nearly all."""
    oracle = make_case(tmp_path / "plain", case)
    (path,) = (tmp_path / "plain").glob("*.safetensors")
    tensors = safetensors.torch.load_file(path)
    index = {}
    for file, name in enumerate(sorted(tensors, key=lambda name: name.split(".")[-2:])):
        index[name] = f"{file:03}.safetensors"
        safetensors.torch.save_file({name: tensors[name]}, path.parent / index[name])
    path.unlink()
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with torch.no_grad():
        expected = oracle(torch.tensor(IDS)).logits[0]
    peaks = {}
    for load_format in ("auto", "layered"):
        with monkeypatch.context() as patch:
            live = watch_matrices(patch)
            result = logits(path.parent, load_format)
        peaks[load_format] = max(live)
        assert torch.allclose(result, expected, atol=2e-4), (result - expected).abs().max()
    embedding = oracle.get_input_embeddings().weight.nbytes
    assert peaks["layered"] <= peaks["auto"]
    assert peaks["layered"] <= max(embedding, 32 * 64 * 4 * 4)


# .bin files


@pytest.mark.parametrize("files", [1, 3])
def test_bin_files_load_when_asked_for(tmp_path: Path, files: int) -> None:
    make_case(tmp_path, "llama-tied")
    expected = logits(tmp_path)
    as_bin(tmp_path, files)
    for name in ("training_args.bin", "optimizer.bin", "scheduler.bin"):
        (tmp_path / name).write_bytes(b"junk")
    with pytest.raises(LoadError, match=r"pytorch_model.*bin: --load-format pt"):
        logits(tmp_path)
    assert torch.equal(logits(tmp_path, "pt"), expected)
    assert torch.equal(logits(tmp_path, "npcache"), expected)
    assert torch.equal(logits(tmp_path, "npcache"), expected)
    convert_folder(tmp_path, tmp_path / "new")
    assert torch.equal(logits(tmp_path / "new"), expected)
    with pytest.raises(LoadError, match="already"):
        convert_folder(tmp_path, tmp_path / "new")


def test_numpy_files_keep_every_dtype_and_follow_the_checkpoint(tmp_path: Path) -> None:
    kinds = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8, torch.bool)
    tensors = {str(kind): torch.randn(3, 4).to(kind) for kind in kinds} | {"s": torch.tensor(2.5)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for _ in range(2):
        found = dict(np_cache_weights(tmp_path, weight_files(tmp_path, TORCH)))
        assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
            n: (t.dtype, t.shape) for n, t in tensors.items()
        }
        assert all(torch.equal(found[n].float(), t.float()) for n, t in tensors.items())
    torch.save({"other": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert set(dict(np_cache_weights(tmp_path, weight_files(tmp_path, TORCH)))) == {"other"}
    (tmp_path / "np" / "other.npy").write_bytes(b"junk")
    with pytest.raises(LoadError, match=r"other\.npy: tensor other"):
        list(np_cache_weights(tmp_path, weight_files(tmp_path, TORCH)))


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_programs_in_bin_files_do_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"a": Evil()}, tmp_path / "x.bin")
    with pytest.raises(LoadError, match=r"x\.bin is no file of weights"):
        read_torch_file(tmp_path / "x.bin")
    assert capsys.readouterr().out == ""


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def test_archives_that_grow_are_refused(tmp_path: Path) -> None:
    """A zip bomb: parts that are compressed, or that lie about their size."""
    good = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(1000)})))
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in good.namelist():
            bomb.writestr(name, good.read(name))
    with pytest.raises(LoadError, match=r"x\.bin.*is compressed"):
        read_torch_file(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (saved([torch.ones(1)]), "holds list, not tensors by name"),
        (saved({}), "not tensors by name"),
        (saved({"a": 3}), "'a' is no named tensor"),
        (saved({3: torch.ones(1)}), "'3' is no named tensor"),
        (saved({"a": torch.ones(1).expand(1 << 40)}), "tensor a .*repeats"),
        (saved({"a": torch.eye(2).to_sparse()}), "tensor a is sparse"),
        (saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False), "older forms"),
        (b"", "no zip archive"),
        (b"junk" * 100, "no zip archive"),
    ],
)
def test_what_is_no_state_dict_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(LoadError, match=message) as caught:
        read_torch_file(tmp_path / "x.bin")
    assert "x.bin" in str(caught.value)


def test_wrapped_and_shared_tensors_are_read(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    torch.save({"state_dict": {"a": whole[:3], "b": whole[3:], "c": whole}}, tmp_path / "x.pt")
    found = read_torch_file(tmp_path / "x.pt")
    assert torch.equal(torch.cat([found["a"], found["b"]]), found["c"])
    (tmp_path / "new").mkdir()
    convert_folder(tmp_path, tmp_path / "new")
    converted = safetensors.torch.load_file(tmp_path / "new" / "x.safetensors")
    assert all(torch.equal(converted[name], found[name]) for name in found)


GOOD_BIN = saved({"a": torch.arange(4.0), "b": torch.ones(2, 2).half()})


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 2000),
)
def test_damaged_bin_files_are_an_error_or_bounded(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], cut: int
) -> None:
    content = bytearray(GOOD_BIN)
    for position, byte in changes:
        content[position % len(content)] = byte
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(content[: len(content) - (cut if cut < 50 else 0)])
    try:
        found = read_torch_file(path)
    except LoadError as error:
        assert "damaged.bin" in error.message
        return
    assert sum(tensor.clone().nbytes for tensor in found.values()) <= len(content)


# sums


def sums(folder: Path) -> str:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    return "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in files)


def test_sums_of_files(qwen: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Written by sha256sum's rules, or as JSON; a changed byte is found and named."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in qwen[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lines = sums(folder)
    manifest = tmp_path / "SHA256SUMS"
    manifest.write_text(lines)
    checked = subprocess.run(["sha256sum", "-c", "--quiet", str(manifest)], cwd=folder)
    assert checked.returncode == 0
    assert torch.equal(logits(folder, model_checksum=str(manifest)), qwen[1])
    pairs = {line[66:]: line[:64] for line in lines.splitlines()}
    for listed in (pairs, {"files": {n: {"sha256": s} for n, s in pairs.items()}}):
        manifest.write_text(json.dumps(listed))
        assert torch.equal(logits(folder, model_checksum=str(manifest)), qwen[1])
    name = "model-00002-of-00009.safetensors"
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(LoadError, match=rf"{name} has SHA-256"):
        logits(folder, model_checksum=str(manifest))
    (folder / name).unlink()
    with pytest.raises(LoadError, match=rf"{name}.* does not exist"):
        verify(manifest, folder, [])
    manifest.write_text(json.dumps({k: v for k, v in pairs.items() if k != name}))
    with pytest.raises(LoadError, match=rf"{name} is not listed"):
        verify(manifest, folder, [folder / name])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lists no files"),
        ("zzz  a", "no line of sha256sum"),
        ('{"a": "12"}', "sum of a is no SHA-256"),
        ('{"files": []}', "must map"),
        ("{", "no JSON"),
        (f"{'0' * 64}  ../a", "outside"),
        (f"{'0' * 64}  /etc/passwd", "outside"),
    ],
)
def test_bad_lists_of_sums_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list").write_text(text)
    with pytest.raises(LoadError, match=message):
        verify(tmp_path / "list", tmp_path, [])


# the command


def test_convert_weights_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make_case(tmp_path / "m", "llama")
    expected = logits(tmp_path / "m")
    as_bin(tmp_path / "m")
    command = ["convert-weights", str(tmp_path / "m"), "--out", str(tmp_path / "n")]
    assert main(command) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "n" / "model-0.safetensors")
    assert torch.equal(logits(tmp_path / "n"), expected)
    assert main(command) == 1
    assert "already" in capsys.readouterr().err


def test_drafts_behind_the_last_layer_are_left_out(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    expected = logits(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    tensors["model.layers.3.eh_proj.weight"] = torch.ones(2, 2)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"unexpected tensor model.layers.3.eh_proj"):
        logits(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(tmp_path), expected)


def test_iterating_maps_every_kind(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(3)}, tmp_path / "x.bin")
    assert [name for name, _ in iterate_weights(weight_files(tmp_path, TORCH))] == ["a"]
