"""The recorded model gives the bits of the model called operator by operator."""

from pathlib import Path

import pytest
import torch

from headrace.core.model_info import read_model_info
from headrace.dist.comm import SoloGroup
from headrace.loader import load_model
from headrace.ops.cpu.record import Arena, empty, recording
from headrace.runner.graph import EagerGraph, RecordedGraph, make_graph
from tests.support.checkpoints import make_case
from tests.support.paged import PagedRun

PROMPTS = [[5, 9, 33, 7, 21, 8, 64], [11, 12, 13]]


def paged(folder: Path, case: str) -> PagedRun:
    torch.set_num_threads(1)
    make_case(folder, case)
    model = load_model(read_model_info(folder), torch.float32, SoloGroup())
    return PagedRun(model, PROMPTS)


CASES = ["llama-bias", "mistral-window", "qwen3", "llama-longrope-long", "gpt2", "gptj", "neox"]
CASES += ["opt", "falcon-40b", "phi", "stablelm", "cohere2", "olmo", "olmo2", "gemma2", "gemma3"]
CASES += ["deepseek-v2-lite", "deepseek-v3", "llama4", "phimoe", "bloom"]


@pytest.mark.parametrize("case", CASES)
def test_replay_equals_calls(tmp_path, case):
    run = paged(tmp_path, case)
    with torch.inference_mode():
        recorded = RecordedGraph(run.model, run.caches, run.page_size, tokens=6, picks=2)
        eager = EagerGraph(run.model)
        for chunks in ([(0, 4), (1, 2)], [(1, 1)], [(0, 1)], [(0, 2)]):
            batch = run.batch(chunks)
            places = torch.arange(len(batch.ids)).numpy()[-2:]
            hidden = recorded.forward(batch)
            assert hidden.data_ptr() == recorded.hidden.data_ptr()
            scores = recorded.logits(hidden, places).clone()
            assert torch.equal(eager.forward(batch), hidden)
            assert torch.equal(eager.logits(hidden, places), scores)
            for row, count in chunks:
                run.done[row] += count


def test_larger_steps_run_call_by_call(tmp_path):
    run = paged(tmp_path, "qwen3")
    with torch.inference_mode():
        recorded = RecordedGraph(run.model, run.caches, run.page_size, tokens=3, picks=1)
        batch = run.batch([(0, 7), (1, 3)])
        hidden = recorded.forward(batch)
        assert len(hidden) == 10
        places = torch.arange(10).numpy()
        assert torch.equal(recorded.logits(hidden, places), run.model.logits(hidden))


def test_a_model_that_computes_between_operators_runs_call_by_call(tmp_path, caplog):
    run = paged(tmp_path, "llama")
    forward = run.model.forward
    run.model.forward = lambda batch: forward(batch) * 2
    with torch.inference_mode():
        graph = make_graph(run.model, run.caches, run.page_size, tokens=3, picks=1)
    assert isinstance(graph, EagerGraph)
    assert "differs from the model" in caplog.text


def test_the_arena_reuses_what_is_released():
    arena = Arena(1 << 16)
    with recording(arena):
        first = empty((100, 4), torch.float32)
        view = first[10:]
        place = first.data_ptr()
        del first
        second = empty((100, 4), torch.float32)
        assert second.data_ptr() != place
        del view
        assert empty((100, 4), torch.float32).data_ptr() == place
    with pytest.raises(MemoryError, match="arena"):
        arena.tensor((1 << 16,), torch.float32)
    assert empty((3,), torch.float32).shape == (3,)
