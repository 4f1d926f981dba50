"""Weights of ranks in files, stores and hubs: what was saved comes back, or an error names it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headrace.cli.main import main
from headrace.core.errors import BadRequest, HeadraceError, LoadError, Overloaded
from headrace.core.model_info import ModelInfo, read_model_info
from headrace.core.weight_options import LoadOptions
from headrace.dist.comm import LoneRank, SoloGroup
from headrace.layers.build import Build
from headrace.loader import build_of, load_model, stores
from headrace.loader.files import resolve_model_path
from headrace.loader.sharded import parts_of, save_beside, save_sharded
from headrace.loader.stores import open_store, redacted
from headrace.models import Model, make_model
from headrace.runner.weights import WeightService
from tests.support.checkpoints import make_case
from tests.support.hub import Hub
from tests.support.paged import run_all
from tests.support.stores import redis_server

IDS = [[5, 9, 33, 70, 21, 8]]
SOLO = SoloGroup()


def load(folder: Path, load_format: str = "auto", **asked: Any) -> Model:
    info = read_model_info(folder)
    return load_model(info, torch.float32, SOLO, load_format, **asked)


def logits(model: Model) -> Tensor:
    return run_all(model, IDS)[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("model")
    make_case(found, "qwen2-moe", max_shard_size="20KB")
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> Tensor:
    return logits(load(folder))


def service(folder: Path, quantization: str = "none", **options: Any) -> WeightService:
    info = read_model_info(folder)
    build = build_of(info, torch.float32, SOLO, quantization)
    model = load_model(info, torch.float32, SOLO, quantization=quantization)
    return WeightService(model, info, build, LoadOptions(**options))


# sharded state


@pytest.mark.parametrize("quantization", ["none", "int8", "int4", "fp8"])
@pytest.mark.parametrize("max_size", [20_000, 1 << 30])
def test_saved_ranks_come_back(
    folder: Path, tmp_path: Path, quantization: str, max_size: int
) -> None:
    saver = service(folder, quantization)
    text, data = saver.do("save_sharded", {"path": str(tmp_path / "s"), "max_size": max_size})
    assert (len(data["files"]) > 3) == (max_size == 20_000), text
    again = load(tmp_path / "s", "sharded_state", quantization=quantization)
    assert torch.equal(logits(again), logits(saver.model))


def test_a_used_model_is_saved_as_it_was_loaded(folder: Path, tmp_path: Path) -> None:
    saver = service(folder)
    before = logits(saver.model)
    saver.do("save_sharded", {"path": str(tmp_path / "s")})
    assert torch.equal(logits(load(tmp_path / "s", "sharded_state")), before)


def test_every_rank_has_files_of_its_own(folder: Path, tmp_path: Path) -> None:
    """Both ranks of two, each by itself; what they hold is what they hold of the checkpoint."""
    command = ["save-weights", "--model-path", str(folder), "--out", str(tmp_path / "s")]
    assert main([*command, "--ranks", "2", "--dtype", "float32"]) == 0
    info, saved = read_model_info(folder), read_model_info(tmp_path / "s")
    for rank in range(2):
        group = LoneRank(rank, 2)
        whole: Any = load_model(info, torch.float32, group)
        part: Any = load_model(saved, torch.float32, group, "sharded_state")
        for a, b in zip(whole.layers, part.layers, strict=True):
            ours, theirs = (x.attention.qkv.weights["packed"].data for x in (a, b))
            assert torch.equal(ours, theirs)
    with pytest.raises(LoadError, match=r"rank-2-part-0.* fewer ranks"):
        load_model(saved, torch.float32, LoneRank(2, 3), "sharded_state")
    with pytest.raises(LoadError, match="saved with size 2, which is 1 here"):
        load(tmp_path / "s", "sharded_state")


def test_a_pattern_names_the_files(folder: Path, tmp_path: Path) -> None:
    pattern = "w{rank}.{part}.safetensors"
    details = {"path": str(tmp_path), "pattern": pattern, "max_size": 30_000}
    service(folder).do("save_sharded", details)
    options = LoadOptions(model_loader_extra_config=json.dumps({"pattern": pattern}))
    assert load(tmp_path, "sharded_state", options=options)
    (tmp_path / "w0.1.safetensors").unlink()
    with pytest.raises(LoadError, match=r"w0\.1\.safetensors is missing"):
        parts_of(tmp_path, pattern, 0)
    for bad in ("a", "../{rank}{part}.safetensors", "{rank}{part}{x}.safetensors", "{rank.safe}"):
        with pytest.raises(BadRequest, match="pattern must be"):
            parts_of(tmp_path, bad, 0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"quantization": "int8"}, "saved with quantization 'none', which is 'int8'"),
        ({"options": LoadOptions(model_checksum="/nowhere")}, "/nowhere cannot be read"),
    ],
)
def test_what_was_saved_otherwise_is_refused(
    folder: Path, tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    service(folder).do("save_sharded", {"path": str(tmp_path)})
    with pytest.raises(LoadError, match=message):
        load(tmp_path, "sharded_state", **asked)


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, ModelInfo, Build]:
    """A small saved model: its file and what is in it."""
    folder = tmp_path_factory.mktemp("state")
    make_case(folder / "m", "llama", num_hidden_layers=1)
    info = read_model_info(folder / "m")
    build = build_of(info, torch.float32, SOLO, "int8")
    model = load_model(info, torch.float32, SOLO, quantization="int8")
    (path,) = save_sharded(model, info, build, folder / "s")
    save_beside(info, folder / "s")
    return path, path.read_bytes(), info, build


def damaged(content: bytes, change: Any) -> bytes:
    """The same file after `change` of its places."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    saved = json.loads(header["__metadata__"]["headrace"])
    change(saved["places"])
    header["__metadata__"]["headrace"] = json.dumps(saved)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def first_packed(places: list[dict[str, Any]]) -> dict[str, Any]:
    return next(p["packed"] for p in places if p["way"][-2:] == ["weights", "packed"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda places: places.clear(), "it has no"),
        (lambda places: places.pop(), "it has no"),
        (lambda places: first_packed(places).update(in_size=1 << 40), "a matrix"),
        (lambda places: first_packed(places).update(in_size=-1), "format 'int8'"),
        (lambda places: first_packed(places).update(out_size=7), "its"),
        (lambda places: first_packed(places).update(format="float32"), "bytes, not"),
        (lambda places: first_packed(places).update(format="q9"), "format 'q9'"),
        (lambda places: first_packed(places).update(variant=9), "variant"),
        (lambda places: first_packed(places).update(scales=None), "scales"),
        (lambda places: first_packed(places).update(group=48), "group"),
        (lambda places: first_packed(places).update(extra=1), "extra"),
        (lambda places: first_packed(places)["data"].update(shape=[-1]), "no shape"),
        (lambda places: first_packed(places)["data"].update(shape=[1 << 60]), "bytes, not"),
        (lambda places: first_packed(places)["data"].update(dtype="load"), "no dtype"),
        (lambda places: first_packed(places)["data"].update(blob="x"), "'x'"),
        (lambda places: places[0].update(way=[]), "at"),
        (lambda places: places[0].update(way=["__class__"]), "at __class__"),
        (lambda places: places[0].update(way=["layers"]), "at layers: no packed weight belongs"),
        (lambda places: places[0].update(way=["layers", 99, "x"]), r"layers\.99\.x"),
        (lambda places: places.append(3), "at 3"),
    ],
)
def test_states_that_lie_are_refused(state: Any, change: Any, message: str) -> None:
    path, content, *_ = state
    path.write_bytes(damaged(content, change))
    with pytest.raises(LoadError, match=message) as caught:
        load_model(
            read_model_info(path.parent), torch.float32, SOLO, "sharded_state", quantization="int8"
        )
    assert path.name in caught.value.message


