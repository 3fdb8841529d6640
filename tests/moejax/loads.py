"""Ways in which tokens can choose experts, from the kindest to the cruellest.

Shapes: T tokens of all devices, K experts per token, E experts in all, P devices, each with T / P tokens.
"""

import numpy as np


def balanced(rng, T, K, E, P):
    return (np.arange(T * K).reshape(T, K) + rng.integers(E)) % E


def zipf(rng, T, K, E, P):
    gumbel = rng.gumbel(size=(T, E)) - np.log(1 + np.arange(E))
    return np.argsort(-gumbel, axis=1)[:, :K]


def hot_expert(rng, T, K, E, P):
    ids = _uniform(rng, T, K, E)
    ids[: T // 2, 0] = E - 2  # some tokens now have it twice
    return ids


def hot_device(rng, T, K, E, P):
    L = E // P
    return (P - 1) * L + _uniform(rng, T, min(K, L), L)[:, np.arange(K) % min(K, L)]


def hot_source(rng, T, K, E, P):
    ids = _uniform(rng, T, K, E)
    ids[: T // P] = rng.integers(E - E // P, E, (T // P, K))
    return ids


def empty_device(rng, T, K, E, P):
    L = E // P if P > 1 else 0
    return L + rng.integers(E - L, size=(T, K))


def rotating(rng, T, K, E, P):
    device_T = (np.arange(T) * P // T + 1) % P
    return device_T[:, None] * (E // P) + rng.integers(E // P, size=(T, K))


def bursts(rng, T, K, E, P):
    return (np.arange(T)[:, None] // 11 * 5 + np.arange(K)) % E


def all_to_one(rng, T, K, E, P):
    return np.full((T, K), E - 1)


def with_holes(rng, T, K, E, P):
    """Masked tokens, absent choices, and a device of which no token goes anywhere."""
    ids = np.where(rng.random((T, K)) < 0.3, -1, _uniform(rng, T, K, E))
    ids[::5] = -1
    ids[-(T // P) :] = -1
    return ids


def _uniform(rng, T, K, E):
    return np.argsort(rng.random((T, E)), axis=1)[:, :K]


LOADS = (
    balanced,
    zipf,
    hot_expert,
    hot_device,
    hot_source,
    empty_device,
    rotating,
    bursts,
    all_to_one,
    with_holes,
)
