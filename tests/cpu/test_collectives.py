"""What ranks exchange over shared memory, in more parts than a slot or a pipe holds."""

import os

import pytest
import torch
from torch import Tensor

from headrace import ops
from headrace.dist import shared
from headrace.dist.shared import SharedGroup, SharedMemory, make_memory
from headrace.dist.topology import Grid, Shard, even, split_heads
from headrace.layers.build import Split
from headrace.ops.experts import PackedExperts
from tests.support.native import operators
from tests.support.threads import run_grid, run_ranks

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for a few rows only."""
    monkeypatch.setattr(shared, "SLOT", 256)
    monkeypatch.setattr(shared, "BLOCK", 256)
    monkeypatch.setattr(shared, "PIPE_BYTES", 2 * 128 + 4 * 256)


def part_of(rank: int, dtype: torch.dtype, tokens: int = 9, columns: int = 21) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    wide = torch.randn(tokens, columns + 3, generator=generator).to(dtype)
    return wide[:, :columns]  # rows with gaps between


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_sums(dtype: torch.dtype, size: int) -> None:
    """In fp32, in a binary tree, rounded once; many times in a row."""
    parts = [part_of(rank, dtype).float() for rank in range(size)]

    def tree(some: list[Tensor]) -> Tensor:
        half = len(some) // 2
        return tree(some[:half]) + tree(some[half:]) if half else some[0]

    def work(group: SharedGroup) -> list[Tensor]:
        return [group.all_reduce(part_of(group.rank, dtype)) for _ in range(20)] + [
            group.all_reduce(part_of(group.rank, dtype), torch.float32)
        ]

    for results in run_ranks(size, work):
        assert all(torch.equal(y, tree(parts).to(dtype)) for y in results[:-1])
        assert torch.equal(results[-1], tree(parts))


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_columns_come_together_and_apart(size: int) -> None:
    """Whatever the padding, and where ranks share a KV head."""
    whole = part_of(9, torch.float32, columns=24)

    def work(group: SharedGroup) -> list[Tensor]:
        shard = Shard(group.rank, group.size)
        heads = split_heads(8, 4, shard)
        cuts = [(even(24, shard),) * 2, (heads.owned_cut(6), heads.kv_cut(6))]
        found = []
        for owned, here in cuts:
            spans = tuple((s.source, s.target, s.count) for s in here.spans)
            mine = ops.take_part(whole, spans, here.local)
            assert mine.shape[1] == here.local
            found.append(group.all_gather(mine, owned))
        return found

    for gathered in run_ranks(size, work):
        assert all(torch.equal(each, whole) for each in gathered)


def test_pipes_keep_order_and_wait_for_room() -> None:
    sent = [part_of(number, torch.float32, tokens=1 + 5 * number) for number in range(6)]

    def work(group: SharedGroup, split: Split) -> list[Tensor]:
        before, after = split.stage.before, split.stage.after
        got = [before.receive(tuple(x.shape), x.dtype) for x in sent] if before else sent
        for x in got if after else ():
            after.send(x)
        return got

    for got in run_grid(Grid(pp=3), work):
        assert all(torch.equal(a, b) for a, b in zip(got, sent, strict=True))


def test_rows_that_are_too_long_are_refused() -> None:
    grid = Grid(tp=2, pp=2)
    fd = make_memory(grid)
    memory = SharedMemory(fd, grid)
    os.close(fd)
    with pytest.raises(ValueError, match="longer than a slot, 256 bytes"):
        memory.group(grid.place(0)).all_reduce(torch.zeros(1, 65))
    with pytest.raises(ValueError, match="longer than a slot, 512 bytes"):
        memory.group(grid.place(0)).all_gather(torch.zeros(1, 65), even(129, Shard(0, 2)))
    with pytest.raises(ValueError, match="longer than a block, 256 bytes"):
        memory.link(grid.place(0)).send(torch.zeros(1, 65))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cast_rounds_once(dtype: torch.dtype) -> None:
    x = part_of(0, torch.float32)
    assert torch.equal(ops.cast(x, dtype), x.to(dtype))
    assert torch.equal(ops.cast(x.to(dtype), torch.float32), x.to(dtype).float())


@pytest.mark.parametrize("implementation", ["ref", "cpu"])
@pytest.mark.parametrize("format", ["", "int8", "int4", "fp8"])
def test_rows_of_a_part_of_the_vocabulary(implementation: str, format: str) -> None:
    """Rows that other ranks have are zero, so that the sum over ranks is the whole."""
    impl = operators(implementation)
    weight, ids = torch.randn(70, 64), torch.tensor([0, 69, 34, 35, 36, 2])
    parts = [impl.pack(part.contiguous(), format) for part in weight.split(35)]
    found = [impl.embedding_packed(ids, p, torch.float32, 35 * i) for i, p in enumerate(parts)]
    whole = torch.cat([impl.embedding_packed(torch.arange(35), p, torch.float32) for p in parts])
    assert torch.equal(found[0] + found[1], whole[ids])
    assert not found[0][1].any() and not found[1][0].any()


@pytest.mark.parametrize("implementation", ["ref", "cpu"])
@pytest.mark.parametrize("format", ["", "int8"])
@pytest.mark.parametrize("on_input", [False, True])
def test_experts_of_other_ranks_add_nothing(
    implementation: str, format: str, on_input: bool
) -> None:
    impl = operators(implementation)
    sizes = {"gates": (8, 12), "ups": (8, 12), "downs": (12, 8)}
    matrices = {
        name: [impl.pack(torch.randn(shape) / 3, format) for _ in range(6)]
        for name, shape in sizes.items()
    }
    x, ids = torch.randn(9, 12), torch.stack([torch.randperm(6)[:3] for _ in range(9)]).int()
    weights, biases = torch.rand(9, 3), (torch.randn(6, 16), torch.randn(6, 12))

    def run(first: int, stop: int, number: int) -> torch.Tensor:
        some = (tuple(matrices[name][first:stop]) for name in sizes)
        experts = PackedExperts(*some, *(bias[first:stop].contiguous() for bias in biases))
        found: torch.Tensor = impl.moe_packed(
            x, experts, ids, weights, "silu", on_input, first=number
        )
        return found

    torch.testing.assert_close(sum(run(i, i + 2, i) for i in (0, 2, 4)), run(0, 6, 0))
    rest = run(0, 6, 6)
    assert not rest.any()
