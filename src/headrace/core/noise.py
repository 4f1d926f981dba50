"""Counter-based sampling noise: one uniform number per (seed, sample index, position).

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3"
(SC 2011). A number depends on its key alone, never on what was drawn before it, so a request draws
the same tokens alone, in a batch, after a retraction or on another server. csrc/kernels/sample.cpp
computes the same numbers.
"""

import numpy as np

_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_STEPS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_ROUNDS = 10


def philox4x32(counter: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Ten rounds of Philox on columns of 32-bit words.

    `counter` is uint64 [4, n] and `key` uint64 [2, n], all values below 2**32; so is the uint64
    [4, n] that comes back.
    """
    even, odd = counter[0::2], counter[1::2]
    for number in range(_ROUNDS):
        # Words 0 and 2 take the high half of the other word's product, words 1 and 3 the low half.
        product = (even * _MULTIPLIERS)[::-1]
        even = (product >> _HALF) ^ odd ^ ((key + _KEY_STEPS * np.uint64(number)) & _LOW)
        odd = product & _LOW
    result = np.empty_like(counter)
    result[0::2], result[1::2] = even, odd
    return result


def uniform(seed: np.ndarray, sample_index: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Uniform float64 in [0, 1) with 52 bits for every (seed, sample index, position).

    `seed` is uint64 [n] (all 64 bits count), the others integers [n]. With 52 bits `u * total <
    total` holds in float64, which an inverse-CDF draw relies on.
    """
    counter = np.zeros((4, len(seed)), dtype=np.uint64)
    counter[0] = position & 0xFFFFFFFF
    counter[1] = position >> 32
    counter[2] = sample_index
    words = philox4x32(counter, np.stack([seed & _LOW, seed >> _HALF]))
    bits = (words[0] << np.uint64(20)) | (words[1] >> np.uint64(12))
    numbers: np.ndarray = bits.astype(np.float64) * 2.0**-52
    return numbers
