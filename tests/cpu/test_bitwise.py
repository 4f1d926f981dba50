"""Output never depends on who else is served: same tokens and bitwise equal logprobs, always.

Mixed requests (greedy, sampled, filtered, penalized, with prompt logprobs, two samples of one
prompt, shared prefixes) run alone, then together under every schedule that a server may come to:
other orders, chunks, pages, caches, retractions, thread counts; at every instruction-set level,
each against itself. No tolerance anywhere.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from headrace import ops
from headrace.assets import demo_model_path
from headrace.core.config import Config
from headrace.core.hardware import Hardware
from headrace.core.messages import GenerateRequest, LogprobSpec, SamplingParams, pack_ids
from headrace.core.model_info import read_model_info
from headrace.core.resolve import resolve
from headrace.engine.build import build_scheduler
from headrace.runner.graph import EagerGraph
from tests.cpu.test_serving_parity import Answer, run
from tests.support.checkpoints import make_case
from tests.support.native import native_level, native_levels

LEVELS = native_levels() or ("ref",)

SAMPLING: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.02},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.7, "frequency_penalty": 0.5, "presence_penalty": 0.3, "min_new_tokens": 4},
]


@dataclass(frozen=True)
class Variant:
    """One way to serve the requests."""

    options: dict[str, Any]
    shuffled: bool = False
    threads: int = 1
    call_by_call: bool = False


ALONE = Variant({"disable_radix_cache": True})
VARIANTS = {
    "together": Variant({}),
    "shuffled": Variant({"page_size": 4}, shuffled=True),
    "no-cache": Variant({"disable_radix_cache": True, "disable_overlap_schedule": True}),
    "chunks-of-16": Variant({"chunked_prefill_size": 16, "page_size": 1}),
    "chunks-of-512": Variant({"chunked_prefill_size": 512, "page_size": 16}, shuffled=True),
    "two-threads": Variant({"chunked_prefill_size": 48}, threads=2),
    "call-by-call": Variant({"chunked_prefill_size": 64}, call_by_call=True),
}


def make_requests(vocab: int, count: int, most: int, longest: int) -> list[GenerateRequest]:
    """Prompts of 1..longest tokens, half of which share a prefix; every kind of sampling."""
    random = np.random.default_rng(11)
    shared = random.integers(3, vocab, longest).tolist()
    found = []
    for index in range(count):
        common = int(random.integers(0, longest - 8)) if index % 2 else 0
        own = int(random.integers(1, longest - common))
        asked = SAMPLING[index % len(SAMPLING)]
        found.append(
            GenerateRequest(
                rid=str(index),
                ids=pack_ids(shared[:common] + random.integers(3, vocab, own).tolist()),
                sampling=SamplingParams(
                    max_new_tokens=int(random.integers(1, most + 1)),
                    seed=index,
                    ignore_eos=True,
                    **asked,
                ),
                stream=index % 3 == 0,
                logprobs=LogprobSpec(start=1 if index % 4 == 1 else -1, top=2, ids=[7, 5]),
            )
        )
    found.append(
        GenerateRequest(
            rid="twin",
            ids=found[1].ids,
            sampling=found[1].sampling,
            stream=True,
            logprobs=LogprobSpec(start=-1, top=2),
            sample_index=1,
        )
    )
    return found


def serve(
    folder: Path,
    requests: list[GenerateRequest],
    variant: Variant,
    *,
    alone: bool = False,
    **model: Any,
) -> dict[str, Answer]:
    """Answers of a fresh scheduler, to all requests at once or to one after the other."""
    info = read_model_info(folder)
    asked = {
        "model_path": str(folder),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_running_requests": 8,
        "max_total_tokens": 4096,
        **model,
        **variant.options,
    }
    memory = 8 << 30
    hardware = Hardware(cores=variant.threads, memory_limit=memory, memory_available=memory)
    config, _ = resolve(Config.from_flat(asked), info, hardware)
    scheduler = build_scheduler(config, info, lambda what: None).scheduler
    try:
        runner = scheduler.runner.runner
        if variant.call_by_call:
            runner.graph = EagerGraph(runner.model)
        if not alone:
            return run(scheduler, requests)
        answers: dict[str, Answer] = {}
        for request in requests:
            answers |= run(scheduler, [request])
        return answers
    finally:
        scheduler.runner.close()
        ops.set_threads(1)


def numbers(answer: Answer) -> tuple[Any, ...]:
    """All that a client sees, as exact numbers."""
    prompt = answer.prompt and (answer.prompt.tokens, answer.prompt.values, answer.prompt.top)
    return answer.ids, answer.values, answer.top, prompt


def check(
    folder: Path, requests: list[GenerateRequest], variants: list[str], **model: Any
) -> dict[str, Answer]:
    """Every variant gives the answers of requests that run alone, which are returned."""
    truth = serve(folder, requests, ALONE, alone=True, **model)
    assert all(answer.values for answer in truth.values())
    random = np.random.default_rng(5)
    for name in variants:
        shuffled = VARIANTS[name].shuffled
        order = random.permutation(len(requests)) if shuffled else np.arange(len(requests))
        ordered = [requests[index] for index in order]
        answers = serve(folder, ordered, VARIANTS[name], **model)
        assert differing(truth, answers) == [], name
    return truth


def check_retraction(
    folder: Path, requests: list[GenerateRequest], truth: dict[str, Answer]
) -> None:
    """The same in so little room that requests must give way to others and start again."""
    need = max(len(request.ids) // 4 + request.sampling.max_new_tokens for request in requests)
    retracted = 0
    for room in (4, 16, 52, 88):
        tight = {
            "max_total_tokens": (need + room) // 4 * 4,
            "page_size": 4,
            "schedule_conservativeness": 0.0,
        }
        answers = serve(folder, requests, Variant(tight))
        assert differing(truth, answers) == [], room
        retracted += sum(answer.retractions for answer in answers.values())
    assert retracted > 0


def differing(truth: dict[str, Answer], answers: dict[str, Answer]) -> list[str]:
    return [rid for rid in truth if numbers(answers[rid]) != numbers(truth[rid])]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    with native_level(request.param):
        yield request.param


TINY = ("llama-dynamic-long", "qwen2-window", "qwen3")
# Every model at the level that users get, and one of them at each level below; the demo model would
# be two minutes of work for plain C++.
SCHEDULED = [(level, TINY[index % len(TINY)]) for index, level in enumerate(LEVELS[:-1])]
SCHEDULED += [(LEVELS[-1], case) for case in (*TINY, "demo")]


def tiny(tmp_path: Path, case: str) -> Path:
    make_case(tmp_path, case, eos_token_id=None)
    return tmp_path


def test_tiny_checkpoint_under_every_schedule(tmp_path):
    folder = tiny(tmp_path, "qwen3")
    requests = make_requests(101, 18, 24, 140)
    truth = check(folder, requests, list(VARIANTS))
    check_retraction(folder, requests, truth)


def test_every_level_against_itself(tmp_path, level):
    folder = tiny(tmp_path, "mistral-window")
    check(folder, make_requests(101, 9, 8, 140), ["chunks-of-16", "two-threads"])


def test_the_demo_model():
    folder = demo_model_path()
    vocab = read_model_info(folder).vocab_size
    check(folder, make_requests(vocab, 8, 8, 140), ["chunks-of-16", "two-threads"])


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_quantized_weights(tmp_path, quantization):
    folder = tiny(tmp_path, "qwen3")
    requests = make_requests(101, 9, 8, 140)
    variants = ["shuffled", "chunks-of-16", "two-threads", "call-by-call"]
    check(folder, requests, variants, quantization=quantization)


def test_bfloat16_activations(tmp_path):
    folder = tiny(tmp_path, "qwen3")
    requests = make_requests(101, 9, 8, 140)
    check(folder, requests, ["shuffled", "chunks-of-16", "two-threads"], dtype="bfloat16")


@pytest.mark.parametrize("kv", ["bf16", "fp8_e4m3", "int8"])
def test_narrow_caches(tmp_path, kv):
    """Cached, chunked or decoded: what is read is what was rounded into the cache."""
    folder = tiny(tmp_path, "qwen3")
    requests = make_requests(101, 9, 8, 140)
    check(folder, requests, ["together", "chunks-of-16", "two-threads"], kv_cache_dtype=kv)


@pytest.mark.parametrize(("dtype", "kv"), [("bfloat16", "auto"), ("float32", "int8")])
def test_latent_caches(tmp_path, dtype, kv):
    folder = tiny(tmp_path, "deepseek-v3")
    requests = make_requests(101, 6, 6, 90)
    check(folder, requests, ["chunks-of-16", "two-threads"], kv_cache_dtype=kv, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "case"), SCHEDULED, indirect=["level"])
def test_64_requests_under_every_schedule_at_every_level(tmp_path, level, case):
    folder = demo_model_path() if case == "demo" else tiny(tmp_path, case)
    info = read_model_info(folder)
    longest = min(200, info.context_length - 10)
    requests = make_requests(info.vocab_size, 63, min(24, info.context_length - longest), longest)
    truth = check(folder, requests, list(VARIANTS))
    check_retraction(folder, requests, truth)
