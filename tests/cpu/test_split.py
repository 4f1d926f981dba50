"""Models cut over ranks and stages: tokens of one rank, and its bits where they are promised."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace.core.errors import LoadError
from headrace.core.model_info import read_model_info
from headrace.dist.comm import Group, SoloGroup
from headrace.dist.topology import Grid
from headrace.layers.build import WHOLE, Split
from headrace.loader import build_of, load_built
from headrace.models import Model
from tests.support.checkpoints import make_case
from tests.support.paged import PagedRun
from tests.support.threads import Part, run_grid

IDS = torch.randint(3, 101, (2, 18), generator=torch.Generator().manual_seed(5)).tolist()


def slow(*cases: str) -> list[Any]:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


def logits(
    folder: Path, group: Group, split: Split = WHOLE, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Prefill of one sequence beside a chunk of another, then decode; [tokens, vocab or 0]."""
    info = read_model_info(folder)
    return logits_of(load_built(info, build_of(info, dtype, group, split=split)), dtype)


def logits_of(model: Model, dtype: torch.dtype = torch.float32) -> Tensor:
    run = PagedRun(Part(model), IDS, dtype=dtype)
    steps = [run.step(chunks) for chunks in ([(0, 17), (1, 9)], [(1, 8), (0, 1)], [(1, 1)])]
    return torch.cat([part for step in steps for part in step])


def cut(folder: Path, grid: Grid, units: int = 0, **options: Any) -> list[Tensor]:
    """The logits of each rank of the last stage."""
    found = run_grid(
        grid, lambda group, split: logits(folder, group, split, **options), units=units
    )
    return found[-grid.tp :]


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.log_softmax(-1), other.log_softmax(-1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("case", ["olmo2", *slow("olmoe", "minimax-m2")])
def test_norms_over_all_heads_on_uneven_ranks(tmp_path: Path, case: str) -> None:
    """4 heads on 3 ranks, 2 KV heads on 3 and 4."""
    make_case(tmp_path, case)
    alone = logits(tmp_path, SoloGroup())
    for size in (3, 4):
        assert_close(cut(tmp_path, Grid(tp=size))[-1], alone)


@pytest.mark.parametrize("case", ["glm4-moe", "gpt-oss", "llama4", *slow("qwen2-moe", "dbrx")])
def test_experts_dealt_to_ranks(tmp_path: Path, case: str) -> None:
    make_case(tmp_path, case)
    alone = logits(tmp_path, SoloGroup())
    for grid in (Grid(tp=2, ep=2), Grid(tp=4, ep=2), Grid(tp=3, ep=3)):
        assert_close(cut(tmp_path, grid)[-1], alone)


@pytest.mark.parametrize(
    "case",
    [
        "llama-mqa",
        "gpt2",
        "mixtral",
        "gpt-oss",
        "deepseek-v3",
        *slow("olmo2", "qwen2-moe", "cohere"),
    ],
)
def test_sums_in_units_have_the_same_bits_on_any_number_of_ranks(tmp_path: Path, case: str) -> None:
    make_case(tmp_path, case)
    alone = logits(tmp_path, SoloGroup())
    one, two, four = (cut(tmp_path, Grid(tp=size), units=4)[-1] for size in (1, 2, 4))
    assert torch.equal(one, two)
    assert torch.equal(one, four)
    assert torch.equal(logits(tmp_path, SoloGroup(), Split(units=4)), one)
    assert_close(one, alone)


@pytest.mark.parametrize("case", ["mixtral"])
def test_the_same_in_bfloat16(tmp_path: Path, case: str) -> None:
    make_case(tmp_path, case)
    one, two = (cut(tmp_path, Grid(tp=s), units=2, dtype=torch.bfloat16)[-1] for s in (1, 2))
    assert torch.equal(one, two)


def test_ranks_of_stages(tmp_path: Path) -> None:
    make_case(tmp_path, "llama-tied")
    whole = cut(tmp_path, Grid(tp=2))
    for staged, other in zip(cut(tmp_path, Grid(tp=2, pp=3)), whole, strict=True):
        assert torch.equal(staged, other)


def test_a_stage_reads_its_own_layers_alone(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    info = read_model_info(tmp_path)

    def held(group: Group, split: Split) -> set[str]:
        model: Any = load_built(info, build_of(info, torch.float32, group, split=split))
        return {name.split(".")[2] for name in model.checkpoint_shapes() if ".layers." in name}

    assert run_grid(Grid(pp=2), held) == [{"0", "1"}, {"2"}]
    with pytest.raises(LoadError, match="3 layers cannot be 4 stages"):
        run_grid(Grid(pp=4), held)
