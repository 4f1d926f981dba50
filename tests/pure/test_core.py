"""Configuration, hardware limits, checkpoint facts and messages."""

import json

import msgspec
import pytest

from headrace.core.config import Config
from headrace.core.errors import BadRequest, LoadError
from headrace.core.hardware import Hardware, detect
from headrace.core.messages import (
    Deltas,
    FinishReason,
    GenerateRequest,
    Inbound,
    Outbound,
    SamplingParams,
    pack_ids,
    unpack_ids,
)
from headrace.core.model_info import read_model_info
from headrace.core.resolve import resolve

GIB = 1 << 30
MACHINE = Hardware(cores=3, memory_limit=8 * GIB, memory_available=6 * GIB, bf16=True)
CHECKPOINT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
    "eos_token_id": 3,
}


def checkpoint(tmp_path, generation=None, **fields):
    values = {key: value for key, value in {**CHECKPOINT, **fields}.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(values))
    if generation:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    return tmp_path


def test_model_info(tmp_path):
    info = read_model_info(checkpoint(tmp_path, generation={"eos_token_id": [7, 3]}))
    assert (info.head_dim, info.num_kv_heads, info.dtype) == (16, 4, "bfloat16")
    assert info.eos_token_ids == (7, 3)
    assert read_model_info(tmp_path, {"vocab_size": 50}).vocab_size == 50


@pytest.mark.parametrize(
    ("fields", "text"),
    [({"architectures": None}, "architecture"), ({"vocab_size": None}, "'vocab_size'")],
)
def test_model_info_names_what_is_missing(tmp_path, fields, text):
    with pytest.raises(LoadError, match=text):
        read_model_info(checkpoint(tmp_path, **fields))
    with pytest.raises(LoadError, match=r"is .* a model folder"):
        read_model_info(tmp_path / "nothing")


def test_resolve_fills_in_and_explains(tmp_path):
    info = read_model_info(checkpoint(tmp_path))
    config, notes = resolve(Config.from_flat({"model_path": "here"}), info, MACHINE)
    assert config.model.dtype == "bfloat16" and config.model.context_length == 512
    assert config.run.threads == 1 and config.model.served_model_name == "here"
    assert "set threads=1 because the model is too small to gain from more" in notes
    same, nothing = resolve(config, info, MACHINE)
    assert same == config and nothing == []
    large = read_model_info(checkpoint(tmp_path, hidden_size=4096))
    assert resolve(Config(), large, MACHINE)[0].run.threads == 3
    plain = msgspec.structs.replace(MACHINE, bf16=False)
    assert resolve(Config(), large, plain)[0].model.dtype == "float32"
    scales = {"model_path": "here", "quantization_param_path": "scales.json"}
    with pytest.raises(BadRequest, match="needs --kv-cache-dtype fp8_e4m3"):
        resolve(Config.from_flat(scales), info, MACHINE)
    assert resolve(Config.from_flat(scales | {"kv_cache_dtype": "fp8_e4m3"}), info, MACHINE)
    with pytest.raises(BadRequest, match="--context-length 600 is more than the model's 512"):
        resolve(Config.from_flat({"context_length": 600}), info, MACHINE)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pp_size": 3}, "--pp-size 3 is more than the model's 2 layers"),
        ({"tp_size": 4, "ep_size": 3}, "--ep-size 3 does not divide --tp-size 4"),
        ({"deterministic_tp": 6}, "must be a power of two, not 6"),
        ({"tp_size": 3, "deterministic_tp": 4}, "--tp-size 3 does not divide --deterministic-tp 4"),
        ({"node_rank": 1}, "--node-rank must be 0 to 0, not 1"),
        ({"tp_size": 2, "nnodes": 2}, "--dist-init-addr must be host:port, not ''"),
        ({"tp_size": 3, "nnodes": 2, "dist_init_addr": "h:1"}, "1 stages of 3 ranks cannot be"),
        ({"tp_size": 2, "nnodes": 2, "dist_init_addr": "[::1]:70000"}, "must be host:port"),
    ],
)
def test_ranks_that_cannot_be(tmp_path, values, text):
    info = read_model_info(checkpoint(tmp_path))
    with pytest.raises(BadRequest, match=text):
        resolve(Config.from_flat(values), info, MACHINE)


