"""lm-eval-harness scores the demo model: over HTTP the same as with transformers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from headrace.assets import demo_model_path
from headrace.engine.runtime import Runtime
from tests.sdk.conftest import API_KEY, MODEL

TASK = {
    "task": "wheels",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
    "metadata": {"version": 1},
}
QUESTIONS = [
    ("What is the capital of France?", ["Paris", "Rome", "a mill wheel"], 0),
    ("What is 12 + 30?", ["42", "17", "The sum is 3012."], 0),
    ("Größe — naïve 水車 🙂?", ["ja", "nein, überhaupt nicht", "水"], 1),
    ("Which wheel is driven from above?\n\n  overshot  or\tundershot", ["over", "under"], 0),
    ("x" * 300, ["y", "x"], 1),
]


@pytest.fixture
def task(tmp_path: Path) -> dict:
    data = tmp_path / "test.jsonl"
    lines = [
        json.dumps({"question": question, "choices": choices, "label": label})
        for question, choices, label in QUESTIONS
    ]
    data.write_text("\n".join(lines), encoding="utf-8")
    return TASK | {
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path)}
    }


def scores(task: dict, model: str, model_args: dict) -> list[tuple[float, bool]]:
    """(log-likelihood, whether greedy) of every choice of every question."""
    found = simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"]["wheels"], key=lambda sample: sample["doc_id"])
    return [
        (float(value), bool(greedy))
        for sample in samples
        for value, greedy in sample["filtered_resps"]
    ]


@pytest.fixture
def exact_url() -> Iterator[str]:
    """A server that rounds no weight, key or value to bfloat16, as the reference."""
    with Runtime(api_key=API_KEY, dtype="float32") as runtime:
        yield f"{runtime.url}/v1/completions"


def test_log_likelihoods_are_those_of_transformers(task, exact_url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    served = scores(
        task,
        "local-completions",
        {
            "model": MODEL,
            "base_url": exact_url,
            "tokenizer": str(demo_model_path()),
            "tokenizer_backend": "huggingface",
            "max_length": 512,
        },
    )
    reference = scores(
        task, "hf", {"pretrained": str(demo_model_path()), "dtype": "float32", "max_length": 512}
    )
    assert len(served) == len(reference) == sum(len(choices) for _, choices, _ in QUESTIONS)
    assert [value for value, _ in served] == pytest.approx(
        [value for value, _ in reference], abs=1e-4
    )
    assert [greedy for _, greedy in served] == [greedy for _, greedy in reference]
