"""TpModelWorker on tiny checkpoints: tokens and logprobs of transformers, order, errors, end."""

import logging
import threading
import time

import numpy as np
import pytest
import torch

from headrace.core.config import Config
from headrace.core.errors import LoadError
from headrace.core.hardware import Hardware
from headrace.core.messages import LogprobSpec, SamplingParams
from headrace.core.model_info import read_model_info
from headrace.core.plan import StepPlan
from headrace.core.resolve import resolve
from headrace.runner.worker import TpModelWorker
from tests.support.checkpoints import make_case
from tests.support.driver import Driver, Sequence, generate

PAGE = 8
HARDWARE = Hardware(cores=1, memory_limit=4 << 30, memory_available=4 << 30)
VOCAB = 101


def make_worker(folder, **values) -> TpModelWorker:
    info = read_model_info(folder)
    asked = {"page_size": PAGE, "max_running_requests": 6, "max_total_tokens": 1024, **values}
    config, _ = resolve(Config.from_flat(asked), info, HARDWARE)
    return TpModelWorker(config, info, HARDWARE)


@pytest.fixture(scope="module", params=["llama", "mistral-window", "qwen3"])
def served(request, tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    oracle = make_case(folder, request.param)
    worker = make_worker(folder)
    yield oracle, worker
    worker.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    make_case(path, "llama")
    return path


def make_driver(worker: TpModelWorker, seed: int = 0) -> Driver:
    pages = worker.limits.max_total_tokens // PAGE
    return Driver(lambda plan: worker.launch(plan).result(), pages, PAGE, seed)


def prompts(count: int) -> list[list[int]]:
    random = np.random.default_rng(1)
    return [random.integers(3, VOCAB, random.integers(2, 30)).tolist() for _ in range(count)]


def oracle_logits(oracle, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return oracle(torch.tensor([tokens])).logits[0].float()


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(served, seed):
    oracle, worker = served
    driver = make_driver(worker, seed)
    sequences = [Sequence(prompt, logprobs=LogprobSpec(top=3, ids=(5,))) for prompt in prompts(6)]
    new_rows = [sequence.new_row(row) for row, sequence in enumerate(sequences)]
    worker.launch(StepPlan(0, [], new_rows=new_rows)).result()
    generate(driver, sequences, 12)
    for sequence in sequences:
        out, first = sequence.out[:12], len(sequence.prompt) - 1
        logits = oracle_logits(oracle, sequence.prompt + out)[first : first + 12]
        assert out == logits.argmax(-1).tolist()
        values = logits.log_softmax(-1)
        for step, score in enumerate(sequence.scores[:12]):
            assert score.logprob == pytest.approx(float(values[step, out[step]]), abs=1e-4)
            assert score.ids == [(5, pytest.approx(float(values[step, 5]), abs=1e-4))]
            top = values[step].topk(3)
            assert [token for token, _ in score.top] == top.indices.tolist()


def test_prompt_scores_are_those_of_transformers(served):
    oracle, worker = served
    driver = make_driver(worker)
    prompt = prompts(3)[2]
    sequence = Sequence(prompt, logprobs=LogprobSpec(start=0))
    new_rows, scores = [sequence.new_row(0)], []
    for count in (1, len(prompt) - 1):
        chunk, pages = driver.chunk(sequence, count, logprob_start=0)
        plan = StepPlan(1, [chunk], new_rows=new_rows, pages=pages)
        scores += worker.launch(plan).result().chunks[0].prompt_scores
        new_rows = []
    values = oracle_logits(oracle, prompt).log_softmax(-1)[:-1]
    expected = values.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
    assert [score.logprob for score in scores] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(top_p=0.9, top_k=30)])
def test_a_sampled_row_does_not_see_its_batch(served, sampling):
    worker = served[1]
    found = []
    for size in (1, 6):
        driver = make_driver(worker, size)
        sequences = [
            Sequence(prompt, sampling=sampling, seed=row, logprobs=LogprobSpec())
            for row, prompt in enumerate(prompts(size))
        ]
        new_rows = [sequence.new_row(row) for row, sequence in enumerate(sequences)]
        worker.launch(StepPlan(0, [], new_rows=new_rows)).result()
        generate(driver, sequences, 20)
        found.append(sequences[0].out[:20])
    assert found[0] == found[1]


def test_plans_run_in_order_without_waiting_for_results(served):
    oracle, worker = served
    driver = make_driver(worker)
    sequence = Sequence(prompts(1)[0])
    futures, new_rows = [], [sequence.new_row(0)]
    for count in (len(sequence.prompt), 1, 1, 1, 1):
        chunk, pages = driver.chunk(sequence, count, samples=True)
        futures.append(worker.launch(StepPlan(1, [chunk], new_rows=new_rows, pages=pages)))
        new_rows = []
    out = [future.result().chunks[0].tokens[0] for future in futures]
    logits = oracle_logits(oracle, sequence.prompt + out)
    assert out == logits[len(sequence.prompt) - 1 : -1].argmax(-1).tolist()
    assert all(future.result().seconds > 0 for future in futures)


def test_a_failed_step_is_a_result_and_the_next_one_runs(folder, caplog):
    worker = make_worker(folder)
    driver = make_driver(worker)
    sequence = Sequence([5, 6, 7])
    with caplog.at_level(logging.ERROR, "headrace"):
        failed = worker.launch(StepPlan(7, [], extras=(LogprobSpec(),))).result()
    incident = failed.error.partition("incident ")[2].rstrip(".")
    assert failed.chunks == []
    assert incident and f"step 7 failed, incident {incident}" in caplog.text
    assert "nothing here handles LogprobSpec" in caplog.text
    assert "LogprobSpec" not in failed.error
    assert "Traceback" in caplog.text
    driver.run([(sequence, 3)], new_rows=[sequence.new_row(0)])
    assert len(sequence.out) == 1
    worker.close()


def test_launch_returns_before_the_step_is_done(folder, monkeypatch):
    worker = make_worker(folder)
    release = threading.Event()
    monkeypatch.setattr(worker.runner, "execute", lambda plan: release.wait(60))
    began = time.perf_counter()
    futures = [worker.launch(StepPlan(step, [])) for step in range(10)]
    assert time.perf_counter() - began < 30
    assert not any(future.done() for future in futures)
    release.set()
    assert all(future.result() for future in futures)
    worker.close()


def test_limits_threads_and_the_end(folder):
    before = threading.active_count()
    torch.set_num_threads(2)
    worker = make_worker(folder, threads=1)
    assert worker.limits.max_total_tokens == worker.memory["token_capacity"] == 1024
    assert worker.limits.page_size == PAGE
    threads = []
    worker.runner.execute = lambda plan: threads.append(torch.get_num_threads())
    worker.launch(StepPlan(1, [])).result()
    assert threads == [1]
    worker.close()
    assert threading.active_count() == before


def test_a_bad_checkpoint_leaves_no_thread(folder, tmp_path):
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    before = threading.active_count()
    with pytest.raises(LoadError):
        make_worker(tmp_path)
    with pytest.raises(LoadError, match="--max-total-tokens"):
        make_worker(folder, max_total_tokens=1 << 30)
    assert threading.active_count() == before