def test_ranks_share_cores_and_offloading_moves_nothing(tmp_path):
    info = read_model_info(checkpoint(tmp_path, hidden_size=4096))
    asked = {"tp_size": 2, "cpu_offload_gb": 4.0}
    config, notes = resolve(Config.from_flat(asked), info, MACHINE)
    assert config.run.threads == 1
    assert "set threads=1 because 2 ranks share 3 cores" in notes
    assert any("cpu_offload_gb moves nothing" in note for note in notes)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"page_size": 0}, "--page-size must be at least 1"),
        ({"mem_fraction_static": 1.5}, "--mem-fraction-static must be at most 1.0"),
        ({"schedule_policy": "best"}, "--schedule-policy must be one of fcfs"),
        ({"port": "80"}, "--port must be int"),
        ({"page_size": True}, "--page-size must be int"),
        ({"colour": 1}, "unknown option 'colour'"),
    ],
)
def test_bad_options_are_named(values, text):
    with pytest.raises(BadRequest, match=text):
        Config.from_flat(values)


def test_secrets_stay_inside():
    config = Config.from_flat({"api_key": "sesame"})
    assert "sesame" not in json.dumps(config.public())
    assert Config.from_flat(config.flat()) == config


def test_option_names_are_unique():
    names = [field.name for field, _ in Config().items()]
    assert len(names) == len(set(names))


def fake_machine(root, memory_max="max", current="0", cpu_max="max 100000", file=0):
    group = root / "sys/fs/cgroup/box"
    group.mkdir(parents=True)
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 33554432 kB\n")
    (root / "proc/self/cgroup").write_text("0::/box\n")
    (group / "memory.max").write_text(memory_max)
    (group / "memory.current").write_text(current)
    (group / "memory.stat").write_text(f"anon 5\nfile {file}\n")
    (group / "cpu.max").write_text(cpu_max)
    return root


def test_memory_comes_from_the_cgroup(tmp_path):
    root = fake_machine(tmp_path, str(4 * GIB), str(3 * GIB), file=2 * GIB)
    machine = detect(root)
    assert machine.memory_limit == 4 * GIB
    assert machine.memory_available == 3 * GIB, "page cache counts as free"


def test_without_a_limit_the_machine_counts(tmp_path):
    machine = detect(fake_machine(tmp_path, cpu_max="50000 100000"))
    assert (machine.memory_limit, machine.memory_available) == (64 * GIB, 32 * GIB)
    assert machine.cores == 1


def test_messages_survive_the_wire():
    request = GenerateRequest(
        rid="r", ids=pack_ids([1, 2, 3]), sampling=SamplingParams(stop=("a",), logit_bias={5: 1.0})
    )
    wire = msgspec.msgpack.Encoder().encode(request)
    assert msgspec.msgpack.Decoder(Inbound).decode(wire) == request
    assert unpack_ids(request.ids).tolist() == [1, 2, 3]
    empty = msgspec.msgpack.encode(Deltas())
    assert msgspec.msgpack.decode(empty, type=Outbound) == Deltas()
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(["GenerateRequest", 5]), type=Inbound)


def test_finish_reason_on_the_wire():
    assert FinishReason("stop", matched=2).to_wire() == {"type": "stop", "matched": 2}
    assert FinishReason("length", length=9).to_wire() == {"type": "length", "length": 9}
    assert FinishReason("abort", message="m", status=400, kind="k").to_wire() == {
        "type": "abort", "message": "m", "status_code": 400, "err_type": "k"
    }  # fmt: skip
