"""Seeded permutations, the same on every machine and with every version of numpy."""

from __future__ import annotations

import functools
import math

import numpy as np

_MASK = 2**64 - 1
# Four rounds are enough for large domains (Luby and Rackoff, 1988); tiny ones need more to mix.
_ROUNDS = 8


def permuted(position: int, n: int, *key: int) -> int:
    """Returns the element at one position of a permutation of range(n), without computing the rest.

    A generalized Feistel network on Z_a x Z_b, the smallest such domain of at least n elements with
    a close to b, with cycle walking (Black and Rogaway, CT-RSA 2002, methods 2 and 3). It takes no
    memory and the same time for every n.

    Args:
        position: The position, in range(n).
        n: The number of elements, at least 1.
        *key: What the permutation depends on.

    Raises:
        ValueError: There is no such position; a permutation of nothing has none.
    """
    if not 0 <= position < n:
        raise ValueError(f"expected a position in a permutation of {n} elements, found {position}")
    left_size, right_size, round_keys = _network(n, key)
    while True:
        left, right = divmod(position, right_size)
        for index, round_key in enumerate(round_keys):
            if index % 2:
                right = (right + _mix(round_key ^ left)) % right_size
            else:
                left = (left + _mix(round_key ^ right)) % left_size
        position = left * right_size + right
        if position < n:
            return position


@functools.lru_cache(maxsize=1024)
def _network(n: int, key: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """Returns the sizes of both halves and the key of each round."""
    left_size = math.isqrt(n - 1) + 1
    right_size = -(-n // left_size)
    state = _state(key)
    return left_size, right_size, tuple(_mix(state ^ _mix(r)) for r in range(_ROUNDS))


def shuffled(n: int, *key: int) -> np.ndarray:
    """Returns a permutation of range(n) that depends on the key alone, as a list in memory."""
    return _shuffled(n, key)


@functools.lru_cache(maxsize=4)
def _shuffled(n: int, key: tuple[int, ...]) -> np.ndarray:
    draws = _mix_array(np.arange(n, dtype=np.uint64) + np.uint64(_state(key)))
    return np.argsort(draws, kind="stable")


def _state(key: tuple[int, ...]) -> int:
    state = 0
    for part in key:
        state = _mix((state ^ part) & _MASK)
    return state


def _mix(x: int) -> int:
    """Applies splitmix64 (Steele, Lea and Flood, OOPSLA 2014) to an integer of 64 bits."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """Applies splitmix64 to uint64 values."""
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
