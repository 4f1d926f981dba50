"""Pages and prefixes: the radix tree against a plain dictionary of prefixes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.pages import PagePool
from headrace.cache.radix import RadixCache, common_length

TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=24)


def test_pages_are_shared_and_come_back():
    pool = PagePool(4, 16)
    pages = pool.take(3)
    assert pages is not None and len(set(pages)) == 3
    assert pool.take(2) is None and pool.free == 1
    pool.share(pages[:2])
    pool.release(pages)
    assert pool.free == 2
    pool.release(pages[:2])
    assert pool.free == 4
    pool.check()


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_common_length(a, b):
    want = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
    got = common_length(np.array(a, np.int32), np.array(b, np.int32))
    assert got == (min(len(a), len(b)) if want is None else want)


@given(st.data(), st.sampled_from([1, 2, 4]))
@settings(max_examples=100, deadline=None)
def test_radix_against_a_dictionary(data, page_size):
    """Whatever is inserted and locked: the longest stored prefix is found, no page lost."""
    pool, cache = PagePool(400, page_size), RadixCache(page_size)
    stored: dict[tuple[str, bytes], int] = {}
    locked = []
    for _ in range(data.draw(st.integers(1, 12))):
        space = data.draw(st.sampled_from(["", "salt"]))
        tokens = np.array(data.draw(TOKENS), np.int32)
        whole = len(tokens) // page_size
        found = cache.match(space, tokens)
        want = [
            stored[key]
            for n in range(1, whole + 1)
            if (key := (space, tokens[: n * page_size].tobytes())) in stored
        ]
        assert found.pages == want
        pages = found.pages + (pool.take(whole - len(found.pages)) or [])
        kept = cache.insert(space, tokens, pages, 0)
        assert kept.pages == pages
        for n, page in enumerate(pages, 1):
            stored[space, tokens[: n * page_size].tobytes()] = page
        if data.draw(st.booleans()):
            cache.lock(kept.node)
            locked.append((kept, space, tokens))
        cache.check()
    pool.release(cache.clear())
    cache.check()
    for kept, space, tokens in locked:
        assert cache.match(space, tokens).pages == kept.pages, "a locked prefix was evicted"
        cache.unlock(kept.node)
    pool.release(cache.clear())
    assert pool.free == pool.count and cache.held == 0


@pytest.mark.parametrize(
    ("policy", "first"),
    [("lru", 1), ("lfu", 1), ("fifo", 0), ("mru", 2), ("filo", 2), ("slru", 1), ("priority", 2)],
)
def test_eviction_order(policy, first):
    """Three prefixes: 0 is old but used twice, 1 is never used, 2 is new, used, and unimportant."""
    cache = RadixCache(16, policy)
    for index, priority in enumerate((5, 5, 1)):
        tokens = np.full(16 * 16, index, np.int32)
        cache.insert("", tokens, list(range(index * 16, index * 16 + 16)), priority)
    for index in (0, 0, 2):
        cache.match("", np.full(16 * 16, index, np.int32))
    cache.match("", np.full(16 * 16, 1, np.int32), use=False)
    assert cache.evict(16)[0] // 16 == first


def test_duplicate_insert_returns_the_stored_pages():
    cache = RadixCache(2)
    tokens = np.arange(6, dtype=np.int32)
    cache.insert("", tokens, [10, 11, 12], 0)
    again = cache.insert("", np.arange(8, dtype=np.int32), [20, 21, 22, 23], 0)
    assert again.pages == [10, 11, 12, 23]
    assert cache.held == 4


def test_divergence_is_told_to_the_token():
    from headrace.cache.divergence import divergence

    cache = RadixCache(4)
    first, second = np.arange(20, dtype=np.int32), np.arange(20, dtype=np.int32)
    second[14:] += 100  # within the fourth page
    cache.insert("", first, [1, 2, 3, 4, 5], 0, "first")
    cache.insert("", second, [6, 7, 8, 9, 10], 0, "second")

    def ask(tokens):
        prefix = cache.match("", tokens[:-1], use=False)
        cached = len(prefix.pages) * 4
        found = divergence(prefix.node, tokens[cached:])
        return found and (cached + found[0], found[1])

    third = first.copy()
    third[15] = 7
    assert ask(third) == (15, "first")
    third[14] = 114
    assert ask(third) == (15, "second")
    assert ask(first) is None and ask(second) is None  # hits
    assert ask(np.append(first, 1)) is None and ask(first[:18]) is None  # one begins the other
    third[13] = 7
    assert ask(third)[0] == 13
