"""Every way to read a checkpoint gives the same model; files that lie are refused by name."""

import base64
import hashlib
import io
import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiktoken
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
from headrace.loader.files import MISTRAL, TORCH, resolve_model_path, weight_files
from headrace.loader.iterators import Read, drop_cached, iterate_weights, prefetched, streamed
from headrace.loader.layered import module_order
from headrace.loader.npcache import np_cache_weights
from headrace.loader.tekken import tokenizer_of
from headrace.loader.torch_file import read_torch_file
from headrace.quant.base import Matrix
from headrace.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.checkpoints import make_case
from tests.support.paged import run_all
from tests.support.quantized import fp8_tensor, rewrite

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


# Mistral's own form


def as_mistral(source: Path, target: Path, case: str) -> None:
    """A checkpoint of transformers with the names, rows and params.json of Mistral."""
    config = json.loads((source / "config.json").read_text())
    tensors = safetensors.torch.load_file(source / "model.safetensors")
    heads, kv, dim = config["num_attention_heads"], config["num_key_value_heads"], 16
    short = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    short |= {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    native = {}
    for name, tensor in tensors.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else kv
            halves = tensor.view(count, 2, dim // 2, -1)
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        for theirs, ours in (
            ("model.embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("model.", ""),
            ("self_attn", "attention"), ("block_sparse_moe", "feed_forward"),
            ("mlp", "feed_forward"), ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "ffn_norm"), ("weight_scale", "qscale_weight"),
            ("input_scale", "qscale_act"), *short.items(),
        ):  # fmt: skip
            name = name.replace(theirs, ours)
        native[name] = tensor
    params = {
        "dim": config["hidden_size"],
        "n_layers": config["num_hidden_layers"],
        "head_dim": dim,
        "hidden_dim": config["intermediate_size"],
        "n_heads": heads,
        "n_kv_heads": kv,
        "norm_eps": config["rms_norm_eps"],
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
    }
    if "quantization_config" in config:
        params["quantization"] = {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"}
    if case == "mixtral":
        params["moe"] = {"num_experts": 5, "num_experts_per_tok": 2}
    target.mkdir()
    safetensors.torch.save_file(native, target / "consolidated.safetensors")
    (target / "params.json").write_text(json.dumps(params))


def native_logits(folder: Path, ids: list[int]) -> Tensor:
    """Mistral's network as its paper has it: neighbors of a head turn as complex numbers."""
    w = safetensors.torch.load_file(folder / "consolidated.safetensors")
    p = json.loads((folder / "params.json").read_text())
    dim, heads, kv = p["head_dim"], p["n_heads"], p["n_kv_heads"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + p["norm_eps"]).rsqrt() * w[f"{name}.weight"]

    angles = torch.outer(
        torch.arange(len(ids)).float(),
        p["rope_theta"] ** -(torch.arange(0, dim, 2).float() / dim),
    )
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(x: Tensor, count: int) -> Tensor:
        pairs = torch.view_as_complex(x.view(len(ids), count, dim // 2, 2))
        return torch.view_as_real(pairs * turn).flatten(2)

    x = w["tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for i in range(p["n_layers"]):
        base = f"layers.{i}."
        y = norm(x, f"{base}attention_norm")
        q, k, v = (y @ w[f"{base}attention.w{c}.weight"].T for c in "qkv")
        k = turned(k, kv).repeat_interleave(heads // kv, 1)
        v = v.view(len(ids), kv, dim).repeat_interleave(heads // kv, 1)
        scores = torch.einsum("ihd,jhd->hij", turned(q, heads), k) * dim**-0.5 + mask
        mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w[f"{base}attention.wo.weight"].T
        y = norm(x, f"{base}ffn_norm")
        gate, up = (y @ w[f"{base}feed_forward.w{c}.weight"].T for c in "13")
        x = x + (torch.nn.functional.silu(gate) * up) @ w[f"{base}feed_forward.w2.weight"].T
    return norm(x, "norm") @ w["output.weight"].T


@pytest.mark.parametrize("case", ["mistral", "mixtral"])
def test_mistral_folders_load(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_case(tmp_path / "usual", case, rope_theta=10000.0)
    as_mistral(tmp_path / "usual", tmp_path / "native", case)
    folder = resolve_model_path(str(tmp_path / "native"))
    assert resolve_model_path(str(tmp_path / "native")) == folder
    found = logits(folder)
    assert torch.equal(found, logits(tmp_path / "usual"))
    if case == "mistral":
        expected = native_logits(tmp_path / "native", IDS[0])
        assert torch.allclose(found, expected, atol=1e-4), (found - expected).abs().max()
    # A folder with both is read as it is asked for.
    for path in (tmp_path / "usual").iterdir():
        (tmp_path / "native" / path.name).write_bytes(path.read_bytes())
    assert resolve_model_path(str(tmp_path / "native")) == tmp_path / "native"
    both = resolve_model_path(str(tmp_path / "native"), load_format="mistral")
    assert both.parent == folder.parent
    assert weight_files(tmp_path / "native", MISTRAL).paths[0].name == "consolidated.safetensors"
    assert torch.equal(logits(both, "mistral"), found)


def test_mistral_folders_of_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_case(tmp_path / "usual", "mistral", rope_theta=10000.0)
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    rewrite(tmp_path / "usual", config, fp8_tensor(static=True))
    as_mistral(tmp_path / "usual", tmp_path / "native", "mistral")
    native = resolve_model_path(str(tmp_path / "native"))
    assert torch.equal(logits(native), logits(tmp_path / "usual"))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("[]", "holds list"),
        ("{", "cannot be read"),
        ('{"dim": 4}', "n_layers must be a positive integer"),
        ('{"dim": "4"}', "dim must be"),
        ('{"quantization": {"qformat_weight": "int4"}}', "qformat_weight must be fp8_e4m3"),
        ('{"dim": 4, "vision_encoder": {"a": 1}}', "vision_encoder.* not supported"),
    ],
)
def test_bad_params_are_refused(
    tmp_path: Path, params: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "params.json").write_text(params)
    with pytest.raises(LoadError, match=message):
        resolve_model_path(str(tmp_path))


_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MERGED = ["he", "ll", "hell", "hello", " w", "or", " wor", "ld", " world", "th", "the", " the",
           "in", "ing", "é", "日", "日本", "  ", "an", "and", " a", " and"]  # fmt: skip


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, tiktoken.Encoding]:
    """A small vocabulary: ours, and tiktoken's of the same ranks."""
    folder = tmp_path_factory.mktemp("tekken")
    words = [bytes([i]) for i in range(256)] + [word.encode() for word in _MERGED]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for i, word in enumerate([*words, b"beyond"])
    ]
    config = {
        "pattern": _WORDS,
        "default_vocab_size": len(words) + 30,
        "default_num_special_tokens": 30,
    }
    made, own = tokenizer_of({"config": config, "vocab": vocab}, folder)
    (folder / "tokenizer.json").write_text(json.dumps(made))
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    ranks = {word: i for i, word in enumerate(words)}
    oracle = tiktoken.Encoding("x", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens={})
    return load_tokenizer(folder), oracle


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="helo wrdthing and日本é1 \n.!/", max_size=40) | st.text(max_size=20))
def test_tekken_splits_text_as_tiktoken_does(
    tekken: tuple[Tokenizer, tiktoken.Encoding], text: str
) -> None:
    tokenizer, oracle = tekken
    if any(name in text for name in ("<s>", "</s>", "[INST]")):
        return
    expected = [1] + [30 + i for i in oracle.encode_ordinary(text)]
    assert tokenizer.encode(text) == expected
    assert tokenizer.decode(expected[1:]) == text


@pytest.mark.parametrize(
    "change",
    [
        {"vocab": None},
        {"config": {}},
        {"vocab": [{"rank": 0, "token_bytes": "!"}]},
        {"vocab": [{"rank": 0, "token_bytes": "YQ=="}]},
        {"special_tokens": [{"rank": 99, "token_str": "x"}]},
    ],
)
def test_bad_vocabularies_are_refused(change: dict[str, Any]) -> None:
    config = {"pattern": "a", "default_vocab_size": 300, "default_num_special_tokens": 20}
    with pytest.raises(LoadError, match=r"tekken\.json"):
        tokenizer_of({"config": config, "vocab": [], **change}, Path("tekken.json"))


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
