"""Pieces that go in turn stay what they were; what waits for what stands in the program for GPUs, not for CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from custom_ops.target import Target
from moejax import overlap
from moejax.overlap import in_turn


def travel(pieces, ahead):
    """A sum that is linear in no piece, each with a number beside it that must stay its own."""
    results = in_turn(lambda x, n: (jnp.sin(x) * n, n + 1), [(x, n) for n, x in enumerate(pieces)], ahead)
    assert [beside for _, beside in results] == [n + 1 for n in range(len(pieces))]
    return sum(jnp.sum(y**2) for y, _ in results)


@pytest.fixture
def for_gpus(monkeypatch):
    monkeypatch.setattr(overlap, "target", lambda: Target("gpu", "NVIDIA H200"))


def barriers(pieces, ahead, function=travel):
    return str(jax.make_jaxpr(lambda pieces: function(pieces, ahead))(pieces)).count("optimization_barrier")


PIECES = [jnp.linspace(0.1, 1.0, 6).reshape(2, 3) * (n + 1) for n in range(4)]


@pytest.mark.parametrize(("ahead", "ties"), [(0, 0), (1, 3), (2, 2), (4, 0)])
def test_waits_for_the_one_that_many_before(for_gpus, ahead, ties):
    assert barriers(PIECES, ahead) == ties
    # In backward the cotangents wait too, in the opposite order.
    assert barriers(PIECES, ahead, lambda *args: jax.grad(travel)(*args)) == 2 * ties


def test_values_and_gradients_stay(for_gpus):
    value, gradients = jax.value_and_grad(travel)(PIECES, 1)
    expected, expected_gradients = jax.value_and_grad(travel)(PIECES, 0)
    np.testing.assert_array_equal(value, expected)
    jax.tree.map(np.testing.assert_array_equal, gradients, expected_gradients)


def test_on_cpu_nothing_is_added():
    assert barriers(PIECES, 1, lambda *args: jax.value_and_grad(travel)(*args)) == 0
