"""The types that numbers are computed in."""

import jax.numpy as jnp
from jax.typing import DTypeLike


def wide(dtype: DTypeLike) -> jnp.dtype:
    """What products and sums of a floating-point type are formed in: at least f32."""
    # Not by promotion: jax promotes 8-bit floats to nothing.
    return jnp.dtype(jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype)


def common(a: DTypeLike, b: DTypeLike) -> jnp.dtype:
    """What numbers of two floating-point types are multiplied in: their own if it is one, else wide enough for both."""
    return jnp.dtype(a) if jnp.dtype(a) == jnp.dtype(b) else jnp.promote_types(wide(a), wide(b))


def is_whole_bytes(dtype: DTypeLike) -> bool:
    """Whether every number begins at a byte of its own; XLA packs several of fewer than 8 bits into one."""
    dtype = jnp.dtype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.finfo(dtype).bits >= 8
    return not jnp.issubdtype(dtype, jnp.integer) or jnp.iinfo(dtype).bits >= 8
