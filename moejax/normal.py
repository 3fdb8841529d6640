"""The normal distribution's cumulative distribution function, for routers and activations."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Highest power first.
_ERFC = (
    0.17087277,
    -0.82215223,
    1.48851587,
    -1.13520398,
    0.27886807,
    -0.18628806,
    0.09678418,
    0.37409196,
    1.00002368,
    -1.26551223,
)


@jax.custom_jvp
def normal_cdf(z: jax.Array) -> jax.Array:
    """Phi(z), f32, relative error below 1.3e-7 plus that of exp; its slope is the normal density.

    Source: Press et al., Numerical Recipes, section 6.2, a fit of erfc. `jax.lax.erf` cannot be traced in a
    `shard_map` that checks varying axes (jax 0.12.0).
    """
    x = jnp.abs(z) * math.sqrt(0.5)
    t = 1 / (1 + 0.5 * x)
    polynomial = jnp.zeros_like(t)
    for coefficient in _ERFC:
        polynomial = polynomial * t + coefficient
    tail = 0.5 * t * jnp.exp(-x * x + polynomial)
    return jnp.where(z > 0, 1 - tail, tail)


@normal_cdf.defjvp
def _normal_cdf_jvp(primals, tangents):
    (z,), (dz,) = primals, tangents
    return normal_cdf(z), dz * jnp.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
