"""Norm, rotation, attention and FFN against formulas written out one position and one head at a time, in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.attention import Attention
from moejax.layers import FeedForward, RMSNorm, rotate, rotation
from tests import tolerance

B, S, D, H, G, THETA = 2, 5, 24, 4, 2, 100.0
h = D // H
SEGMENTS = np.array([[1, 1, 2, 2, 2], [1, 2, 2, 2, 0]])
POSITIONS = np.array([[0, 1, 0, 1, 2], [0, 0, 1, 2, 0]])


def naive_norm(x, scale):
    return x / jnp.sqrt((x**2).mean() + 1e-6) * scale


def naive_rotate(x, position):
    """Pairs (x_i, x_(i + h/2)) as complex numbers, turned by position * theta^(-2i/h)."""
    pairs = x[: h // 2] + 1j * x[h // 2 :]
    turned = pairs * jnp.exp(1j * position * THETA ** (-2 * jnp.arange(h // 2) / h))
    return jnp.concatenate([turned.real, turned.imag])


def naive_attention(params, x_BSD, segments):
    """One query at a time: its scores over those it may see, their softmax, the weighted sum of the values."""

    def part(x_D, name, which):
        return x_D @ params[name][:, which * h : (which + 1) * h]

    def turned(x_D, position, name, norm, which):
        return naive_rotate(naive_norm(part(x_D, name, which), params[norm]["scale"]), position)

    def one_head(b, head):
        group = head // (H // G)
        keys = [turned(x_BSD[b, t], POSITIONS[b, t], "w_k", "k_norm", group) for t in range(S)]
        values = [part(x_BSD[b, t], "w_v", group) for t in range(S)]
        y = []
        for s in range(S):
            seen = [t for t in range(s + 1) if segments is None or segments[b, t] == segments[b, s]]
            q = turned(x_BSD[b, s], POSITIONS[b, s], "w_q", "q_norm", head)
            weights = jnp.exp(jnp.stack([keys[t] for t in seen]) @ q / h**0.5)
            y.append(weights @ jnp.stack([values[t] for t in seen]) / weights.sum())
        return jnp.stack(y)

    heads = [[one_head(b, head) for head in range(H)] for b in range(B)]
    return jnp.stack([jnp.concatenate(of_sequence, axis=1) @ params["w_out"] for of_sequence in heads])


def assert_same_as_naive(module, call, naive):
    """Value, and the gradients of its product with a fixed tensor for the input and every parameter."""
    graphdef, params = nnx.split(module)
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(jax.random.key(p.size), p.shape), params)
    x, probe = jax.random.normal(jax.random.key(1), (2, B, S, D))

    def ours(params, x):
        y = call(nnx.merge(graphdef, params), x)
        return (y * probe).sum(), y

    def wanted(params, x):
        y = naive(params, x)
        return (y * probe_f64).sum(), y

    (_, y), grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1), has_aux=True))(params, x)
    actual = {"y": y, "params": nnx.to_pure_dict(grads[0]), "x": grads[1]}
    arguments = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (nnx.to_pure_dict(params), x, probe))
    with jax.enable_x64(True):
        *arguments, probe_f64 = jax.tree.map(jnp.asarray, arguments)
        (_, y), grads = jax.value_and_grad(wanted, argnums=(0, 1), has_aux=True)(*arguments)
        expected = jax.tree.map(np.asarray, {"y": y, "params": grads[0], "x": grads[1]})
    for path, b in jax.tree_util.tree_leaves_with_path(expected):
        a = actual
        for key in path:
            a = a[key.key]
        tolerance.assert_close(a, b, tolerance.F32, jax.tree_util.keystr(path))


@pytest.mark.parametrize("packed", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_attention(packed):
    segments = SEGMENTS if packed else None
    module = Attention(D, H, num_kv_heads=G, rope_theta=THETA, rngs=nnx.Rngs(0))
    assert_same_as_naive(
        module,
        lambda module, x: module(
            x, None if segments is None else jnp.asarray(segments), jnp.asarray(POSITIONS)
        )[0],
        lambda params, x: naive_attention(params, x, segments),
    )


def test_norm():
    assert_same_as_naive(
        RMSNorm(D),
        lambda module, x: module(x),
        lambda params, x: jax.vmap(jax.vmap(lambda row: naive_norm(row, params["scale"])))(x),
    )


def test_only_distance_counts_in_rotated_products():
    q, k = jax.random.normal(jax.random.key(0), (2, h))

    def product(query_position, key_position):
        tables = rotation(jnp.asarray([[query_position, key_position]]), h, THETA)
        turned = rotate(jnp.stack([q, k])[None, :, None], tables)[0, :, 0]
        return turned[0] @ turned[1]

    tolerance.assert_close(product(9, 4), product(5, 0), tolerance.F32)
    assert abs(product(9, 4) - product(9, 5)) > 0.01


def test_parameters_begin_with_the_spread_that_keeps_a_unit_input_at_unit_size():
    wide = FeedForward(256, 512, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (64, 256))
    assert float((x @ wide.w_in[...][:, 0]).std()) == pytest.approx(1, rel=0.05)
    assert float(wide.w_out[...].std()) == pytest.approx(512**-0.5, rel=0.02)
    assert float(jnp.abs(wide.w_out[...]).max()) < 2.28 * 512**-0.5
