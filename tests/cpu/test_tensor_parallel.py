"""A model cut over ranks that divide nothing computes what one rank computes; the loader's part."""

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from headrace.core.config import Config
from headrace.core.model_info import read_model_info
from headrace.dist.comm import GlooGroup, GlooWays, Group, SoloGroup
from headrace.dist.topology import Grid, Shard, even
from headrace.layers.build import WHOLE, Split
from headrace.loader import build_of, load_built, load_model
from headrace.runner.seat import seat_in
from tests.support.checkpoints import make_case
from tests.support.paged import PagedRun
from tests.support.threads import Part, run_ranks

IDS = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(5)).tolist()


def logits(folder: Path, group: Group, load_format: str = "auto", split: Split = WHOLE) -> Tensor:
    """Prefill of one sequence beside a chunk of another, then decode of both."""
    info = read_model_info(folder)
    model = load_built(info, build_of(info, torch.float32, group, split=split), load_format)
    run = PagedRun(Part(model), IDS)
    steps = [run.step(chunks) for chunks in ([(0, 23), (1, 10)], [(1, 13), (0, 1)], [(1, 1)])]
    return torch.cat([part for step in steps for part in step]).log_softmax(-1)


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize(
    "case", ["llama-bias", "llama-tied", "llama-mqa", "qwen3", "llama-mha", "deepseek-v3"]
)
def test_ranks_agree_with_one(tmp_path: Path, case: str, size: int) -> None:
    """Sizes that divide nothing: 4 heads, 2 KV heads, 44 inner columns, 101 tokens."""
    make_case(tmp_path, case)
    alone = logits(tmp_path, SoloGroup())
    for result in run_ranks(size, lambda group: logits(tmp_path, group)):
        assert_close(alone, result)


@pytest.mark.parametrize("size", [2, 3])
def test_dummy_weights_do_not_depend_on_the_partition(tmp_path: Path, size: int) -> None:
    make_case(tmp_path, "qwen2")
    (tmp_path / "model.safetensors").unlink()
    alone = logits(tmp_path, SoloGroup(), "dummy")
    assert alone.std() > 0
    for result in run_ranks(size, lambda group: logits(tmp_path, group, "dummy")):
        assert_close(alone, result)


def test_each_rank_holds_its_share(tmp_path: Path) -> None:
    make_case(tmp_path, "llama")
    models = run_ranks(2, lambda group: load_model(read_model_info(tmp_path), torch.float32, group))
    assert [spec.kv_heads for model in models for spec in model.state_specs()] == [1] * 6


def test_ranks_and_stages_without_shared_memory(tmp_path: Path) -> None:
    """Over gloo: ranks as threads, each with sockets to the others."""
    make_case(tmp_path, "llama-bias")
    alone, store, grid = logits(tmp_path, SoloGroup()), HashStore(), Grid(tp=2, pp=2)
    config = Config.from_flat({"tp_size": 2, "pp_size": 2})

    def one(rank: int) -> Tensor:
        place = grid.place(rank)
        seat = seat_in(GlooWays(store, grid, place), place, config)
        return logits(tmp_path, seat.group, split=seat.split)

    with ThreadPoolExecutor(grid.size) as pool:
        results = list(pool.map(one, range(grid.size)))
    for result in results[2:]:
        assert_close(alone, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gloo_collectives(dtype: torch.dtype) -> None:
    store = HashStore()
    results: dict[int, tuple[Tensor, Tensor]] = {}

    def one(rank: int) -> None:
        group = GlooGroup(Shard(rank, 3), store, "g", timeout=timedelta(seconds=120))
        part = torch.full((2, 2), float(rank + 1), dtype=dtype)
        gathered = group.all_gather(part.T, even(6, Shard(rank, 3)))
        results[rank] = (group.all_reduce(part.clone()), gathered)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for rank in range(3):
        reduced, gathered = results[rank]
        assert torch.equal(reduced, torch.full((2, 2), 6.0, dtype=dtype))
        assert gathered.tolist() == [[1, 1, 2, 2, 3, 3]] * 2
