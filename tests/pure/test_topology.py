"""The arithmetic of tensor-parallel cuts: every part held, none counted twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.dist.topology import Shard, Span, even, split_heads, whole

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
