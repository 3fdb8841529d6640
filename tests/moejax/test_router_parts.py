"""What single routers are made of: chances, angles, biases, the best of a column."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import moejax
from moejax.normal import normal_cdf
from moejax.routing import make_router
from moejax.routing.decision import top_k_ids
from moejax.routing.noisy import chance_of_choice
from moejax.routing.take import best_of_columns
from tests import tolerance
from tests.moejax import naive_routing as naive
from tests.moejax.routed import E, T, build


def test_chance_of_choice_is_the_share_of_choices():
    """Of many draws of one expert's noise, the share in which it is chosen."""
    random = np.random.default_rng(0)
    clean, spread, normal = random.normal(size=(3, 1, E))
    spread = np.abs(spread) + 0.2
    noisy = clean + spread * normal
    best = top_k_ids(jnp.asarray(noisy), 3)
    chance = np.asarray(chance_of_choice(*map(jnp.asarray, (clean, noisy, spread)), best, 2))[0]
    for e in range(E):
        others = np.sort(np.delete(noisy[0], e))[-2]
        drawn = clean[0, e] + spread[0, e] * random.normal(size=100_000)
        assert (drawn > others).mean() == pytest.approx(chance[e], abs=0.01)


def test_cosine_is_the_cosine():
    """Choice, weights, and their gradients by tokens and parameters; finite where a token is 0."""
    router = make_router("cosine", 16, E, projection=5, normalize=False, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(router)
    x = jax.random.normal(jax.random.key(0), (T, 16))
    cotangent = jax.random.normal(jax.random.key(1), (T, 2))

    def ours(params, x):
        routing = nnx.merge(graphdef, params)(x)
        return jnp.sum(routing.weights_TK * cotangent), routing

    grad = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))
    (of_parameters, dx), routing = grad(params, x)

    def restated(p, x):
        projected, points = x @ p["w_DR"], p["points_RE"]
        lengths = jnp.sqrt((projected**2).sum(1, keepdims=True)), jnp.sqrt((points**2).sum(0, keepdims=True))
        logits = projected @ points / lengths[0] / lengths[1] * jnp.exp(p["log_scale"])
        weights = jnp.take_along_axis(jax.nn.softmax(logits), jnp.asarray(routing.ids_TK), axis=1)
        return jnp.sum(weights * wide_cotangent), logits

    wide = lambda tree: jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)  # noqa: E731
    arguments = wide((nnx.to_pure_dict(params), x, cotangent))
    with jax.enable_x64(True):
        p, x_f64, wide_cotangent = jax.tree.map(jnp.asarray, arguments)
        expected, logits = jax.grad(restated, argnums=(0, 1), has_aux=True)(p, x_f64)
    tolerance.assert_close(routing.logits_TE, logits, tolerance.F32)
    np.testing.assert_array_equal(routing.ids_TK, naive.top_k(np.asarray(logits), np.ones(T, bool), 2)[0])
    tolerance.assert_close(dx, expected[1], tolerance.F32)
    for name, gradient in nnx.to_pure_dict(of_parameters).items():
        tolerance.assert_close(gradient, expected[0][name], tolerance.F32, name)
    assert np.isfinite(grad(params, x.at[3].set(0.0))[0][1]).all()


def test_selection_bias_moves_against_the_load():
    router = build("sigmoid")
    before = np.asarray(router.selection_bias_E[...])
    load = np.array([9, 1, 4, 4, 4, 4, 4, 2])
    router.balance(jnp.asarray(load))
    step = np.asarray(router.selection_bias_E[...]) - before
    np.testing.assert_allclose(step, 1e-2 * np.sign(load.mean() - load), atol=1e-7)


def test_router_bias_is_added():
    router = make_router("topk", 4, E, router_bias=True, rngs=nnx.Rngs(0))
    router.b_E[...] = jnp.arange(float(E))
    x = jax.random.normal(jax.random.key(0), (3, 4))
    bias = router.logits(x) - jnp.dot(x, router.w_DE[...])
    tolerance.assert_close(bias, np.tile(np.arange(E), (3, 1)), tolerance.F32)


def test_normal_cdf_and_its_slope():
    z = np.linspace(-9, 9, 2001).astype(np.float32)
    value, slope = jax.vmap(jax.value_and_grad(normal_cdf))(z)
    exact = [0.5 * math.erfc(-float(number) * math.sqrt(0.5)) for number in z]
    tolerance.assert_close(value, exact, tolerance.F32, "value")
    density = np.exp(-0.5 * z.astype(np.float64) ** 2) / math.sqrt(2 * math.pi)
    tolerance.assert_close(slope, density, tolerance.F32, "slope")
    # Far out, where only a share of it is left, too: the exponential's own error is all there is.
    tails = z < -3
    tolerance.assert_close(value[tails] / np.asarray(exact)[tails], np.ones(tails.sum()), 4 * tolerance.F32)


@pytest.mark.parametrize(("tokens", "digits"), [(1, 1), (17, 1), (63, 2), (64, 6)])
def test_the_best_of_a_column_are_those_of_a_sorted_one(tokens, digits):
    """Where counts are 0, or more than there are; few digits make ties."""
    random = np.random.default_rng(tokens)
    scores = np.round(random.random((tokens, 6)), digits).astype(np.float32)
    first, valid = random.random((tokens, 6)) < 0.4, random.random(tokens) < 0.8
    count = np.array([0, 1, tokens // 3, tokens // 2, tokens, tokens + 5], np.int32)
    found = np.asarray(best_of_columns(*map(jnp.asarray, (scores, first, valid, count))))
    for e in range(6):
        queue = sorted(np.flatnonzero(valid), key=lambda t, e=e: (not first[t, e], -scores[t, e], t))
        assert np.flatnonzero(found[:, e]).tolist() == sorted(queue[: count[e]]), e


def test_orthogonality_loss_and_its_gradient():
    """That of the formula in f64, alone and where tokens are split over devices; the routers' matrix is their own."""
    random = np.random.default_rng(0)
    w, x = random.normal(size=(6, 8)) / 2, random.normal(size=(16, 6)).astype(np.float32)

    def layer_loss(layer, x):
        _, stats = layer(x)
        return stats.aux_loss

    for mesh in (None, moejax.make_mesh(data=2, expert=4)):
        options = dict(balance_weight=0.0, z_weight=0.0, orthogonality_weight=0.5)
        layer = moejax.MoE(6, 4, 8, **options, rngs=nnx.Rngs(0))
        layer.router.w_DE[...] = jnp.asarray(w, jnp.float32)
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            loss, grads = nnx.jit(nnx.value_and_grad(layer_loss))(layer, jnp.asarray(x))
        difference = w.T @ w - np.eye(8)
        tolerance.assert_close(loss, 0.5 * np.abs(difference).mean(), tolerance.F32)
        expected = 0.5 * 2 * w @ np.sign(difference) / 64
        tolerance.assert_close(grads["router"]["w_DE"][...], expected, tolerance.F32)
