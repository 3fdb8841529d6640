"""Every activation by its formula, in dense layers and in experts: values and every gradient.

Experts with biases: `test_every_argument.py`.
"""

from typing import get_args, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from custom_ops import make_plan
from moejax.activations import ACTIVATIONS
from tests import tolerance
from tests.moejax import oracle
from tests.moejax.every_argument import assert_same
from train.config import ModelConfig

T, D, F, E = 12, 6, 5, 2


def modules(activation):
    """A dense layer and experts; for the clamped activation so large that its limits are passed."""
    dense = moejax.FeedForward(D, F, activation=activation, rngs=nnx.Rngs(0))
    experts = moejax.Experts(E, D, F, activation=activation, rngs=nnx.Rngs(1))
    for module in (dense, experts):
        module.w_in[...] *= 5 if activation == "clamped_swiglu" else 1
    return nnx.List([dense, experts])


def test_every_activation_by_its_formula():
    graphdefs, params = {}, {}
    for name in ACTIVATIONS:
        graphdefs[name], params[name] = nnx.split(modules(name))
    x, dy = jax.random.normal(jax.random.key(4), (2, T, D))
    ids = jnp.arange(T, dtype=jnp.int32)[:, None] % E
    weights = jax.random.uniform(jax.random.key(5), (T, 1))

    def ours(params, x, weights):
        plan = make_plan(ids, E)
        ys = {}
        for name, graphdef in graphdefs.items():
            dense, experts = nnx.merge(graphdef, params[name])
            ys[name] = dense(x) + experts(x, plan, weights)
        return sum(jnp.sum(y * dy) for y in ys.values()), ys

    def by_formula(params, x, weights):
        ys = {}
        for name, (dense, experts) in params.items():
            y = oracle.ffn(x, dense["w_in"], dense["w_out"], name)
            for e in range(E):
                y += jnp.where(ids == e, weights, 0) * oracle.ffn(
                    x, experts["w_in"][e], experts["w_out"][e], name
                )
            ys[name] = y
        return sum(jnp.sum(y * dy_f64) for y in ys.values()), ys

    (_, ys), grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2), has_aux=True))(params, x, weights)
    by_name = lambda tree: {name: list(nnx.to_pure_dict(state).values()) for name, state in tree.items()}  # noqa: E731
    actual = {"y": ys, "parameters": by_name(grads[0]), "x": grads[1], "weights": grads[2]}
    wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)  # noqa: E731
    arguments = wide((by_name(params), x, weights, dy))
    with jax.enable_x64(True):
        *arguments, dy_f64 = jax.tree.map(jnp.asarray, arguments)
        (_, ys), grads = jax.jit(jax.value_and_grad(by_formula, (0, 1, 2), has_aux=True))(*arguments)
    expected = {"y": ys, "parameters": grads[0], "x": grads[1], "weights": grads[2]}
    assert_same(actual, wide(expected), tolerance.F32)


def test_the_tables_have_the_same_names():
    assert set(oracle.PLAIN) | set(oracle.GATED) == set(ACTIVATIONS)
    assert {name for name, activation in ACTIVATIONS.items() if activation.columns == 2} == set(oracle.GATED)
    assert set(get_args(get_type_hints(ModelConfig)["activation"])) == set(ACTIVATIONS)


def test_gradients_at_and_beyond_the_limits_of_the_clamped_one():
    up = jnp.asarray([[0.0, 0.0, 7.0, 8.0, -7.0, -8.0]])
    gate = jnp.asarray([[7.0, 8.0, 1.0, 1.0, 1.0, 1.0]])
    clamped = ACTIVATIONS["clamped_swiglu"].function
    gradient = jax.jit(jax.grad(lambda hidden: clamped(hidden).sum()))(jnp.concatenate([gate, up], axis=1))
    d_gate, d_up = jnp.split(gradient[0], 2)
    assert [bool(slope) for slope in d_gate[:2]] == [True, False]
    assert [bool(slope) for slope in d_up[2:]] == [True, False, True, False]


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_the_exact_gelu_in_other_dtypes(dtype):
    z = np.linspace(-6, 6, 101)
    with jax.enable_x64(True):
        x = jnp.asarray(z, dtype)
        exact = np.asarray(oracle.PLAIN["gelu_exact"](x.astype(jnp.float64)))
        y = ACTIVATIONS["gelu_exact"].function(x)
    assert y.dtype == dtype
    tolerance.assert_close(
        np.asarray(y, np.float64), exact, tolerance.F64 if dtype == jnp.float64 else tolerance.BF16
    )


@pytest.mark.parametrize("make", [
    lambda: moejax.FeedForward(D, F, activation="rellu", rngs=nnx.Rngs(0)),
    lambda: moejax.Experts(E, D, F, activation="rellu", rngs=nnx.Rngs(0)),
    lambda: moejax.MoE(D, F, E, experts="rellu", rngs=nnx.Rngs(0)),
])  # fmt: skip
def test_an_unknown_activation_is_named(make):
    with pytest.raises(
        ValueError, match=r"(activation|experts) = 'rellu': must be one of swiglu, .*; the nearest is relu"
    ):
        make()
