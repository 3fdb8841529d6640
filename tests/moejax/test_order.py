"""No collective of a CPU program runs beside those of a loop: as compiled, and under load."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax import order
from moejax.levels import CAPACITY_FACTOR
from tests.collective_order import loops_with_collectives, side_by_side
from tests.moejax.layer_under_load import Layer, draw, make_mesh
from tests.moejax.loads import hot_expert

T, D, E, K = 64, 24, 8, 2


def weighted_sum(depth, mesh, *, scanned=False, **options):
    """A compiled sum of a stack's output with fixed weights, so that backward needs nothing of forward; its arguments.

    Few tokens and a skewed router: several rounds.
    """
    make = lambda seed: moejax.MoE(  # noqa: E731
        D, D, E, top_k=K, z_weight=0.1, buffer_factor=CAPACITY_FACTOR, rngs=nnx.Rngs(seed), **options
    )
    layers = [nnx.split(make(seed)) for seed in range(depth)]
    graphdef = layers[0][0]
    params = [state for _, state in layers]
    if scanned:
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)

    def one(carry, state):
        x, aux_loss = carry
        y, stats = nnx.merge(graphdef, state)(x)
        return (y, aux_loss + stats.aux_loss), stats

    def value(params, x, dy):
        carry = (x, jnp.float32(0))
        if scanned:
            (y, aux_loss), stats = jax.lax.scan(one, carry, params)
        else:
            stats = []
            for state in params:
                carry, more = one(carry, state)
                stats.append(more)
            y, aux_loss = carry
        total = jnp.sum(y * dy)
        # The sum over devices is the caller's own: no layer can see to it that it stands before backward.
        return order.after(total, total) + aux_loss, (y, stats)

    x_key, skew_key, dy_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (T, D)) + 3 * jax.random.normal(skew_key, (1, D))
    arguments = (params, x, jax.random.normal(dy_key, (T, D)))
    with jax.set_mesh(mesh):
        tokens = moejax.mesh.token_sharding(mesh)
        states = moejax.mesh.state_shardings(params, mesh)
        arguments = jax.device_put(arguments, (states, tokens, tokens))
        step = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
        return step.lower(*arguments).compile(), arguments


@pytest.mark.landing
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(dict(depth=1, layout=(1, 1, 4)), marks=pytest.mark.slow),
        pytest.param(dict(depth=2, layout=(2, 1, 4), received="resend"), marks=pytest.mark.slow),
        dict(depth=2, layout=(1, 2, 2), scanned=True, shadow=2, chunks=2),
    ],
    ids=str,
)
def test_no_collective_is_independent_of_a_loop(case):
    layout = case.pop("layout")
    program, _ = weighted_sum(mesh=make_mesh(*layout), **case)
    assert loops_with_collectives(program.as_text()) >= 2
    assert not side_by_side(program.as_text())


@pytest.mark.landing
@pytest.mark.parametrize("options", [{}, {"shadow": 2}], ids=str)
def test_nor_under_a_shard_map_of_the_caller(options):
    layer = Layer(make_mesh(1, 1, 4), E, **options)
    operands = draw(T, K, E)
    ids = hot_expert(np.random.default_rng(0), T, K, E, 4).astype(np.int32)
    text = layer.jitted.lower(*operands[:3], ids, operands[3]).compile().as_text()
    assert loops_with_collectives(text) == 2
    assert not side_by_side(text)


def test_the_check_sees_what_is_not_tied(monkeypatch):
    monkeypatch.setattr(order, "_tied", lambda array, number: array)
    program, _ = weighted_sum(1, make_mesh(1, 1, 4))
    assert side_by_side(program.as_text())


def test_ties_change_nothing():
    mesh = moejax.make_mesh(devices=jax.devices()[:2])
    values = [jnp.float32(-0.0), jnp.float32(jnp.nan), jnp.int32(-1), jnp.bfloat16(3), jnp.bool_(True)]
    arrays = [jnp.full((2, 3), value) for value in values] + [jnp.zeros((2, 0))]
    others = [jnp.full((2,), jnp.nan), jnp.full((2,), -(2**31), jnp.int32), jnp.zeros((2, 0))]
    with jax.set_mesh(mesh):
        tied = jax.jit(order.waiting)(arrays, others)
        slope = jax.grad(lambda x: jnp.sum(order.together([x, 2 * x])[1] + order.after(x, others)))(arrays[1])
    for before, after in zip(arrays, tied, strict=True):
        assert before.dtype == after.dtype
        assert np.asarray(before).tobytes() == np.asarray(after).tobytes()
    np.testing.assert_array_equal(slope, 3)


STRESS = """
import tests.conftest, jax, numpy as np
from tests.moejax.layer_under_load import make_mesh
from tests.moejax.test_order import weighted_sum
mesh = make_mesh(1, 1, 4)
program, arguments = weighted_sum({depth}, mesh)
first = None
for _ in range({repeats}):
    found = jax.tree.leaves(jax.device_get(program(*arguments)))
    first = found if first is None else first
    assert all(np.array_equal(a, b) for a, b in zip(found, first))
print("the same", {repeats}, "times")
"""


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True], ids=["compiled", "cached"])
@pytest.mark.parametrize("depth", [1, 2])
def test_many_runs_beside_each_other(depth, cached, tmp_path):
    """Before the ties, ten of ten such processes with one layer aborted, crashed or hung within 400 runs."""
    repeats, copies = 500, 3
    cache = dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path), JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0")
    env = os.environ | (cache if cached else {"JAX_ENABLE_COMPILATION_CACHE": "false"})
    run = lambda repeats: subprocess.Popen(  # noqa: E731
        [sys.executable, "-c", STRESS.format(depth=depth, repeats=repeats)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if cached:
        assert "the same" in run(1).communicate(timeout=300)[0]
    for process in [run(repeats) for _ in range(copies)]:
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output[-2000:]
        assert f"the same {repeats} times" in output
