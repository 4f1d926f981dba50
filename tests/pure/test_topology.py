"""The arithmetic of tensor-parallel cuts: every part held, none counted twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.weight_options import ParallelOptions
from headrace.dist.topology import (
    Grid,
    Shard,
    Span,
    even,
    piece,
    share_of_cores,
    split_heads,
    stage_layers,
    whole,
)

SIZES = st.integers(1, 9)


@given(size=st.integers(1, 300), ranks=SIZES)
def test_even_parts_cover_everything_once_in_order(size: int, ranks: int) -> None:
    cuts = [even(size, Shard(rank, ranks)) for rank in range(ranks)]
    assert len({cut.local for cut in cuts}) == 1
    held = [span.source + i for cut in cuts for span in cut.spans for i in range(span.count)]
    assert held == list(range(size))
    assert all(span.target == 0 for cut in cuts for span in cut.spans)
    assert [cut.padded for cut in cuts] == [
        sum(span.count for span in cut.spans) < cut.local for cut in cuts
    ]


@given(kv_heads=SIZES, group=SIZES, ranks=st.integers(1, 20))
def test_heads_are_held_once_next_to_their_kv_head(kv_heads: int, group: int, ranks: int) -> None:
    splits = [split_heads(kv_heads * group, kv_heads, Shard(rank, ranks)) for rank in range(ranks)]
    assert len({(len(split.q), len(split.kv)) for split in splits}) == 1
    held = sorted(head for split in splits for head in split.q if head is not None)
    assert held == list(range(kv_heads * group))
    for split in splits:
        local_group = len(split.q) // len(split.kv)
        for index, head in enumerate(split.q):
            if head is not None:
                assert split.kv[index // local_group] == head // group
        assert len(split.kv) <= -(-kv_heads // ranks)


def test_kv_heads_are_replicated_when_there_are_more_ranks() -> None:
    splits = [split_heads(8, 2, Shard(rank, 4)) for rank in range(4)]
    assert [split.kv for split in splits] == [(0,), (0,), (1,), (1,)]
    assert [split.q for split in splits] == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_padding_heads_leave_a_hole_in_the_cut() -> None:
    split = split_heads(4, 1, Shard(2, 3))
    assert split.q == (None, None)
    assert split.q_cut(16).padded
    assert split_heads(4, 1, Shard(1, 3)).q_cut(16).spans == (Span(32, 0, 16), Span(48, 16, 16))


def test_whole_is_one_span() -> None:
    assert whole(5).spans == (Span(0, 0, 5),)
    assert not whole(5).padded


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="rank 2"):
        Shard(2, 2)
    with pytest.raises(ValueError, match="6 heads"):
        split_heads(6, 4, Shard())
    with pytest.raises(ValueError, match="4 units"):
        Shard(0, 3, units=4)
    with pytest.raises(ValueError, match="3 KV heads"):
        split_heads(12, 3, Shard(1, 4, units=16))


@given(size=st.integers(1, 300), kv=st.sampled_from([1, 2, 3, 4, 6]), group=st.integers(1, 5))
def test_units_are_the_same_whatever_the_number_of_ranks(size: int, kv: int, group: int) -> None:
    """A unit, of features or of heads, has the same elements, and lies in one rank."""
    for units in (2, 4, 8):
        columns, heads = [], []
        for ranks in (1, 2, units):
            shards = [Shard(rank, ranks, units) for rank in range(ranks)]
            splits = [split_heads(kv * group, kv, shard) for shard in shards]
            for split in splits:
                share = len(split.q) // len(split.kv)
                for index, head in enumerate(split.q):
                    assert head is None or split.kv[index // share] == head // group
            owned = sorted(h for split in splits for h in split.owned if h is not None)
            assert owned == list(range(kv))
            pieces = units // ranks
            for found, cuts in (
                (columns, [even(size, shard) for shard in shards]),
                (heads, [split.q_cut(3) for split in splits]),
            ):
                parts = [piece(cut, index, pieces) for cut in cuts for index in range(pieces)]
                found.append(parts)
        assert columns[0] == columns[1] == columns[2]
        assert heads[0] == heads[1] == heads[2]


@given(layers=st.integers(1, 100), stages=st.integers(1, 12))
def test_stages_are_consecutive_and_even(layers: int, stages: int) -> None:
    parts = [stage_layers(layers, Shard(rank, stages)) for rank in range(stages)]
    assert [layer for part in parts for layer in part] == list(range(layers))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def by_the_book(grid: Grid, node: int) -> list[tuple[int, int, int, int]]:
    """(pp rank, tp rank, ep rank, gpu id) of the ranks that SGLang starts on a node."""
    pp_size_per_node = max(grid.pp // grid.nodes, 1)
    nnodes_per_pp_rank = max(grid.nodes // grid.pp, 1)
    first_pp = pp_size_per_node * (node // nnodes_per_pp_rank)
    tp_size_per_node = grid.tp // nnodes_per_pp_rank
    first_tp = tp_size_per_node * (node % nnodes_per_pp_rank)
    return [
        (
            pp_rank,
            tp_rank,
            tp_rank // (grid.tp // grid.ep),
            grid.base_gpu_id
            + (pp_rank % pp_size_per_node) * tp_size_per_node
            + (tp_rank % tp_size_per_node) * grid.gpu_id_step,
        )
        for pp_rank in range(first_pp, first_pp + pp_size_per_node)
        for tp_rank in range(first_tp, first_tp + tp_size_per_node)
    ]


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("pp", [1, 2, 4, 8])
@pytest.mark.parametrize("tp", [1, 2, 8, 16, 32])
def test_ranks_and_devices_on_many_nodes(tp: int, pp: int, nodes: int) -> None:
    if tp % max(nodes // pp, 1):
        with pytest.raises(ValueError, match="cannot be laid"):
            Grid(tp=tp, pp=pp, nodes=nodes)
        return
    for ep in {1, min(tp, 4), tp}:
        grid = Grid(tp=tp, pp=pp, ep=ep, nodes=nodes, base_gpu_id=2, gpu_id_step=3)
        seen = []
        for node in range(nodes):
            options = ParallelOptions(tp_size=tp, pp_size=pp, nnodes=nodes, node_rank=node)
            assert [p.rank for p in grid.on_node(node)] == list(options.ranks_here)
            places = grid.on_node(node)
            found = [(p.pp_rank, p.tp_rank, p.ep_rank, p.gpu_id) for p in places]
            assert found == by_the_book(grid, node)
            seen += [place.rank for place in places]
        assert sorted(seen) == list(range(grid.size))


def test_grids_that_cannot_be() -> None:
    for wrong in ({"tp": 4, "ep": 3}, {"pp": 3, "nodes": 2}, {"tp": 3, "nodes": 2}):
        with pytest.raises(ValueError, match="cannot be"):
            Grid(**wrong)


@given(cores=st.integers(1, 40), ranks=st.integers(1, 50))
def test_ranks_share_the_cores(cores: int, ranks: int) -> None:
    shares = [share_of_cores(list(range(cores)), rank, ranks) for rank in range(ranks)]
    assert all(shares)
    taken = [core for share in shares for core in share]
    assert set(taken) == set(range(cores))
    assert len(taken) == max(cores, ranks)
