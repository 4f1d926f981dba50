"""The thread team, the measurements of the machine, and the two commands that show them."""

import argparse
import json
import threading

import pytest
import torch

from headrace.bench import kernels
from headrace.cli import check_env
from headrace.cli.main import main
from headrace.core.errors import BadRequest
from headrace.ops import cpu, implementations

if cpu.LIBRARY is None:
    pytest.skip("the native kernels are not built", allow_module_level=True)

from headrace.ops.cpu import library, probe


def test_products_on_several_threads_at_once_are_right() -> None:
    """One caller has the team; the others compute alone. Nobody waits for ever."""
    library.set_threads(4)
    packed = cpu.pack(torch.randn(2000, 64))
    inputs = [torch.randn(40, 64) for _ in range(4)]
    oracle = [cpu.linear_packed(x, packed, None) for x in inputs]
    wrong: list[int] = []

    def repeat(index: int) -> None:
        for _ in range(50):
            if not torch.equal(cpu.linear_packed(inputs[index], packed, None), oracle[index]):
                wrong.append(index)

    threads = [threading.Thread(target=repeat, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    library.set_threads(1)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_the_team_may_change_its_size_between_calls() -> None:
    packed, x = cpu.pack(torch.randn(3000, 32)), torch.randn(3, 32)
    oracle = cpu.linear_packed(x, packed, None)
    for count in (2, 5, 1, 3):
        library.set_threads(count)
        assert library.native().hr_threads() == count
        assert torch.equal(cpu.linear_packed(x, packed, None), oracle)
    library.set_threads(1)


def test_limits_are_plausible() -> None:
    assert 1e8 < probe.read_bandwidth(0.01) < 1e13
    rates = probe.peak_rates(0.01)
    assert 1e9 < rates["fp32"] < 1e14
    assert set(rates) <= {"fp32", "bf16", "int8", "int4"}
    assert min(rates["int8"], rates["int4"]) > 1e9


def test_a_measured_product_counts_its_work() -> None:
    took = probe.time_linear(128, 64, "bfloat16", rows=2, budget=0.0)
    assert took.seconds > 0
    assert took.bytes_read == 128 * 64 * 2
    assert took.operations == 2 * 2 * 128 * 64


@pytest.mark.parametrize(
    ("format", "size"), [("int8", 64 + 4), ("int4", 32 + 2), ("int4-32", 32 + 4), ("fp8", 64 + 4)]
)
def test_a_measured_product_with_low_bit_weights(format: str, size: int) -> None:
    assert probe.time_linear(128, 64, format, rows=2, budget=0.0).bytes_read == 128 * size


def test_measured_attention_counts_its_work() -> None:
    load = probe.Load(rows=3, queries=2, context=10)
    took = probe.time_attention((4, 2, 8), load, "int8", budget=0.0)
    assert took.seconds > 0
    assert took.bytes_read == 2 * 3 * 16 * 2 * (8 + 4)  # whole pages of 16
    assert took.operations == 4 * 3 * (9 + 10) * 4 * 8


def test_bench_kernels_names_a_bad_option() -> None:
    parser = argparse.ArgumentParser()
    kernels.add_arguments(parser)
    with pytest.raises(BadRequest, match="--formats knows"):
        kernels.run(parser.parse_args(["--formats", "float7"]))
    with pytest.raises(BadRequest, match="--rows must be at least 1"):
        kernels.run(parser.parse_args(["--rows", "0"]))


def test_bench_kernels_table() -> None:
    item = {
        "model": "m", "out": 32, "in": 16, "format": "bfloat16", "rows": 1, "microseconds": 2.0,
        "bytes_per_s": 9e9, "operations_per_s": 18e9, "bound": "read", "fraction_of_limit": 0.9,
    }  # fmt: skip
    result = {
        "level": "avx512", "threads": 2, "read_bytes_per_s": 10e9, "load_average": 0.5,
        "operations_per_s": {"fp32": 150e9}, "operators": [item],
        "attention": [item | {"sequences": 4, "queries": 1, "context": 256}],
    }  # fmt: skip
    text = kernels.table(result)
    assert "read 10.0 GB/s; multiply-add 150 G/s fp32" in text
    assert text.splitlines()[-1].split()[-3:] == ["18", "read", "90%"]
    assert "m 1 of 256 bfloat16" in text


@pytest.mark.parametrize("command", ["check-env", "doctor"])
def test_check_env_as_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"]["operators"] == implementations()
    assert found["kernels"]["level"] == library.level()
    assert found["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize("permission", range(4))
@pytest.mark.parametrize("level", ["amx", "avx512_bf16"])
def test_check_env_tells_why_amx_is_not_used(
    permission: int, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if level == "amx" and permission:
        return
    monkeypatch.setattr(library, "amx", lambda: library._AMX[permission])
    monkeypatch.setattr(library, "level", lambda: level)
    amx = check_env.examine()["kernels"]["amx"]
    assert amx["in_use"] == (level == "amx")
    expected = ["avx512_bf16", "CPU", "does not save", "refuses"][permission]
    assert ("used" if level == "amx" else expected) in amx["why"]


def test_check_env_for_people() -> None:
    text = check_env.report(check_env.examine())
    assert f"kernels    {library.level()}" in text
    assert f"amx        {library.amx()}" in text
    assert "linear_packed" in text
