"""A MoE layer and the dense oracle, each with its value and every gradient, for tests of the layer."""

import jax
import jax.numpy as jnp
from flax import nnx

import moejax
from moejax.order import after
from tests import tolerance
from tests.moejax import oracle

T, D, F, E = 64, 24, 20, 8


def make_layer(top_k, *, num_experts=E, **options):
    return moejax.MoE(
        D, F, num_experts, top_k=top_k, balance_weight=0.3, z_weight=0.1, rngs=nnx.Rngs(1), **options
    )


def layer_value_and_grads(layer, x, dy, mask=None, mesh=None):
    """y, aux loss, stats, and gradients of sum(y * dy) + aux by x and every parameter."""
    graphdef, params = nnx.split(layer)

    @jax.jit
    def run(params, x):
        def scalar(params, x, others):
            y, stats = nnx.merge(graphdef, params, others)(x, token_mask=mask)
            total = jnp.sum(y * dy) + stats.aux_loss
            return after(total, total), (y, stats)  # the loss is linear: see docs/dispatch.md, "On CPU"

        params, others = nnx.state(nnx.merge(graphdef, params), nnx.Param, ...)
        return jax.value_and_grad(scalar, argnums=(0, 1), has_aux=True)(params, x, others)

    if mesh is None:
        (_, (y, stats)), (grads, dx) = run(params, x)
    else:
        with jax.set_mesh(mesh):
            params = jax.device_put(params, moejax.mesh.state_shardings(params, mesh))
            (_, (y, stats)), (grads, dx) = run(params, jax.device_put(x, moejax.mesh.token_sharding(mesh)))
    return y, stats, nnx.to_pure_dict(grads), dx


def oracle_value_and_grads(layer, x, dy, mask=None):
    def scalar(w_router, w_in, w_out, x):
        y, balance, z = oracle.moe(
            x,
            w_router,
            w_in,
            w_out,
            top_k=layer.router.top_k,
            normalize=layer.router.normalize,
            activation=layer.experts.activation,
            mask_T=mask,
        )
        return jnp.sum(y * dy) + layer.balance_weight * balance + layer.z_weight * z, (y, balance, z)

    weights = (layer.router.w_DE[...], layer.experts.w_in[...], layer.experts.w_out[...])
    return jax.jit(jax.value_and_grad(scalar, argnums=(0, 1, 2, 3), has_aux=True))(*weights, x)


def assert_equals_oracle(layer, x, dy, mask=None, mesh=None, tol=tolerance.F32):
    y, stats, grads, dx = layer_value_and_grads(layer, x, dy, mask, mesh)
    (_, (y_ref, balance, z)), expected = oracle_value_and_grads(layer, x, dy, mask)
    tolerance.assert_close(y, y_ref, tol, "y")
    tolerance.assert_close(stats.balance_loss, balance, tol, "balance loss")
    tolerance.assert_close(stats.z_loss, z, tol, "z loss")
    actual = (grads["router"]["w_DE"], grads["experts"]["w_in"], grads["experts"]["w_out"], dx)
    for name, a, b in zip(("router", "w_in", "w_out", "x"), actual, expected, strict=True):
        tolerance.assert_close(a, b, tol, f"gradient of {name}")
    valid = T if mask is None else int(mask.sum())
    assert int(stats.load_E.sum()) == valid * layer.router.top_k
    assert int(stats.dropped) == int(stats.invalid) == 0
    return stats


def draw(skew=0.0, seed=0):
    x_key, dy_key, skew_key = jax.random.split(jax.random.key(seed), 3)
    x = jax.random.normal(x_key, (T, D)) + skew * jax.random.normal(skew_key, (1, D))
    return x, jax.random.normal(dy_key, (T, D))
