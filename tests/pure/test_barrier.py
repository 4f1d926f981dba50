"""The barrier at the end of loading: everybody goes on, or everybody names who is missing."""

import threading

import pytest

from headrace.core.errors import LoadError
from headrace.dist.barrier import wait_for_ranks


class Keys(dict):
    def set(self, key, value):
        self[key] = value

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]


def arrive(ranks, size, seconds):
    """The error text of each rank that comes, "" where it goes on."""
    keys, found = Keys(), {}

    def one(rank):
        try:
            wait_for_ranks(keys, "load", rank, size, seconds)
            found[rank] = ""
        except LoadError as error:
            found[rank] = error.message

    threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("size", [1, 2, 5])
def test_all_come(size):
    assert arrive(reversed(range(size)), size, 5.0) == dict.fromkeys(range(size), "")


def test_those_that_came_name_those_that_did_not():
    found = arrive([0, 2, 3], 5, 0.1)
    assert all("rank(s) 1, 4 of 5 could not" in text for text in found.values())
    assert {text.split()[1] for text in found.values()} == {"0", "2", "3"}


def test_without_the_first_rank_it_is_the_one_that_is_named():
    now = [0.0]

    def sleep(seconds):
        now[0] += 1.0

    with pytest.raises(LoadError, match=r"rank\(s\) 0 of 2"):
        wait_for_ranks(Keys(), "load", 1, 2, 30.0, clock=lambda: now[0], sleep=sleep)
    assert now[0] >= 34.0
