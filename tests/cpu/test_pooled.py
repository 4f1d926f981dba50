"""Embeddings and scores against transformers, and bitwise the same however they are scheduled."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from tests.support.pooled import CASES, build, make_model, pool, write_modules

LENGTHS = (1, 7, 16, 40, 17, 3, 150, 33)
ALONE = {"disable_radix_cache": True, "max_running_requests": 1}
SCHEDULES: dict[str, dict[str, Any]] = {
    "together": {},
    "small-pages": {"page_size": 4, "disable_overlap_schedule": True},
    "chunks": {"chunked_prefill_size": 13, "page_size": 1},
    "tight": {"max_total_tokens": 256, "page_size": 4, "threads": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def prompts() -> list[list[int]]:
    random = np.random.default_rng(3)
    shared = random.integers(3, 101, 40).tolist()
    return [
        shared[: length // 2] + random.integers(3, 101, length - length // 2).tolist()
        for length in LENGTHS
    ]


def hidden(oracle: transformers.PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """[tokens, hidden] of the last layer, after the final norm."""
    with torch.inference_mode():
        base = oracle.base_model
        return base(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids))).last_hidden_state[
            0
        ]


def scores(oracle: transformers.PreTrainedModel, ids: list[int], second: int = 0) -> torch.Tensor:
    """Logits [labels] of a classifier."""
    more = {}
    if second:
        types = torch.arange(len(ids)) >= second
        more["token_type_ids"] = types.long()[None]
    with torch.inference_mode():
        return oracle(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **more).logits[0]


POOLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda states: states[0],
    "mean_tokens": lambda states: states.mean(0),
    "lasttoken": lambda states: states[-1],
    "max_tokens": lambda states: states.max(0).values,
    "mean_sqrt_len_tokens": lambda states: states.sum(0) / len(states) ** 0.5,
    "weightedmean_tokens": lambda states: (
        torch.arange(1.0, len(states) + 1).double() @ states.double() / sum(range(len(states) + 1))
    ),
}


def close(got: np.ndarray, want: torch.Tensor) -> None:
    cosine = torch.nn.functional.cosine_similarity(
        torch.from_numpy(got.copy()).double(), want.double(), dim=0
    )
    assert cosine >= 1 - 1e-6


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers_and_itself(case: str, tmp_path: Path) -> None:
    oracle = make_model(tmp_path, case)
    alone = pool(*build(tmp_path, **ALONE), prompts())
    for ids, got in zip(prompts(), alone, strict=True):
        if "ForSequence" in CASES[case][0]:
            want = scores(oracle, ids)
            assert np.allclose(got, want.numpy(), atol=2e-5, rtol=1e-4)
        else:
            states = hidden(oracle, ids)
            close(
                got, states[0] if CASES[case][0] in ("BertModel", "XLMRobertaModel") else states[-1]
            )
            assert abs(np.linalg.norm(got) - 1) < 1e-6
    for options in SCHEDULES.values():
        for one, other in zip(alone, pool(*build(tmp_path, **options), prompts()), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("case", "mode"),
    [*(("qwen3-causal", mode) for mode in POOLS), ("bert", "mean_tokens"), ("bert", "lasttoken")],
)
def test_modes_of_modules_json(case: str, mode: str, tmp_path: Path) -> None:
    oracle = make_model(tmp_path, case)
    write_modules(tmp_path, mode, normalize=mode != "mean_tokens")
    alone = pool(*build(tmp_path, **ALONE), prompts())
    for ids, got in zip(prompts(), alone, strict=True):
        want = POOLS[mode](hidden(oracle, ids))
        close(got, want)
        if mode == "mean_tokens":
            assert np.allclose(got, want.numpy(), atol=2e-5)
    for options in SCHEDULES.values():
        for one, other in zip(alone, pool(*build(tmp_path, **options), prompts()), strict=True):
            assert np.array_equal(one, other)


def test_token_types_of_pairs(tmp_path: Path) -> None:
    oracle = make_model(tmp_path, "bert-cross")
    seconds = [0, 3, 8, 1, 16, 2, 100, 5]
    got = pool(*build(tmp_path), prompts(), seconds)
    for ids, second, vector in zip(prompts(), seconds, got, strict=True):
        assert np.allclose(vector, scores(oracle, ids, second).numpy(), atol=2e-5)
    plain = pool(*build(tmp_path), prompts())
    assert not np.allclose(plain[6], got[6], atol=1e-3)


def test_two_layer_reward_heads(tmp_path: Path) -> None:
    """Qwen2ForRewardModel, which transformers does not have: two layers with a ReLU between."""
    base = make_model(tmp_path / "base", "qwen2-classes").base_model
    torch.manual_seed(0)
    head = torch.nn.Sequential(
        torch.nn.Linear(32, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
    ).requires_grad_(False)
    weights = {f"model.{name}": weight for name, weight in base.state_dict().items()}
    weights |= {f"score.{name}": weight for name, weight in head.state_dict().items()}
    save_file(weights, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["architectures"] = ["Qwen2ForRewardModel"]
    del config["id2label"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    for options in (ALONE, *SCHEDULES.values()):
        for ids, got in zip(prompts(), pool(*build(tmp_path, **options), prompts()), strict=True):
            want = head(hidden(base, ids)[-1]).numpy()
            assert got.shape == (1,) and np.allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(
    ("case", "mode", "reuses"),
    [
        ("qwen3", "", True),
        ("qwen3-reward", "", True),
        ("qwen3", "mean_tokens", False),
        ("bert", "", False),
    ],
)
def test_who_reuses_prefixes(case: str, mode: str, reuses: bool, tmp_path: Path) -> None:
    make_model(tmp_path, case)
    if mode:
        write_modules(tmp_path, mode)
    scheduler, info = build(tmp_path, page_size=4)
    first = pool(scheduler, info, prompts())
    before = scheduler.planner.cached_tokens_total
    second = pool(scheduler, info, prompts())
    assert (scheduler.planner.cached_tokens_total > before) == reuses
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    if not reuses:
        assert scheduler.space.cache.held == 0
