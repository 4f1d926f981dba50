"""Scheduler and model together against transformers: any schedule gives the oracle's tokens.

Greedy tokens are those of transformers and logprobs agree within 1e-4 (fp32), with prefix hits,
chunks, retraction, samples of one prompt, overlap on and off.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from headrace.assets import demo_model_path
from headrace.core.config import Config
from headrace.core.hardware import Hardware
from headrace.core.messages import GenerateRequest, LogprobSpec, SamplingParams, pack_ids
from headrace.core.model_info import read_model_info
from headrace.core.resolve import resolve
from headrace.engine.build import build_scheduler
from tests.support.checkpoints import CASES, make_case

HARDWARE = Hardware(cores=1, memory_limit=4 << 30, memory_available=4 << 30)
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"disable_radix_cache": True, "disable_overlap_schedule": True},
    "overlap": {"page_size": 1},
    "chunks": {"chunked_prefill_size": 5, "page_size": 4, "disable_overlap_schedule": True},
    "tight": {"max_total_tokens": 64, "page_size": 4, "schedule_conservativeness": 0.0},
    "tight-normal": {
        "max_total_tokens": 64,
        "page_size": 1,
        "schedule_conservativeness": 0.0,
        "disable_overlap_schedule": True,
        "disable_radix_cache": True,
    },
}


@dataclass
class Answer:
    ids: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    top: list[Any] = field(default_factory=list)
    prompt: Any = None
    cached: int = 0
    retractions: int = 0


def build(folder, **options):
    info = read_model_info(folder)
    asked = {
        "model_path": str(folder),
        "dtype": "float32",
        "skip_tokenizer_init": True,
        "max_running_requests": 6,
        "max_total_tokens": 2048,
        **options,
    }
    config, _ = resolve(Config.from_flat(asked), info, HARDWARE)
    return build_scheduler(config, info, lambda what: None).scheduler


def run(scheduler, requests) -> dict[str, Answer]:
    answers = {request.rid: Answer() for request in requests}
    for request in requests:
        scheduler.submit(request)
    while not scheduler.idle:
        scheduler.step()
        for message in scheduler.take():
            for delta in message.items:
                answer = answers[delta.rid]
                assert delta.finish is None or delta.finish.type != "abort", delta.finish
                answer.ids += delta.ids
                answer.values += delta.logprobs.values
                answer.top += delta.logprobs.top
                answer.prompt = delta.input_logprobs or answer.prompt
                answer.cached, answer.retractions = delta.cached_tokens, delta.retractions
    scheduler.check()
    return answers


def make_requests(vocab: int, most: int) -> list[GenerateRequest]:
    """Prompts that share prefixes, samples of one prompt, prompt logprobs."""
    random = np.random.default_rng(7)
    shared = random.integers(3, vocab, 24).tolist()
    sampling = SamplingParams(max_new_tokens=most, temperature=0.0, seed=1, ignore_eos=True)
    found = []
    for index, (length, own) in enumerate([(24, 3), (24, 9), (16, 1), (5, 7), (0, 13), (24, 3)]):
        prompt = shared[:length] + random.integers(3, vocab, own).tolist()
        found += [
            GenerateRequest(
                rid=f"{index}.{sample}",
                ids=pack_ids(prompt),
                sampling=sampling,
                stream=index % 2 == 0,
                logprobs=LogprobSpec(start=2 if index in (1, 5) else -1, top=3),
                group=f"{index}.0" if index == 1 else "",
                sample_index=sample,
            )
            for sample in range(3 if index == 1 else 1)
        ]
    return found


class Oracle:
    """What transformers makes of a prompt; each is asked once."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        self.model = model
        self._generated: dict[tuple[bytes, int], torch.Tensor] = {}
        self._scored: dict[bytes, torch.Tensor] = {}

    def generated(self, ids: bytes, most: int) -> torch.Tensor:
        """Logprobs [most, vocab], as a server would be asked: the prompt, then token by token."""
        if (ids, most) not in self._generated:
            prompt = torch.frombuffer(bytearray(ids), dtype=torch.int32).long()[None]
            with torch.inference_mode():
                out = self.model.generate(
                    prompt,
                    attention_mask=torch.ones_like(prompt),
                    max_new_tokens=most,
                    min_new_tokens=most,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            self._generated[ids, most] = torch.log_softmax(torch.cat(out.logits).float(), -1)
        return self._generated[ids, most]

    def scored(self, ids: bytes) -> torch.Tensor:
        """Logprobs [tokens, vocab] of what follows each token of the prompt."""
        if ids not in self._scored:
            prompt = torch.frombuffer(bytearray(ids), dtype=torch.int32).long()[None]
            with torch.inference_mode():
                self._scored[ids] = torch.log_softmax(self.model(prompt).logits[0].float(), -1)
        return self._scored[ids]


def check(oracle: Oracle, request: GenerateRequest, answer: Answer, most: int) -> None:
    want = oracle.generated(request.ids, most)
    assert answer.ids == want.argmax(-1).tolist()
    values = torch.tensor(answer.values)
    assert (values - want[torch.arange(most), answer.ids]).abs().max() < 1e-4
    for position, pairs in enumerate(answer.top):
        top = want[position].topk(3)
        assert [token for token, _ in pairs] == top.indices.tolist()
        assert np.allclose([value for _, value in pairs], top.values, atol=1e-4)
    if answer.prompt is not None:
        prompt = np.frombuffer(request.ids, np.int32).tolist()
        scores = oracle.scored(request.ids)[2:-1].gather(-1, torch.tensor(prompt[3:])[:, None])
        assert answer.prompt.tokens == prompt[2:] and answer.prompt.values[0] is None
        assert np.allclose(answer.prompt.values[1:], scores[:, 0], atol=1e-4)


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen2-window", "qwen3"])
def checkpoint(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    return Oracle(make_case(folder, request.param, eos_token_id=None)), folder


@pytest.mark.parametrize("setting", sorted(SETTINGS))
def test_every_schedule_gives_the_oracle(checkpoint, setting):
    oracle, folder = checkpoint
    scheduler = build(folder, **SETTINGS[setting])
    first, second = make_requests(101, 20), make_requests(101, 20)
    for requests in (first, second):
        answers = run(scheduler, requests)
        for request in requests:
            check(oracle, request, answers[request.rid], 20)
    total = scheduler.planner.retracted_total
    assert (total > 0) == setting.startswith("tight"), total
    # The second round finds its prompts, unless nothing is kept or the room is tight.
    if setting in ("overlap", "chunks"):
        assert answers["0.0"].cached >= 24
    scheduler.runner.close()


# One case of each architecture, and the ropes that depend on how much of a sequence has been seen;
# test_models_parity has all cases, in chunks too.
FAMILIES = {architecture: case for case, (architecture, _) in CASES.items()}.values()
LENGTHS = ("llama-dynamic", "llama-dynamic-long", "llama-longrope-short", "llama-longrope-long")


@pytest.mark.slow
@pytest.mark.parametrize("case", sorted({*FAMILIES, *LENGTHS}))
def test_every_architecture(case, tmp_path):
    """All head layouts and kinds of state, with prefix hits and chunks."""
    torch.set_num_threads(1)
    oracle = Oracle(make_case(tmp_path, case, eos_token_id=None))
    scheduler = build(
        tmp_path, page_size=4, chunked_prefill_size=9, context_length=min(256, _context(tmp_path))
    )
    most = 12 if _context(tmp_path) >= 64 else 4
    requests = make_requests(101, most)
    if _context(tmp_path) < 64:
        requests = [request for request in requests if len(request.ids) // 4 + most <= 24]
    for _ in range(2):
        answers = run(scheduler, requests)
        for request in requests:
            check(oracle, request, answers[request.rid], most)
    scheduler.runner.close()


def _context(folder) -> int:
    return read_model_info(folder).context_length


def test_the_demo_model(tmp_path):
    torch.set_num_threads(1)
    folder = demo_model_path()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    oracle = Oracle(model)
    scheduler = build(folder, chunked_prefill_size=16)
    requests = make_requests(read_model_info(folder).vocab_size, 24)
    answers = run(scheduler, requests)
    for request in requests:
        check(oracle, request, answers[request.rid], 24)
    scheduler.runner.close()
