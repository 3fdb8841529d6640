import numpy as np
import pytest

from train.data.order import key_of, shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 65_537])
def test_every_place_once(size):
    result = shuffled(np.arange(size), size, np.repeat(key_of("a"), size))
    assert sorted(result) == list(range(size))


def test_keys_give_different_orders_and_rows_are_independent():
    a, b = (shuffled(np.arange(1000), 1000, np.repeat(key_of(name), 1000)) for name in "ab")
    assert np.mean(a == b) < 0.02
    assert np.mean(a == np.arange(1000)) < 0.02
    mixed = shuffled(np.array([7, 7]), 1000, np.concatenate([key_of("a"), key_of("b")]))
    assert list(mixed) == [a[7], b[7]]


def test_order_looks_random():
    """Neighbours are thrown apart: the correlation of places, and of successive places, is that of chance."""
    size = 50_000
    result = shuffled(np.arange(size), size, np.repeat(key_of("c"), size))
    assert abs(np.corrcoef(result, np.arange(size))[0, 1]) < 0.02
    assert abs(np.corrcoef(result[1:], result[:-1])[0, 1]) < 0.02


def test_order_never_changes():
    """A run resumes with another version of numpy or Python, so the order is pinned."""
    assert list(shuffled(np.arange(8), 8, np.repeat(key_of("order", 0), 8))) == [4, 6, 1, 3, 5, 0, 7, 2]
