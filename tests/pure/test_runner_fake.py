"""The worker without a model: deterministic, never ends a sequence, imports no torch."""

import subprocess
import sys

from headrace.core.config import Config
from headrace.core.hardware import Hardware
from headrace.core.messages import LogprobSpec, SamplingParams, pack_ids
from headrace.core.model_info import ModelInfo
from headrace.core.plan import Chunk, NewRow, StepPlan
from headrace.runner.fake import FakeWorker

VOCAB = 30
EOS = 2


def worker() -> FakeWorker:
    info = ModelInfo(
        path="",
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=VOCAB,
        hidden_size=8,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        context_length=512,
        dtype="float32",
        eos_token_ids=(EOS,),
        hf={},
        generation={},
    )
    hardware = Hardware(cores=2, memory_limit=8 << 30, memory_available=8 << 30)
    config = Config.from_flat({"chunked_prefill_size": 64, "max_running_requests": 4})
    return FakeWorker(config, info, hardware)


def row(number: int, **fields) -> NewRow:
    given = {
        "tokens": pack_ids([5, 6, 7]),
        "prompt_len": 3,
        "sampling": SamplingParams(),
        "seed": 9,
    }
    return NewRow(row=number, **{**given, **fields})


def one(fake: FakeWorker, chunk: Chunk, *new: NewRow, freed=()):
    plan = StepPlan(1, [chunk], freed_rows=list(freed), new_rows=list(new))
    future = fake.launch(plan)
    assert future.done()
    return future.result().chunks[0]


def generate(fake: FakeWorker, number: int, spec: NewRow, steps: int) -> list[int]:
    tokens = one(fake, Chunk(number, 0, 3), spec).tokens
    for position in range(3, 3 + steps - 1):
        tokens += one(fake, Chunk(number, position, 1)).tokens
    return tokens


def test_limits_come_from_the_memory_plan():
    limits = worker().limits
    assert (limits.max_running_requests, limits.context_length) == (4, 512)
    assert limits.max_total_tokens == 4 * 512


def test_same_key_same_tokens_whatever_the_row():
    fake = worker()
    first = generate(fake, 0, row(0), 100)
    assert generate(fake, 3, row(3), 100) == first
    assert generate(fake, 1, row(1, seed=10), 100) != first
    assert generate(fake, 1, row(1, sample_index=1), 100) != first


def test_never_ends_a_sequence():
    stops = tuple(range(3, 28))
    sampling = SamplingParams(stop_token_ids=stops)
    tokens = set(generate(worker(), 0, row(0, sampling=sampling), 300))
    assert tokens == set(range(VOCAB)) - {EOS, *stops}


def test_scores_when_asked():
    asked = row(0, logprobs=LogprobSpec(start=0, top=2, ids=(4,)))
    result = one(worker(), Chunk(0, 0, 3, logprob_start=0), asked)
    assert len(result.scores) == len(result.tokens) == 1
    assert len(result.prompt_scores) == 2
    assert len(result.scores[0].top) == 2
    assert result.scores[0].ids[0][0] == 4
    assert one(worker(), Chunk(0, 0, 3), row(0)).scores == []


def test_chunk_that_does_not_sample():
    assert one(worker(), Chunk(0, 0, 2, samples=False), row(0)).tokens == []


def test_right_drafts_are_accepted():
    fake = worker()
    expected = generate(fake, 0, row(0), 4)
    wrong = (expected[1] + 1) % VOCAB
    chunk = Chunk(0, 0, 3, draft=(expected[0], wrong, 0))
    assert one(fake, chunk, row(0)).tokens == expected[:2]
    chunk = Chunk(0, 0, 3, draft=tuple(expected[:3]))
    assert one(fake, chunk, row(0)).tokens == expected


def test_imports_no_torch():
    code = "import sys, headrace.runner.fake; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