@settings(max_examples=60, deadline=None)
@given(
    changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 40),
    scales=st.none() | st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f"]),
)
def test_damaged_states_never_crash(
    state: Any, changes: list[tuple[int, int]], cut: int, scales: bytes | None
) -> None:
    """A LoadError, or a model of the right shapes (a changed weight cannot be seen)."""
    path, good, info, _ = state
    content = bytearray(good)
    header = int.from_bytes(good[:8], "little")
    for position, byte in changes:
        content[position % (header + 64)] = byte
    if scales is not None:
        entry = json.loads(good[8 : 8 + header])["layers.0.mlp.down.weights.packed.scales"]
        begin = 8 + header + entry["data_offsets"][0]
        content[begin : begin + 4] = scales
    path.write_bytes(content[: len(content) - (cut if cut < 5 else 0)])
    try:
        model = load_model(
            read_model_info(path.parent), torch.float32, SOLO, "sharded_state", quantization="int8"
        )
    except LoadError as error:
        assert path.name in error.message or "tensor" in error.message
        return
    assert scales is None
    assert logits(model).shape == (len(IDS[0]), info.vocab_size)


# stores


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    own = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="models")
        yield "s3://models"
    server.stop()


@pytest.fixture(params=["file", "redis", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where nothing is yet."""
    if request.param == "file":
        return f"file://{tmp_path}/store"
    return f"{request.getfixturevalue(f'{request.param}_url')}/{tmp_path.name}"


def test_stores_keep_bytes(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "_PIECE", 1000)
    store = open_store(url)
    content = os.urandom(3456)
    for name, part in (("a", content), ("b.json", b"{}"), ("a", content), ("empty", b"")):
        (tmp_path / "x").write_bytes(part)
        store.put(name, tmp_path / "x")
    assert store.names() == {"a": 3456, "b.json": 2, "empty": 0}
    for begin, end in ((0, 3456), (0, 8), (999, 1001), (1000, 2000), (3000, 3456), (5, 5)):
        assert store.read("a", begin, end) == content[begin:end]


def test_checkpoints_and_saved_ranks_load_from_stores(tmp_path: Path, url: str) -> None:
    folder = tmp_path / "model"
    make_case(folder, "llama-tied", num_hidden_layers=1, max_shard_size="20KB")
    expected = logits(load(folder))
    store = open_store(url)
    for path in folder.iterdir():
        store.put(path.name, path)
    found = resolve_model_path(url)
    assert not list(found.glob("*.safetensors"))
    assert torch.equal(logits(load(found)), expected)
    saver = service(folder)
    _, data = saver.do("save_remote", {"url": f"{url}-saved"})
    assert {"config.json", "model-rank-0-part-0.safetensors"} <= set(data["files"])
    config = store_text(f"{url}-saved", "config.json")
    assert "headrace_" not in config
    found = resolve_model_path(f"{url}-saved")
    assert torch.equal(logits(load(found, "remote")), expected)
    with pytest.raises(LoadError, match="saved with quantization"):
        load(found, "remote", quantization="int8")


def store_text(url: str, name: str) -> str:
    store = open_store(url)
    return store.read(name, 0, store.names()[name]).decode()


def test_what_a_store_lacks_is_named(folder: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/s"
    (tmp_path / "s").mkdir()
    with pytest.raises(LoadError, match=r"has no config\.json"):
        resolve_model_path(url)
    for path in folder.iterdir():
        (tmp_path / "s" / path.name).write_bytes(path.read_bytes())
    cut = sorted((tmp_path / "s").glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(LoadError, match=rf"{cut.name}: tensor .* cut off"):
        load(resolve_model_path(url))
    cut.unlink()
    with pytest.raises(LoadError, match=rf"names {cut.name}, which does not exist"):
        load(resolve_model_path(url))
    with pytest.raises(LoadError, match="needs a URL"):
        load(folder, "remote")


@pytest.mark.parametrize(
    ("url", "error", "message"),
    [
        ("gs://x/y", BadRequest, "none of file:"),
        ("redis://h/", BadRequest, "names no model"),
        ("redis://:secret@127.0.0.1:1/m", LoadError, r"redis://\*\*\*@127.0.0.1:1/m"),
        ("file:///nowhere", LoadError, "/nowhere cannot be read"),
    ],
)
def test_wrong_urls(url: str, error: type[HeadraceError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        resolve_model_path(url)
    assert "secret" not in caught.value.message
    assert redacted("s3://b/m@v1/x") in ("s3://b/m@v1/x", "s3://***@v1/x")


@pytest.mark.parametrize(("scheme", "package"), [("s3", "boto3"), ("redis", "redis")])
def test_a_missing_client_names_its_extra(
    scheme: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(LoadError, match=rf"pip install 'headrace\[{scheme}\]'"):
        open_store(f"{scheme}://host/model")


# other packages that read


@pytest.mark.parametrize(
    ("load_format", "settings_text"),
    [
        ("runai_streamer", '{"concurrency": 2, "memory_limit": 1000000}'),
        ("fastsafetensors", "{}"),
    ],
)
def test_other_readers(
    folder: Path,
    expected: Tensor,
    load_format: str,
    settings_text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CONCURRENCY", "MEMORY_LIMIT"):
        monkeypatch.setenv(f"RUNAI_STREAMER_{name}", "")
    options = LoadOptions(model_loader_extra_config=settings_text)
    assert torch.equal(logits(load(folder, load_format, options=options)), expected)


@pytest.mark.parametrize(
    ("load_format", "module", "extra"),
    [
        ("runai_streamer", "runai_model_streamer", "runai"),
        ("fastsafetensors", "fastsafetensors", "fastsafetensors"),
    ],
)
def test_a_missing_reader_names_its_extra(
    folder: Path, load_format: str, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoadError, match=rf"pip install 'headrace\[{extra}\]'"):
        load(folder, load_format)


# another server


def test_weights_are_given_only_when_allowed(folder: Path) -> None:
    details = {"group_name": "g", "master_address": "127.0.0.1"}
    with pytest.raises(BadRequest, match="start-seed"):
        service(folder).do("open_group", details)
    seed = service(folder, remote_instance_weight_loader_start_seed=True)
    with pytest.raises(BadRequest, match="cannot be bound"):
        seed.do("open_group", details | {"master_address": "192.0.2.1"})
    with pytest.raises(BadRequest, match="not open"):
        seed.do("send", {"group_name": "h"})
    assert seed.do("open_group", details | {"rank": 1}) == ("", {"ports": [0]})  # is not this one
    seed.do("send", {"group_name": "g", "rank": 1})
    for number in range(4):
        _, data = seed.do("open_group", details | {"group_name": str(number), "rank": 0})
        assert 0 < data["ports"][0] < 65536
    with pytest.raises(Overloaded):
        seed.do("open_group", details)
    for action, wrong in (("open_group", {"ports": [0]}), ("send", {"x": 1}), ("sell", {})):
        with pytest.raises(BadRequest):
            seed.do(action, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs --remote-instance-weight-loader-seed-instance-ip"),
        ({"seed_instance_ip": "127.0.0.1", "seed_instance_service_port": 1}, "cannot be reached"),
        ({"seed_instance_ip": "127.0.0.1", "send_weights_group_ports": "a"}, "ports must be"),
    ],
)
def test_a_seed_that_is_not_there(folder: Path, options: dict[str, Any], message: str) -> None:
    named = {f"remote_instance_weight_loader_{key}": value for key, value in options.items()}
    with pytest.raises(HeadraceError, match=message):
        load(folder, "remote_instance", options=LoadOptions(**named))


# hubs

_FETCH = """
import sys
from headrace.core.errors import LoadError
from headrace.loader.files import resolve_model_path
try:
    print(*sorted(path.name for path in resolve_model_path("owner/name", *sys.argv[1:]).iterdir()))
except LoadError as error:
    print("refused:", error.message)
"""


def fetch(*arguments: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", _FETCH, *arguments],
        env={**os.environ, "HF_HUB_OFFLINE": "0", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.slow
def test_downloads_take_what_is_read_and_only_once(tmp_path: Path) -> None:
    """Four processes against a hub: two want the same, one other files, one a bad revision."""
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    repo = tmp_path / "repo"
    repo.mkdir()
    for name in (*wanted, "pytorch_model.bin", "consolidated.safetensors", "training_args.bin"):
        (repo / name).write_text(name * 1000)
    with Hub(repo) as hub:
        hf = {"HF_ENDPOINT": hub.url}
        cache = str(tmp_path / "cache")
        running = [
            fetch("v1", cache, **hf),
            fetch("v1", cache, **hf),
            fetch("v1", str(tmp_path / "other"), "pt", **hf),
            fetch("v9", cache, **hf),
        ]
        same, also, torch_files, missing = (process.communicate()[0] for process in running)
        assert same.split() == also.split() == wanted
        assert torch_files.split() == ["config.json", "pytorch_model.bin", "tokenizer.json"]
        assert missing.startswith("refused: owner/name is no local folder") and "404" in missing
        assert hub.taken["model.safetensors"] == 1
        assert hub.taken["consolidated.safetensors"] == hub.taken["training_args.bin"] == 0
        own = {"HEADRACE_USE_MODELSCOPE": "1", "MODELSCOPE_ENDPOINT": hub.url}
        running = [
            fetch("v1", cache, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1"),
            fetch("v1", str(tmp_path / "scope"), **own),
        ]
        offline, scope = (process.communicate()[0] for process in running)
        assert offline.split() == wanted
        assert set(wanted) <= set(scope.split()) and "pytorch_model.bin" not in scope


def test_models_of_another_number_of_layers_are_refused(folder: Path, tmp_path: Path) -> None:
    service(folder).do("save_sharded", {"path": str(tmp_path)})
    config = json.loads((tmp_path / "config.json").read_text()) | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert make_model(
        read_model_info(tmp_path), build_of(read_model_info(folder), torch.float32, SOLO)
    )
    with pytest.raises(LoadError, match=r"it has no layers\.3\."):
        load(tmp_path, "sharded_state")
