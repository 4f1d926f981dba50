"""Every architecture: greedy tokens, chunks, batches, every loader, ranks, stages, made-up weights.

One checkpoint of each, against transformers where that says what is right, else against ourselves
bit by bit. What is special about a family stands in the modules beside this one.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from headrace import models
from headrace.core.model_info import read_model_info
from headrace.core.weight_options import LoadOptions
from headrace.dist.comm import SoloGroup
from headrace.dist.topology import Grid
from headrace.loader import build_of, load_model
from headrace.loader.files import resolve_model_path
from headrace.loader.sharded import save_beside, save_sharded
from headrace.loader.state import describe
from headrace.models import Model
from tests.cpu import test_models_layouts as layouts
from tests.cpu.test_load_formats import as_bin
from tests.cpu.test_models_parity import expected, random_ids
from tests.cpu.test_split import assert_close, cut, logits
from tests.support.checkpoints import CASES, make_case
from tests.support.paged import PagedRun

SOLO = SoloGroup()
#: architecture -> its last case, or its own name where another family's network is its oracle
MADE = {architecture: case for case, (architecture, _) in CASES.items()}
MADE |= {architecture: architecture for architecture in layouts.CASES}
#: other names in config.json for the same
ALIASES = {
    "BaiChuanForCausalLM": "BaichuanForCausalLM",
    "ChatGLMForConditionalGeneration": "ChatGLMModel",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "PhiMoEForCausalLM": "PhimoeForCausalLM",
}
MULTITHREAD = '{"enable_multithread_load": true, "num_threads": 2}'


@pytest.fixture(scope="module", params=sorted(MADE))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, transformers.PreTrainedModel]]:
    torch.set_num_threads(1)
    folder, name = tmp_path_factory.mktemp("checkpoint"), MADE[request.param]
    oracle = make_case(folder, name) if name in CASES else layouts.write(folder, name)
    yield folder, oracle


def load(folder: Path, load_format: str = "auto", **asked: Any) -> Model:
    return load_model(read_model_info(folder), torch.float32, SOLO, load_format, **asked)


def test_every_architecture_is_here() -> None:
    decoders = {name for name in models.ARCHITECTURES if name.endswith(("LM", "Generation"))}
    assert decoders <= {*MADE, *ALIASES}
    for alias, name in ALIASES.items():
        assert models.ARCHITECTURES[alias] == models.ARCHITECTURES[name]


# tokens


def greedy(model: Model, prompts: list[list[int]], chunk: int, more: int) -> list[Tensor]:
    """Prompts in chunks, all in one batch, then `more` best tokens each; logits of each."""
    rows = [list(ids) for ids in prompts]
    run = PagedRun(model, [ids + [0] * more for ids in rows], prompt_lens=[*map(len, prompts)])
    found: list[list[Tensor]] = [[] for _ in rows]
    run.sequences = rows
    while True:
        left = [len(ids) - done for ids, done in zip(rows, run.done, strict=True)]
        work = [(row, min(chunk, count)) for row, count in enumerate(left) if count]
        if not work:
            return [torch.cat(parts) for parts in found]
        for (row, _), scores in zip(work, run.step(work), strict=True):
            found[row].append(scores)
            if run.done[row] == len(rows[row]) < len(prompts[row]) + more:
                rows[row].append(int(scores[-1].argmax()))


def test_tokens_are_those_of_transformers_however_they_are_cut(
    made: tuple[Path, transformers.PreTrainedModel],
) -> None:
    folder, oracle = made
    model, prompts = load(folder), random_ids(19, 12)
    together = greedy(model, prompts, chunk=7, more=5)
    for ids, scores in zip(prompts, together, strict=True):
        (alone,) = greedy(model, [ids], chunk=len(ids), more=5)
        assert torch.equal(alone, scores)
        tokens = ids + alone.argmax(-1).tolist()[len(ids) - 1 :]
        best = expected(oracle, tokens[:-1]).argmax(-1)
        assert best.tolist()[len(ids) - 1 :] == tokens[len(ids) :]


# loaders


def state(model: Model) -> tuple[Any, dict[str, Tensor]]:
    """All that a model holds: places, and bytes by name."""
    places, blobs = describe(model)
    return places, {k: v.contiguous().reshape(-1).view(torch.uint8) for k, v in blobs.items()}


def test_every_loader_brings_the_same(
    made: tuple[Path, transformers.PreTrainedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder, whole = made[0], load(made[0])
    places, blobs = state(whole)

    def check(model: Model) -> None:
        found = state(model)
        assert found[0] == places
        assert all(torch.equal(blob, found[1][name]) for name, blob in blobs.items())

    for load_format in ("layered", "runai_streamer", "fastsafetensors"):
        check(load(folder, load_format))
    threads = LoadOptions(model_loader_extra_config=MULTITHREAD)
    check(load(folder, options=threads))
    check(load(resolve_model_path(f"file://{folder}")))
    for _ in range(2):
        check(load(folder, weight_cache=str(tmp_path / "packed")))
    info = read_model_info(folder)
    save_beside(info, tmp_path / "saved")
    save_sharded(whole, info, build_of(info, torch.float32, SOLO), tmp_path / "saved")
    check(load(tmp_path / "saved", "sharded_state"))
    (tmp_path / "bin").mkdir()
    for path in folder.iterdir():
        os.link(path, tmp_path / "bin" / path.name)
    as_bin(tmp_path / "bin")
    check(load(tmp_path / "bin", "pt"))
    check(load(tmp_path / "bin", "npcache"))


def test_weights_can_be_made_up(made: tuple[Path, transformers.PreTrainedModel]) -> None:
    model = load(made[0], "dummy")
    (scores,) = greedy(model, random_ids(8), chunk=8, more=0)
    assert scores.isfinite().all() and scores.std() > 0


# ranks


def test_two_ranks_and_two_stages_are_one(made: tuple[Path, transformers.PreTrainedModel]) -> None:
    folder, _ = made
    alone = logits(folder, SOLO)
    experts = ".experts." in str(sorted(load(folder).checkpoint_shapes()))
    for grid in (Grid(tp=2), *([Grid(tp=2, ep=2)] if experts else [])):
        first, second = cut(folder, grid)
        assert torch.equal(first, second)
        assert_close(first, alone)
    (staged,) = cut(folder, Grid(pp=2))
    assert torch.equal(staged, alone)
