"""Chunks that go as through a pipeline stay what they were; what waits for what stands in the program for GPUs only."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from custom_ops.target import Target
from moejax import overlap
from moejax.overlap import pipeline


def travel(chunks, wires):
    """Through so many wires, a computation, and back; beside each chunk a number that must stay its own."""
    move = lambda x, n: (jnp.sin(x), n)  # noqa: E731
    stages = [*wires * [move], lambda x, n: (x**2, n), *wires * [move]]
    results = pipeline(stages, [(x, n) for n, x in enumerate(chunks)])
    assert [beside for _, beside in results] == list(range(len(chunks)))
    return sum(jnp.sum((n + 1) * y) for y, n in results)


@pytest.fixture
def for_gpus(monkeypatch):
    monkeypatch.setattr(overlap, "target", lambda: Target("gpu", "NVIDIA H200"))


def barriers(function, *wires):
    """How many arrays each barrier joins, in the order of the program."""
    program = jax.jit(lambda chunks: function(chunks, *wires)).lower(CHUNKS).as_text()
    return [len(arrays.split(",")) for arrays in re.findall(r"optimization_barrier ([^:]*):", program)]


CHUNKS = [jnp.linspace(0.1, 1.0, 6).reshape(2, 3) * (n + 1) for n in range(4)]


@pytest.mark.parametrize(
    ("wires", "joined"),
    [
        (0, []),
        # Beside the first chunk's computation the second travels there, then also the first one back, and so on; each
        # chunk on its way back waits for the computation.
        (1, [2, 3, 2, 3, 2, 2, 2]),
        (2, [3, 4, 2, 4, 2, 2, 3, 2, 2]),
    ],
)
def test_a_computation_ends_when_all_that_travelled_beside_it_is_there(for_gpus, wires, joined):
    assert barriers(travel, wires) == joined
    assert barriers(jax.value_and_grad(travel), wires) == 2 * joined  # in backward likewise


@pytest.mark.parametrize("wires", [1, 2])
def test_values_and_gradients_stay(for_gpus, monkeypatch, wires):
    found = jax.value_and_grad(travel)(CHUNKS, wires)
    monkeypatch.setattr(overlap, "target", lambda: Target("cpu", "cpu"))
    jax.tree.map(np.testing.assert_array_equal, found, jax.value_and_grad(travel)(CHUNKS, wires))


def test_on_cpu_nothing_is_added():
    assert barriers(jax.grad(travel), 2) == []
