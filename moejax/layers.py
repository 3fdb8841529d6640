"""Layers of a transformer that are not Mixture-of-Experts.

Shapes: B sequences, S positions, D model width, F hidden width, H query heads, G key/value heads, h width of a
head, V vocabulary, W cache window.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from custom_ops.checks import one_of, require
from moejax.activations import ACTIVATIONS
from moejax.arguments import checked
from moejax.mesh import LOGICAL_AXES

_TRUNCATED_STD = 0.87962566  # standard deviation of a unit normal cut at +-2


def init_matrix(rngs: nnx.Rngs, shape: tuple[int, ...], *, axes: tuple[str, ...], std: float) -> nnx.Param:
    """A parameter drawn from a normal distribution cut at two sigma, of standard deviation `std` after the cut.

    For a projection that is 1 / sqrt(inputs of ONE output): in a stack of expert matrices, of one expert.
    """
    draw = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(std / _TRUNCATED_STD * draw, axes=axes)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float = 1e-6) -> jax.Array:
    """x / rms(x) * scale over the last dimension, computed in f32 (Zhang & Sennrich 2019, eq. 4); dtype of x.

    scale: of the last dimension, or of some of the last ones.
    """
    x_f32 = x.astype(jnp.float32)
    rms = jax.lax.rsqrt(jnp.mean(x_f32 * x_f32, axis=-1, keepdims=True) + eps)
    return (x_f32 * rms * jnp.expand_dims(scale, tuple(range(x.ndim - scale.ndim)))).astype(x.dtype)


class RMSNorm(nnx.Module):
    """`rms_norm` with a learned scale; backward keeps only its input."""

    @checked(axis=one_of(LOGICAL_AXES))
    def __init__(self, width: int, *, axis: str = "embed"):
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32), axes=(axis,))

    @checked()
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., width] -> [..., width], same dtype."""
        width = self.scale.shape[-1]
        require(x.shape[-1] == width, "x", x, f"must be [..., {width}], as wide as the norm's width")
        return jax.checkpoint(rms_norm)(x, self.scale[...])


def rotation(positions_BS: jax.Array, d_head: int, theta: float) -> jax.Array:
    """Cosines and sines of rotary position embedding (Su et al. 2021, eq. 34), f32 [B, S, 2, h / 2]."""
    half = d_head // 2
    wavelengths = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BSf = positions_BS[:, :, None].astype(jnp.float32) * wavelengths[None, None, :]
    return jnp.stack([jnp.cos(angle_BSf), jnp.sin(angle_BSf)], axis=2)


def rotate(x_BSHh: jax.Array, rotation_BS2f: jax.Array) -> jax.Array:
    """Turn every head by its position's `rotation`, halves against each other; in f32, dtype of x."""
    cos, sin = rotation_BS2f[:, :, :1], rotation_BS2f[:, :, 1:]
    a, b = jnp.split(x_BSHh.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BSHh.dtype)


class FeedForward(nnx.Module):
    """Dense FFN: x_BSD -> y_BSD.

    Args:
      activation: name in `ACTIVATIONS`.

    Raises:
      ValueError: an unknown activation; names the nearest.
    """

    @checked(activation=one_of(ACTIVATIONS))
    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        *,
        activation: str = "swiglu",
        out_scale=1.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        parts = ACTIVATIONS[activation].columns
        self.activation = activation
        self.dtype = dtype
        self.w_in = init_matrix(
            rngs, (d_model, parts, d_hidden), axes=("embed", "parts", "hidden"), std=d_model**-0.5
        )
        self.w_out = init_matrix(
            rngs, (d_hidden, d_model), axes=("hidden", "embed"), std=out_scale * d_hidden**-0.5
        )

    @checked()
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] -> [..., D]."""
        d_model = self.w_in.shape[0]
        require(x.shape[-1] == d_model, "x", x, f"must be [..., {d_model}], as wide as the layer's d_model")
        w_in = self.w_in[...].astype(self.dtype)
        hidden = x.astype(self.dtype) @ w_in.reshape(w_in.shape[0], -1)
        return ACTIVATIONS[self.activation].function(hidden) @ self.w_out[...].astype(self.dtype)
