"""The memory plan on made-up machines: what it takes by default, obeys, and refuses."""

import re

import pytest

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.hardware import Hardware
from headrace.core.model_info import ModelInfo
from headrace.runner.memory import GIB, StepCost, plan_memory, step_cost


def machine(limit: float, available: float | None = None) -> Hardware:
    free = limit if available is None else available
    return Hardware(cores=2, memory_limit=int(limit * GIB), memory_available=int(free * GIB))


def options(**values) -> Config:
    return Config.from_flat({"chunked_prefill_size": 2048, **values})


def test_a_tiny_model_takes_little_of_a_large_machine():
    plan = plan_memory(machine(256), 8 << 20, 1024, options(), 2048)
    assert plan.total_tokens == 1 << 18
    assert plan.cache == 256 << 20
    assert plan.max_running_requests == 256


def test_never_more_than_all_rows_at_full_length():
    plan = plan_memory(machine(64), 0, 1024, options(max_running_requests=4), 1000)
    assert plan.total_tokens == 4 * 1008  # each sequence in whole pages of 16


def test_default_cache_is_half_of_what_is_left():
    plan = plan_memory(machine(16), 2 * GIB, 1 << 20, options(), 4096)
    left = 16 * GIB - 2 * GIB - plan.reserve
    assert plan.total_tokens == left // 2 // (1 << 20) // 16 * 16


def test_one_full_context_fits_if_it_can():
    plan = plan_memory(machine(8), 0, 1 << 20, options(), 6000)
    assert plan.total_tokens == 6000


@pytest.mark.parametrize("page_size", [1, 16, 64, 1000])
def test_tokens_are_whole_pages(page_size):
    for tokens in (None, 12345):
        config = options(page_size=page_size, max_total_tokens=tokens)
        plan = plan_memory(machine(16), GIB, 70000, config, 4096)
        assert plan.total_tokens % page_size == 0
        assert plan.pages == plan.total_tokens // page_size
        assert tokens is None or 0 <= tokens - plan.total_tokens < page_size


def test_options_are_obeyed():
    config = options(max_total_tokens=5000, max_running_requests=7, page_size=8)
    plan = plan_memory(machine(16), GIB, 1000, config, 4096)
    assert (plan.total_tokens, plan.max_running_requests) == (5000, 7)
    limits = plan.limits
    assert (limits.max_total_tokens, limits.page_size) == (5000, 8)
    assert (limits.max_running_requests, limits.context_length) == (7, 4096)


def test_mem_fraction_static_is_weights_and_cache():
    config = options(mem_fraction_static=0.5)
    plan = plan_memory(machine(20), 4 * GIB, 1 << 16, config, 32768)
    assert plan.weights + plan.cache == pytest.approx(10 * GIB, rel=1e-3)


def test_default_rows_are_bounded_by_pages():
    plan = plan_memory(machine(16), 0, 100, options(max_total_tokens=320), 4096)
    assert plan.max_running_requests == 20


def test_the_plan_fits_what_is_available():
    for available in (1.5, 3.0, 10.0):
        step = StepCost(per_token=50_000, logits=200 << 20)
        plan = plan_memory(machine(16, available), GIB // 4, 4096, options(), 4096, step)
        used = plan.weights + plan.step + plan.reserve + plan.cache
        assert used <= available * GIB
        assert plan.step == 50_000 * (2048 + 256) + (200 << 20)


def message(hardware, *args, **kwargs) -> str:
    with pytest.raises(LoadError) as caught:
        plan_memory(hardware, *args, **kwargs)
    return caught.value.message


def test_too_many_tokens_says_how_many_fit():
    hardware, values = machine(4), (GIB, 1 << 20)
    text = message(hardware, *values, options(max_total_tokens=8192), 4096)
    found = re.search(r"needs (\S+) GiB more .* set --max-total-tokens (\d+) or less", text)
    assert found
    assert float(found[1]) == pytest.approx((8192 - int(found[2])) / 1024, abs=0.03)
    most = int(found[2])
    plan = plan_memory(hardware, *values, options(max_total_tokens=most), 4096)
    assert plan.total_tokens == most
    assert "more memory" in message(hardware, *values, options(max_total_tokens=most + 16), 4096)


def test_too_large_a_chunk_says_which_size_fits():
    hardware, step = machine(4), StepCost(per_token=1 << 20)
    config = options(chunked_prefill_size=8192, max_running_requests=8)
    text = message(hardware, GIB, 4096, config, 4096, step)
    found = re.search(r"needs .* GiB more .*--chunked-prefill-size from 8192 to (\d+)", text)
    assert found
    chunk = int(found[1])
    smaller = options(chunked_prefill_size=chunk, max_running_requests=8)
    assert plan_memory(hardware, GIB, 4096, smaller, 4096, step).total_tokens >= 1024
    above = options(chunked_prefill_size=chunk + 8, max_running_requests=8)
    assert "more memory" in message(hardware, GIB, 4096, above, 4096, step)


def test_too_large_a_model_says_so():
    assert "needs 2.53 GiB more memory" in message(machine(8, 4), 6 * GIB, 1 << 17, options(), 256)


def test_a_bad_fraction_says_which_fits():
    for fraction in (0.1, 0.95):
        text = message(machine(8), GIB, 65536, options(mem_fraction_static=fraction), 4096)
        found = re.search(r"set it from (\S+) to (\S+)$", text)
        assert found
        for good in found.groups():
            plan_memory(machine(8), GIB, 65536, options(mem_fraction_static=float(good)), 4096)


def test_fewer_tokens_than_a_page_are_refused():
    assert "--page-size" in message(machine(8), 0, 1000, options(max_total_tokens=8), 4096)


def test_lines_are_a_table():
    lines = plan_memory(machine(16), GIB, 1 << 16, options(), 4096).lines()
    assert [line for line in lines if line.startswith("weights")] == [
        "weights                  1.00 GiB"
    ]
    assert "pages of 16" in lines[-1]


def test_step_cost_counts_activations_and_logits():
    info = ModelInfo(
        path="",
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=1000,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        context_length=256,
        dtype="float32",
        eos_token_ids=(2,),
        hf={"intermediate_size": 100},
        generation={},
    )
    cost = step_cost(info, options(max_running_requests=8), 2)
    assert cost.logits == 8 * 1000 * 4 * 4
    assert cost.per_token == (6 * 64 + 2 * 128 + 300) * 6
