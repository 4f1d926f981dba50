"""Every architecture: greedy tokens, chunks, batches, every loader, ranks, stages, made-up weights.

One checkpoint of each, against transformers where that says what is right, else against ourselves
bit by bit. What is special about a family stands in the modules beside this one.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
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
from headrace.loader import build_of, get_model_loader, load_model
from headrace.loader.default import DefaultModelLoader
from headrace.loader.files import resolve_model_path, weight_files
from headrace.loader.iterators import iterate_weights
from headrace.loader.sharded import save_beside, save_sharded
from headrace.loader.state import describe
from headrace.models import Model
from tests.cpu import test_models_layouts as layouts
from tests.cpu.test_load_formats import as_bin
from tests.cpu.test_loader import raw
from tests.cpu.test_models_parity import expected, random_ids
from tests.cpu.test_split import assert_close, cut, logits_of
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


@dataclass(frozen=True)
class Made:
    """A checkpoint, transformers' model of it and ours."""

    folder: Path
    oracle: transformers.PreTrainedModel
    model: Any


@pytest.fixture(scope="module", params=sorted(MADE))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    torch.set_num_threads(1)
    folder, name = tmp_path_factory.mktemp("checkpoint"), MADE[request.param]
    oracle = make_case(folder, name) if name in CASES else layouts.write(folder, name)
    return Made(folder, oracle, load(folder))


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


def test_tokens_are_those_of_transformers_however_they_are_cut(made: Made) -> None:
    prompts = random_ids(19, 12)
    together = greedy(made.model, prompts, chunk=7, more=5)
    for ids, scores in zip(prompts, together, strict=True):
        (alone,) = greedy(made.model, [ids], chunk=len(ids), more=5)
        assert torch.equal(alone, scores)
        tokens = ids + alone.argmax(-1).tolist()[len(ids) - 1 :]
        best = expected(made.oracle, tokens[:-1]).argmax(-1)
        assert best.tolist()[len(ids) - 1 :] == tokens[len(ids) :]


# loaders


def octets(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    return {name: raw(tensor.contiguous()).clone() for name, tensor in tensors}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_every_reader_brings_the_same_tensors(made: Made, tmp_path: Path) -> None:
    for path in made.folder.iterdir():
        os.link(path, tmp_path / path.name)
    wanted = octets(iterate_weights(weight_files(tmp_path)))

    def check(load_format: str, settings: str = "{}", **options: Any) -> None:
        asked = LoadOptions(model_loader_extra_config=settings, **options)
        loader, info = get_model_loader(load_format, asked), read_model_info(tmp_path)
        assert isinstance(loader, DefaultModelLoader)
        assert_same(octets(loader.all_weights(info, loader.sources(info))), wanted)

    check("safetensors", weight_loader_disable_mmap=True)
    check("auto", '{"enable_multithread_load": true, "num_threads": 2}')
    for load_format in ("layered", "runai_streamer", "fastsafetensors"):
        check(load_format)
    as_bin(tmp_path)
    for load_format in ("pt", "npcache", "npcache"):
        check(load_format)


def test_every_state_comes_back(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is packed in another order, kept in a cache, saved, or read from a store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    info, (places, blobs) = read_model_info(made.folder), describe(made.model)
    save_beside(info, tmp_path / "saved")
    build = build_of(info, torch.float32, SOLO)
    save_sharded(made.model, info, build, tmp_path / "saved")
    cached = str(tmp_path / "packed")
    for model in (
        load(made.folder, "layered"),
        load(made.folder, weight_cache=cached),
        load(made.folder, weight_cache=cached),
        load(tmp_path / "saved", "sharded_state"),
        load(resolve_model_path(f"file://{tmp_path / 'saved'}")),
        load(resolve_model_path(f"file://{made.folder}")),
    ):
        found = describe(model)
        assert found[0] == places
        assert_same(octets(found[1].items()), octets(blobs.items()))


def test_weights_can_be_made_up(made: Made) -> None:
    (scores,) = greedy(load(made.folder, "dummy"), random_ids(8), chunk=8, more=0)
    assert scores.isfinite().all() and scores.std() > 0


# ranks


def test_two_ranks_and_two_stages_are_one(made: Made) -> None:
    alone = logits_of(made.model)
    experts = any(".experts." in name for name in made.model.checkpoint_shapes())
    for grid in (Grid(tp=2), *([Grid(tp=2, ep=2)] if experts else [])):
        first, second = cut(made.folder, grid)
        assert torch.equal(first, second)
        assert_close(first, alone)
    (staged,) = cut(made.folder, Grid(pp=2))
    assert torch.equal(staged, alone)
