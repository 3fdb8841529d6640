"""Pseudo-random orders as pure functions: no state, no memory per item, the same with every library version.

grain's own `shuffle` goes item by item, and for small data sets it is slow beyond use (measured: 2 ms per
item for ten items, 9 ms for two); this one permutes the places of a whole batch at once.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

_ROUNDS = 3


def key_of(*parts: object) -> np.ndarray:
    """A 64-bit key (uint64, shape [1]) from anything with a stable `repr`, such as a seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def mix64(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 in which each input bit reaches each output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffled(places_N: np.ndarray, size: int, keys_N: np.ndarray) -> np.ndarray:
    """Where a permutation of `range(size)` sends each place; equal keys mean the same permutation.

    A place is written as a pair (left, right) in a grid of width * height >= size, and each side in turn is
    shifted by a hash of the other. A pair that ends in the few places of the grid at or above `size` goes
    round again.

    Args:
      places_N: integers in [0, size).
      size: how many items are ordered.
      keys_N: uint64, the key of the permutation of each place.

    Returns:
      [N] int64 in [0, size).
    """
    width = np.uint64(math.isqrt(size - 1) + 1)
    height = np.uint64(-(-size // int(width)))
    round_keys = [mix64(keys_N + np.uint64(number)) for number in range(2 * _ROUNDS)]
    x_N = places_N.astype(np.uint64)
    walking = np.arange(len(x_N))
    while len(walking):
        left, right = np.divmod(x_N[walking], height)
        for number in range(0, 2 * _ROUNDS, 2):
            left = (left + mix64(right ^ round_keys[number][walking]) % width) % width
            right = (right + mix64(left ^ round_keys[number + 1][walking]) % height) % height
        x_N[walking] = left * height + right
        walking = walking[x_N[walking] >= size]
    return x_N.astype(np.int64)
