"""Philox against the known-answer vectors of Random123, and what the numbers are keyed by."""

import numpy as np
import pytest

from headrace.core.noise import philox4x32, uniform

# tests/kat_vectors of github.com/DEShawResearch/random123, lines "philox4x32 10".
VECTORS = [
    (
        "00000000 00000000 00000000 00000000 00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text: str) -> np.ndarray:
    return np.array([[int(word, 16)] for word in text.split()], dtype=np.uint64)


@pytest.mark.parametrize(("given", "expected"), VECTORS)
def test_philox_matches_known_answers(given, expected):
    columns = words(given)
    assert np.array_equal(philox4x32(columns[:4], columns[4:]), words(expected))


def test_philox_columns_are_independent():
    columns = np.concatenate([words(given) for given, _ in VECTORS], axis=1)
    expected = np.concatenate([words(answer) for _, answer in VECTORS], axis=1)
    assert np.array_equal(philox4x32(columns[:4], columns[4:]), expected)


def at(seed: int, sample_index: int, position: int) -> float:
    key = np.array([seed], np.uint64), np.array([sample_index]), np.array([position])
    return float(uniform(*key)[0])


def test_uniform_is_the_top_52_bits_of_the_first_two_words():
    word = [int(text, 16) for text in VECTORS[0][1].split()]
    assert at(0, 0, 0) == ((word[0] << 20) | (word[1] >> 12)) / 2**52


def test_every_part_of_the_key_counts():
    base = at(5, 1, 7)
    keys = [(5 + 2**40, 1, 7), (6, 1, 7), (5, 2, 7), (5, 1, 8), (5, 1, 7 + 2**33)]
    others = {at(*key) for key in keys}
    assert len(others) == 5
    assert base not in others
    assert at(5, 1, 7) == base


def test_uniform_is_uniform():
    numbers = uniform(np.full(20000, 3, np.uint64), np.zeros(20000, int), np.arange(20000))
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees, p = 0.001
